"""The command as a person types it: the console script itself, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gptlit.cli.fit.build import instantiate
from gptlit.cli.fit.plan import parse_fit
from gptlit.cli.predict.command import open_output
from gptlit.cli.settings import packaged_configs

SCRIPT = Path(sys.executable).with_name("gptlit")
CONFIGS = sorted(packaged_configs().rglob("*.yaml"))
SMALL = """
seed_everything: 7
model:
  gpt: {block_size: 16, n_layer: 2, n_head: 2, n_embd: 32, dropout: 0.1}
data: {corpus: sample, batch_size: 8}
trainer: {max_steps: 30, val_check_interval: 10, log_every_n_steps: 5, accelerator: cpu}
"""


def gptlit(
    *arguments: str, cwd: Path, code: int = 0, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess:
    """Runs the console script; fails with its messages when the exit code is another one."""
    done = subprocess.run(
        [SCRIPT, *arguments],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=240,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `small.yaml` and a finished run of 30 steps, `checkpoints/small`."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "small.yaml").write_text(SMALL)
    done = gptlit("fit", "--config", "small.yaml", cwd=folder)
    assert done.stdout == ""  # text goes to stdout, and a fit has none
    assert "best val loss" in done.stderr
    return folder


def test_a_fit_leaves_a_run_folder_with_everything_in_it(run: Path) -> None:
    """Config, both checkpoints, curves and samples; nothing beside it."""
    names = {path.name for path in (run / "checkpoints" / "small").iterdir()}
    assert {"config.yaml", "best.ckpt", "last.ckpt", "metrics.csv", "samples"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".partial") for name in names)
    assert {path.name for path in run.iterdir()} == {"checkpoints", "small.yaml"}


def test_validate_gives_the_loss_that_the_fit_reported(run: Path) -> None:
    """Guards against a best.ckpt that is not the best, and against two ways of counting."""
    printed = dict(
        line.split() for line in gptlit("validate", "--ckpt_path", "checkpoints/small", cwd=run).stdout.splitlines()
    )
    rows = (run / "checkpoints" / "small" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/loss")
    losses = [float(cells[column]) for row in rows[1:] if (cells := row.split(","))[column]]
    assert len(losses) == 3
    assert float(printed["val/loss"]) == pytest.approx(min(losses), abs=1e-5)
    assert float(printed["val/bpc"]) == pytest.approx(min(losses) / 0.693147, rel=1e-4)


def test_predict_twice_gives_the_same_text_on_stdout(run: Path) -> None:
    """Only text on stdout, the prompt first, the same for the same seed, another for another."""
    arguments = ["predict", "--ckpt_path", "checkpoints/small", "--prompt", "MARENNA:", "--max_new_tokens", "40"]
    first, second = (gptlit(*arguments, "--seed", "1", cwd=run).stdout for _ in range(2))
    assert first == second
    assert first.startswith("MARENNA:")
    assert len(first) == len("MARENNA:") + 40 + 1
    assert gptlit(*arguments, "--seed", "2", cwd=run).stdout != first


def test_resuming_a_finished_run_with_more_steps_goes_on_in_its_folder(run: Path) -> None:
    """One flag: config, corpus and folder come from the checkpoint."""
    gptlit("fit", "--config", "small.yaml", "--run_dir", "again", cwd=run)
    done = gptlit("fit", "--ckpt_path", "again", "--trainer.max_steps", "35", cwd=run)
    assert "max_steps 30 -> 35" in done.stderr
    assert (run / "again" / "samples" / "step-000035.txt").is_file()


def test_prompts_from_stdin_file_and_lines_meet_in_the_output(run: Path) -> None:
    """Every way in gives the same continuation; JSONL holds one log-probability for each token."""
    (run / "prompt.txt").write_text("OSWIN:\n")
    common = ["predict", "--ckpt_path", "checkpoints/small", "--max_new_tokens", "12"]
    direct = gptlit(*common, "--prompt", "OSWIN:\n", cwd=run).stdout
    assert gptlit(*common, "--prompt", "-", cwd=run, stdin="OSWIN:\n").stdout == direct
    assert gptlit(*common, "--prompt", "FILE:prompt.txt", cwd=run).stdout == direct
    (run / "prompts.jsonl").write_text('{"prompt": "OSWIN:\\n"}\n{"prompt": "ILSE:\\n"}\n')
    gptlit(*common, "--prompts", "prompts.jsonl", "--output", "out.jsonl", cwd=run)
    rows = [yaml.safe_load(line) for line in (run / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["OSWIN:\n", "ILSE:\n"]
    assert rows[0]["prompt"] + rows[0]["text"] + "\n" == direct
    assert [len(row["log_probabilities"]) for row in rows] == [12, 12]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_the_text_costs_one_line(run: Path) -> None:
    """Guards against a traceback, and against a second failure when Python ends."""
    command = [SCRIPT, "predict", "--ckpt_path", "checkpoints/small", "--prompt", "OSWIN:", "--max_new_tokens", "5"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, cwd=run, stdout=full, stderr=subprocess.PIPE, text=True, timeout=240)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "stdout cannot be written: No space left on device" in done.stderr


def test_an_empty_prompt_begins_with_a_new_line_and_says_so(run: Path) -> None:
    """Guards against a crash, and against silence."""
    drawn = set()
    for prompt in (("--prompt", ""), ()):
        done = gptlit("predict", "--ckpt_path", "checkpoints/small", *prompt, "--max_new_tokens", "5", cwd=run)
        assert "begins with a newline" in done.stderr
        assert len(done.stdout) == 6
        drawn.add(done.stdout)
    assert len(drawn) == 1


@pytest.mark.slow
def test_two_devices_share_the_prompts_of_stdin_and_keep_their_order(run: Path) -> None:
    """The second process finds stdin read already, and the output file there already."""
    lines = "".join(f'{{"prompt": "{"ABCDEFG"[i]}"}}\n' for i in range(7))
    common = ["predict", "--ckpt_path", "checkpoints/small", "--max_new_tokens", "12", "--prompts", "-"]
    gptlit(*common, "--output", "one.jsonl", cwd=run, stdin=lines)
    two = ("--output", "two.jsonl", "--trainer.accelerator", "cpu", "--trainer.devices", "2")
    gptlit(*common, *two, cwd=run, stdin=lines)
    one, both = (
        [(row["prompt"], row["text"]) for row in map(json.loads, (run / name).read_text().splitlines())]
        for name in ("one.jsonl", "two.jsonl")
    )
    assert "".join(prompt for prompt, _ in both) == "ABCDEFG"
    assert both == one


def test_a_coarser_precision_draws_too(run: Path) -> None:
    """The Trainer copies its batches then, field by field."""
    flags = ("--max_new_tokens", "5", "--prompt", "A", "--trainer.precision", "bf16-true")
    assert len(gptlit("predict", "--ckpt_path", "checkpoints/small", *flags, cwd=run).stdout) == 7


@pytest.mark.parametrize("written", ["", "To be"])
def test_only_a_file_in_which_something_was_written_stays_after_a_failure(tmp_path: Path, written: str) -> None:
    """An empty one would stand in the way of the next attempt, which refuses to overwrite."""
    path = tmp_path / "drawn.txt"

    def fail_after_writing() -> None:
        with open_output(str(path)) as file:
            file.write(written)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_after_writing()
    assert path.exists() == bool(written)


def test_base_trains_on_the_packaged_play_without_a_network_and_says_so(tmp_path: Path) -> None:
    """`--config base` from any folder, with every proxy pointing at a closed port: loud, and exit code 0."""
    closed = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    settings = ["--trainer.max_steps", "2", "--model.gpt.n_layer", "1", "--sample_text.max_new_tokens", "0"]
    place = {**closed, "XDG_CACHE_HOME": str(tmp_path / "cache"), "NO_PROXY": "", "no_proxy": ""}
    done = gptlit("fit", "--config", "base", *settings, cwd=tmp_path, **place)
    assert "play" in done.stderr
    assert (tmp_path / "checkpoints" / "base" / "last.ckpt").is_file()
    done = gptlit("fit", "--config", "nanogpt_cpu", *settings, cwd=tmp_path, code=2, **place)
    (line,) = done.stderr.strip().splitlines()
    assert "data.corpus" in line
    assert not (tmp_path / "checkpoints" / "nanogpt_cpu").exists()


def test_a_run_folder_is_never_overwritten(run: Path) -> None:
    """A second `small` becomes small-2."""
    before = (run / "checkpoints" / "small" / "last.ckpt").stat().st_mtime_ns
    done = gptlit("fit", "--config", "small.yaml", "--trainer.max_steps", "1", cwd=run)
    assert "checkpoints/small-2" in done.stderr
    assert (run / "checkpoints" / "small" / "last.ckpt").stat().st_mtime_ns == before


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_version_and_help_answer_without_torch(flag: str, tmp_path: Path) -> None:
    """Importing torch takes seconds: the two quickest questions must not pay for it."""
    probe = "import sys\nfrom gptlit.__main__ import main\nmain()\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", probe, flag], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gptlit" in done.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(packaged_configs())))
def test_every_config_file_is_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every YAML in configs/ parses, builds its model, optimizer and data settings; overlays on top of base."""
    monkeypatch.chdir(tmp_path)
    whole = "max_steps" in yaml.safe_load(path.read_text()).get("trainer", {}) and "at_scale" not in path.name
    base = [] if whole else ["--config", str(packaged_configs() / "base.yaml")]
    plan = parse_fit([*base, "--config", str(path)])
    instantiate(plan)
    assert plan.settings["model"]["gpt"]["block_size"] == plan.settings["data"]["block_size"]
    assert plan.settings["trainer"]["max_steps"] > 0
