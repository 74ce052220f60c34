"""Documents match the program: Python examples run, commands parse with the real parsers, files and links exist."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from test_imports import LEVELS

from gptlit.cli.compare import make_parser as compare_parser
from gptlit.cli.completion import options_of
from gptlit.cli.export import export_parser
from gptlit.cli.fit.plan import parse_fit
from gptlit.cli.ladder.command import make_parser as ladder_parser
from gptlit.cli.parser import parse
from gptlit.cli.play import play_parser
from gptlit.cli.predict.command import make_parser as predict_parser
from gptlit.cli.settings import without_option
from gptlit.cli.verbs import VERBS

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "configs/**/*.md", "tests/**/*.md", "findings/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
LONGEST_README = 250  # lines
PLACEHOLDER = re.compile(
    r"\$|(?<![\w.])(?:FILE|FOLDER|RUN|DIR|NAME|TEXT|CONFIG|my\.yaml|small\.yaml)\b|--\w+ --|--\w+$"
)
COMMAND_START = re.compile(r"(?:.* )?(?:\.venv/bin/)?gptlit (?=[a-z])|.* -m gptlit (?=[a-z])|.* gptlit (?=[a-z])")


def text_of(document: Path) -> str:
    """Return a document without its generated tables, which show wrong uses."""
    text = document.read_text(encoding="utf-8")
    return re.sub(r"<!-- table: .*?<!-- end of table -->", "", text, flags=re.DOTALL)


def shell_lines(text: str) -> list[str]:
    """Return the commands of the bash blocks, continued lines joined and comments removed."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = (part for line in lines for part in re.split(r"&&|;|\|", re.sub(r"(^|\s)#.*", "", line)))
    return [command.strip() for command in commands if command.strip()]


