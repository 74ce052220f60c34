"""Write the generated tables of tests/README.md: faults, refused files, wrong uses, devices and others.

    python tests/readme_tables.py                  # runs the tests that report rows: about ten minutes on a free core
    python tests/readme_tables.py --report FILE …  # takes the rows that `GPTLIT_REPORT=FILE pytest …` wrote

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. A reported table that has no place yet is
appended in a section of its own; a place without reported rows keeps its table.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
README = TESTS / "README.md"
VERB = 1  # column of the verb in tables that have one: rows that differ in it only are merged


def parse_report(report: str) -> dict[str, list[list[str]]]:
    """Return the rows of cells of each table in a report by name; header and rule come first."""
    tables: dict[str, list[list[str]]] = {}
    for part in re.split(r"^## ", report, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("| ")]
        rows = [re.split(r" (?<!\\)\| ", line.removeprefix("| ").removesuffix(" |")) for line in lines]
        tables[name] = [*tables[name], *rows[2:]] if name in tables else rows
    return tables


def merge_verbs(rows: list[list[str]]) -> list[list[str]]:
    """Merge rows that differ in their verb only."""
    merged: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        merged.setdefault((*row[:VERB], *row[VERB + 1 :]), []).append(row[VERB])
    return [[*key[:VERB], ", ".join(verbs), *key[VERB:]] for key, verbs in merged.items()]


def to_markdown(rows: list[list[str]]) -> str:
    """Return a Markdown table without repeated rows, since reports may overlap."""
    unique = [list(cells) for cells in dict.fromkeys(map(tuple, rows))]
    if "verb" in unique[0]:
        unique = merge_verbs(unique)
    return "".join(f"| {' | '.join(row)} |\n" for row in unique)


def fill_in(document: str, tables: dict[str, list[list[str]]]) -> str:
    """Return the document with all tables of a report."""

    def filled(place: re.Match[str]) -> str:
        name = place[1]
        if name not in tables:
            return place[0]
        return f"<!-- table: {name} -->\n\n{to_markdown(tables[name])}\n<!-- end of table -->"

    places = re.compile(r"<!-- table: (.*?) -->.*?<!-- end of table -->", flags=re.DOTALL)
    known = {place[1] for place in places.finditer(document)}
    for name in tables.keys() - known:
        title = name[:1].upper() + name[1:]
        document = f"{document.rstrip()}\n\n## {title}\n\n<!-- table: {name} -->\n<!-- end of table -->\n"
    return places.sub(filled, document)


def run_tests() -> str:
    """Run the test files that report rows; return their report."""
    files = [path for path in sorted(TESTS.rglob("test_*.py")) if re.search(r"\breport\(", path.read_text("utf-8"))]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.md"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", *map(str, files)]
        subprocess.run(command, cwd=TESTS.parent, env={**os.environ, "GPTLIT_REPORT": str(report)}, check=True)
        return report.read_text(encoding="utf-8")


def main() -> None:
    """Rewrite tests/README.md."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, nargs="+", help="files written by the tests")
    options = parser.parse_args()
    reports = [path.read_text(encoding="utf-8") for path in options.report] if options.report else [run_tests()]
    tables = parse_report("\n".join(reports))
    README.write_text(fill_in(README.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
