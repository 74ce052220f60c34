"""Writes the tables of faults, wrong uses and devices into the README, as the tests saw them.

    python tests/readme_tables.py                  # runs those tests first: ten minutes on a free core
    python tests/readme_tables.py --report FILE …  # takes what `GPTLIT_REPORT=FILE pytest …` has written

A table stands in the README between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ("test_resume", "test_faults", "test_bad_input", "test_checkpoint_files", "test_devices")
VERB = 1  # column of the table of files: rows that differ in it alone become one


def tables_of(report: str) -> dict[str, list[list[str]]]:
    """Rows of cells of each table in a report, by its name; header and rule come first."""
    tables: dict[str, list[list[str]]] = {}
    for part in re.split(r"^## ", report, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("| ")]
        rows = [re.split(r" (?<!\\)\| ", line.removeprefix("| ").removesuffix(" |")) for line in lines]
        tables[name] = [*tables[name], *rows[2:]] if name in tables else rows
    return tables


def with_verbs_together(rows: list[list[str]]) -> list[list[str]]:
    """Rows that differ in their verb alone become one row of all verbs."""
    together: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        together.setdefault((*row[:VERB], *row[VERB + 1 :]), []).append(row[VERB])
    return [[*key[:VERB], ", ".join(verbs), *key[VERB:]] for key, verbs in together.items()]


def fill_in(readme: str, tables: dict[str, list[list[str]]]) -> str:
    """The README with the rows of each table that it has a place for."""

    def filled(place: re.Match[str]) -> str:
        rows = [list(cells) for cells in dict.fromkeys(map(tuple, tables[place[1]]))]  # reports may overlap
        if "verb" in rows[0]:
            rows = with_verbs_together(rows)
        lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        return f"<!-- table: {place[1]} -->\n\n{lines}\n<!-- end of table -->"

    return re.sub(r"<!-- table: (.*?) -->.*?<!-- end of table -->", filled, readme, flags=re.DOTALL)


def run_tests() -> str:
    """What the tests report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.md"
        command = [sys.executable, "-m", "pytest", "-q", *(f"tests/{name}.py" for name in TESTS)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "GPTLIT_REPORT": str(report)}, check=True)
        return report.read_text(encoding="utf-8")


def main() -> None:
    """Rewrites README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, nargs="+")
    options = parser.parse_args()
    reports = [path.read_text(encoding="utf-8") for path in options.report] if options.report else [run_tests()]
    path = ROOT / "README.md"
    path.write_text(fill_in(path.read_text(encoding="utf-8"), tables_of("\n".join(reports))), encoding="utf-8")


if __name__ == "__main__":
    main()
