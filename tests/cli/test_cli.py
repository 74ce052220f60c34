"""The console script, run in its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gptlit.cli.fit.build import instantiate
from gptlit.cli.fit.plan import parse_fit
from gptlit.cli.packaged import packaged_configs
from gptlit.cli.predict.command import open_output

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
    """Run the console script; fails with its output if the exit code differs."""
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
    """Config, both checkpoints, curves and samples; no other files."""
    names = {path.name for path in (run / "checkpoints" / "small").iterdir()}
    assert {"config.yaml", "best.ckpt", "last.ckpt", "metrics.csv", "samples"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".partial") for name in names)
    assert {path.name for path in run.iterdir()} == {"checkpoints", "small.yaml"}


def test_validate_gives_the_loss_that_the_fit_reported(run: Path) -> None:
    """Guards against a wrong best.ckpt, and against a difference between the two computations of the loss."""
    printed = dict(
        line.split() for line in gptlit("validate", "--ckpt_path", "checkpoints/small", cwd=run).stdout.splitlines()
    )
    rows = (run / "checkpoints" / "small" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/loss")
    losses = [float(cells[column]) for row in rows[1:] if (cells := row.split(","))[column]]
    assert len(losses) == 4  # the initial weights too
    assert float(printed["val/loss"]) == pytest.approx(min(losses), abs=1e-5)
    assert float(printed["val/bpc"]) == pytest.approx(min(losses) / 0.693147, rel=1e-4)


def test_predict_twice_gives_the_same_text_on_stdout(run: Path) -> None:
    """Only text on stdout, starting with the prompt; equal for equal seeds, different for different seeds."""
    arguments = ["predict", "--ckpt_path", "checkpoints/small", "--prompt", "MARENNA:", "--max_new_tokens", "40"]
    first, second = (gptlit(*arguments, "--seed", "1", cwd=run).stdout for _ in range(2))
    assert first == second
    assert first.startswith("MARENNA:")
    assert len(first) == len("MARENNA:") + 40 + 1
    assert gptlit(*arguments, "--seed", "2", cwd=run).stdout != first


@pytest.mark.slow
def test_a_finished_run_resumes_in_its_folder_with_a_larger_max_steps(run: Path) -> None:
    """One flag: config, corpus and folder come from the checkpoint."""
    gptlit("fit", "--config", "small.yaml", "--run_dir", "again", cwd=run)
    done = gptlit("fit", "--ckpt_path", "again", "--trainer.max_steps", "35", cwd=run)
    assert "max_steps 30 -> 35" in done.stderr
    assert (run / "again" / "samples" / "step-000035.txt").is_file()


def test_prompts_from_stdin_a_file_and_jsonl_give_the_same_text(run: Path) -> None:
    """JSONL output holds one log-probability per token."""
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
def test_a_full_disk_for_stdout_is_one_line(run: Path) -> None:
    """Guards against a traceback, and against a second error at interpreter exit."""
    command = [SCRIPT, "predict", "--ckpt_path", "checkpoints/small", "--prompt", "OSWIN:", "--max_new_tokens", "5"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, cwd=run, stdout=full, stderr=subprocess.PIPE, text=True, timeout=240)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "stdout cannot be written: No space left on device" in done.stderr


def test_an_empty_prompt_starts_with_a_newline_and_is_reported(run: Path) -> None:
    """Guards against a crash, and against a silent default."""
    texts = set()
    for prompt in (("--prompt", ""), ()):
        done = gptlit("predict", "--ckpt_path", "checkpoints/small", *prompt, "--max_new_tokens", "5", cwd=run)
        assert "begins with a newline" in done.stderr
        assert len(done.stdout) == 6
        texts.add(done.stdout)
    assert len(texts) == 1


@pytest.mark.slow
def test_two_devices_share_the_prompts_of_stdin_and_keep_their_order(run: Path) -> None:
    """The second process starts after stdin was read and the output file was created."""
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


def test_predict_works_in_bfloat16(run: Path) -> None:
    """With a lower precision the Trainer copies each field of a batch."""
    flags = ("--max_new_tokens", "5", "--prompt", "A", "--trainer.precision", "bf16-true")
    assert len(gptlit("predict", "--ckpt_path", "checkpoints/small", *flags, cwd=run).stdout) == 7


@pytest.mark.parametrize("written", ["", "To be"])
def test_an_empty_output_file_is_removed_after_a_failure(tmp_path: Path, written: str) -> None:
    """Otherwise the next attempt would refuse to overwrite it. A file with text stays."""
    path = tmp_path / "sample.txt"

    def fail_after_writing() -> None:
        with open_output(str(path)) as file:
            file.write(written)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_after_writing()
    assert path.exists() == bool(written)


@pytest.mark.slow
def test_base_trains_on_the_packaged_play_without_a_network_and_reports_it(tmp_path: Path) -> None:
    """`--config base` from any folder, with every proxy set to a closed port: a notice, and exit code 0."""
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
def test_version_and_help_do_not_import_torch(flag: str, tmp_path: Path) -> None:
    """Importing torch takes seconds."""
    probe = "import sys\nfrom gptlit.__main__ import main\nmain()\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", probe, flag], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gptlit" in done.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(packaged_configs())))
def test_every_config_file_is_valid(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every YAML in configs/ parses, builds its model, optimizer and data settings; overlays on top of base."""
    config = yaml.safe_load(path.read_text())
    if teacher := config.get("model", {}).get("teachers"):
        (tmp_path / teacher).parent.mkdir()
        (tmp_path / teacher).symlink_to(request.getfixturevalue("run") / "checkpoints" / "small")
    complete = "max_steps" in config.get("trainer", {}) and "at_scale" not in path.name
    base = [] if complete else ["--config", str(packaged_configs() / "base.yaml")]
    plan = parse_fit([*base, "--config", str(path)])
    objects = instantiate(plan)
    assert objects.data.block_size == plan.settings["model"]["gpt"]["block_size"]
    assert plan.settings["trainer"]["max_steps"] > 0
