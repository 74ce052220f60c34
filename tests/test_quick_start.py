"""The README's commands work as printed, in their order, in a fresh shell, environment and home folder."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
INSTALL, TEST, USE, USAGE = BLOCKS[:4]
SHORT = " --trainer.max_steps {steps} --trainer.val_check_interval 10 --sample_text.max_new_tokens 20"
CHECKOUT = (".ci", ".github", "checkpoints", "configs", "findings", "gptlit", "tests")
FILES = ("LICENSE", "README.md", "pyproject.toml")


def lines_of(block: str) -> list[str]:
    """Return the commands of a block without comments."""
    return [line for line in (re.sub(r"\s+#.*", "", line) for line in block.splitlines()) if line]


def shortened(line: str, steps: int) -> str:
    """Return a command with few steps where it trains, and with a time limit where it would serve forever.

    The lecture's configurations need a network, which the test does not.
    """
    if line.startswith("tensorboard"):
        return f"{{ timeout --signal=INT 40 {line} --port 0 || true; }}"
    if re.search(r"gptlit (fit|ladder)\b", line):
        line += SHORT.format(steps=steps)
    return line + (" --rungs 1,2 --data.corpus sample" if "gptlit ladder" in line else "")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(shutil.which("bash") is None, reason="the commands are for bash")
def test_the_quick_start_and_the_usage_run_as_printed(tmp_path: Path) -> None:
    """Guards against commands that are not found, names that do not exist and runs that have nothing left to do."""
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    for folder in (checkout, home, tmp_path / "tmp"):
        folder.mkdir()
    for name in CHECKOUT:
        skipped = shutil.ignore_patterns("__pycache__", *(["base*"] if name == "checkpoints" else []))
        shutil.copytree(ROOT / name, checkout / name, ignore=skipped)
    for name in FILES:
        shutil.copy(ROOT / name, checkout / name)
    commands = [shortened(line, 20) for block in (INSTALL, USE, USAGE) for line in lines_of(block)]
    extra = next(index for index, line in enumerate(commands) if "gptlit export" in line)
    commands.insert(extra, TEST.split("&&")[0].strip())  # the export needs the extra that the tests install
    commands = [shortened(line, 40) if "fit --ckpt_path" in line else line for line in commands]
    script = "set -x\n" + "".join(f"{command} || exit\n" for command in commands)  # set -e passes over a && b
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or "proxy" in name.lower()}
    settings_of_pip = Path.home() / ".config/pip/pip.conf"
    if settings_of_pip.is_file():
        kept["PIP_CONFIG_FILE"] = str(settings_of_pip)
    paths = [path for path in os.environ["PATH"].split(os.pathsep) if not (Path(path).parent / "pyvenv.cfg").is_file()]
    environment = {"PATH": os.pathsep.join(paths), "HOME": str(home), "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8", **kept}
    environment["TMPDIR"] = str(tmp_path / "tmp")
    done = subprocess.run(["bash", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True)
    (tmp_path / "transcript.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "nothing is left to do" not in done.stderr
    assert re.search(r"TensorBoard .* at http", done.stderr)
    assert "ROMEO:" in done.stdout
    assert "val/loss" in done.stdout
    assert (checkout / "checkpoints/base/best.ckpt").is_file()
    assert (checkout / "my-gpt/config.json").is_file()
    assert (checkout / "checkpoints/base/play.html").is_file()
    assert (home / ".gptlit.bash").read_text(encoding="utf-8").count("complete") > 0