def inline_code(text: str) -> list[str]:
    """Return the code spans of a document outside of its code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def commands_of(text: str) -> list[str]:
    """Return every `gptlit VERB …` of a document, without the word gptlit."""
    candidates = [*shell_lines(text), *(code for code in inline_code(text) if code.startswith("gptlit "))]
    commands = (COMMAND_START.sub("", line, count=1) for line in candidates if COMMAND_START.match(line))
    return sorted({re.split(r" > | → ", command.replace("…", "").strip())[0] for command in commands})


CASES = [(document, command) for document in DOCUMENTS for command in commands_of(text_of(document))]


@cache
def options(verb: str) -> frozenset[str]:
    """Return the option strings of a verb."""
    return frozenset(name for action in options_of(verb) for name in action.option_strings)


def test_documents_are_found() -> None:
    """Guards against patterns that match nothing."""
    assert {"README.md", "configs/README.md", "tests/README.md", "findings/recipe.md", ".github/CONTRIBUTING.md"} <= {
        str(path.relative_to(ROOT)) for path in DOCUMENTS
    }
    assert len(CASES) > 40
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST_README


def test_the_python_example_trains_loads_and_samples(tmp_path: Path) -> None:
    """Code copied from the README must work."""
    (example,) = re.findall(r"```python\n(.*?)```", text_of(ROOT / "README.md"), flags=re.DOTALL)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "weights_only" not in done.stdout + done.stderr  # a note of Lightning's about its default
    assert "MARENNA:" in done.stdout
    probabilities = [float(p) for p in re.findall(r"^(0\.\d+) '", done.stdout, flags=re.MULTILINE)]
    assert len(probabilities) == 5
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) <= 1.001


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_linked_files_and_named_scripts_exist(document: Path) -> None:
    """Guards against a file that was moved."""
    text = text_of(document)
    links = [link for link in re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", text) if "://" not in link]
    named = re.findall(r"(?<![\w/.-])((?:tests|configs|findings|gptlit|\.ci|\.github)/[\w/.-]*\w)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    for path, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        missing += [test] if f"def {test}(" not in (ROOT / path).read_text(encoding="utf-8") else []
    missing += [name for name in named if not (ROOT / name).exists() and not (ROOT / f"{name}.yaml").exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_headings_name_a_heading(document: Path) -> None:
    """Guards against a heading that was renamed."""
    for link, anchor in re.findall(r"\]\(([^)#]*)#([\w-]+)\)", text_of(document)):
        target = text_of(document.parent / link if link else document)
        headings = re.findall(r"^#+ (.*)$", target, flags=re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("document", "command"), CASES, ids=[f"{path.relative_to(ROOT)}: {command}" for path, command in CASES]
)
def test_commands_name_verbs_options_and_configs_that_exist(
    document: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a verb, an option, a value or a configuration that was renamed."""
    verb, *words = shlex.split(command)
    if verb in ("VERB", "ARGUMENTS"):
        return
    assert verb in VERBS
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in ("--help", "--print_config"):
            assert name in options(verb), f"gptlit {verb} has no {name}"
    if PLACEHOLDER.search(command) or "--print_config" in words:
        return
    monkeypatch.chdir(ROOT)  # configs/base.yaml is a path
    if verb == "fit":
        parse_fit(without_option(words, "--ckpt_path"))  # the checkpoint of an example does not exist
    elif verb in ("predict", "export"):
        parse(predict_parser() if verb == "predict" else export_parser(), words)
    elif verb == "ladder":
        parse_fit(ladder_parser().parse_known_args(words)[1])
    elif verb in ("compare", "play"):
        (compare_parser() if verb == "compare" else play_parser()).parse_args(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_after_a_fit_on_another_text_read_its_run_folder(document: Path) -> None:
    """Which is named after the configuration and the text."""
    for block in re.findall(r"```bash\n(.*?)```", text_of(document), flags=re.DOTALL):
        made = re.findall(r"gptlit fit --config (\S+) --data\.corpus (\S+)", block)
        read = set(re.findall(r"--ckpt_path (checkpoints/\S+)", block))
        assert not made or read <= {f"checkpoints/{config}-{Path(text).stem}" for config, text in made}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_with_dots_exist(document: Path) -> None:
    """`--model.gpt.n_layer` and the like belong to fit, wherever a document mentions them."""
    mentioned = re.findall(
        r"(?<![\w-])(--(?:model|data|trainer|average|sample_text|pictures)\.[\w.]+)", text_of(document)
    )
    assert sorted(set(mentioned) - options("fit")) == []


def test_the_map_of_packages_is_that_of_the_import_test() -> None:
    """CONTRIBUTING.md names the levels that tests/test_imports.py checks, and the README every package."""
    rows = re.findall(r"^\| \d+ \| (.*?) \|", text_of(ROOT / ".github/CONTRIBUTING.md"), flags=re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == LEVELS
    code_map = text_of(ROOT / "README.md").split("## Code map")[1].split("\n## ")[0]
    assert set(re.findall(r"`gptlit/(\w+)`", code_map)) == set().union(*LEVELS) - {"errors", "version"}


def test_the_table_of_sampling_options_is_that_of_predict() -> None:
    """Every option that chooses the text stands in the README's table, and no other."""
    section = text_of(ROOT / "README.md").split("## Sampling")[1].split("\n## ")[0]
    mentioned = set(re.findall(r"^\| (.*?) \|", section, flags=re.MULTILINE))
    named = {name for cell in mentioned for name in re.findall(r"--\w+", cell)}
    assert named <= options("predict")
    elsewhere = {"--ckpt_path", "--config", "--help", "--repeat_prompt", "--print_config"}
    ours = {name for name in options("predict") if "." not in name and name.startswith("--")}
    assert ours - elsewhere == named


def test_generated_tables_are_filled_in_and_others_are_kept() -> None:
    """A table without rows in the report stays; one without a place gets a section; repeated rows appear once."""
    from readme_tables import fill_in, parse_report

    document = (
        "# Tests\n\n<!-- table: A -->\nold\n<!-- end of table -->\n<!-- table: B -->\nold\n<!-- end of table -->\n"
    )
    row = "| file | verb | answer |\n| --- | --- | --- |\n| x \\| y | fit | no |\n| x \\| y | test | no |\n"
    filled = fill_in(document, parse_report(f"## A\n\n{row}\n## formats\n\n| a |\n| --- |\n| 1 |\n| 1 |\n"))
    assert "<!-- table: A -->\n\n| file | verb | answer |" in filled
    assert "| x \\| y | fit, test | no |" in filled
    assert "<!-- table: B -->\nold\n<!-- end of table -->" in filled
    assert "## Formats\n\n<!-- table: formats -->\n\n| a |\n| --- |\n| 1 |\n\n<!-- end" in filled


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_take_the_options_that_are_given_to_them(document: Path) -> None:
    """`python tests/….py --option`: the option must be in the source of the script or of what it imports."""
    text = text_of(document)
    for line in [*shell_lines(text), *inline_code(text)]:
        found = re.search(r"python (tests/[\w/]+\.py)(.*)", line)
        if found is None:
            continue
        script = ROOT / found[1]
        sources = script.read_text(encoding="utf-8") + (ROOT / "tests/benchmarks/measuring.py").read_text(
            encoding="utf-8"
        )
        for name in re.findall(r"(?<!\S)(--\w+)", found[2]):
            assert f'"{name}"' in sources, f"{found[1]} has no {name}"
