"""Parsing of output by the benchmarks; times themselves are never tested."""

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _import_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_evaluation_does_not_count_as_training_of_the_peer() -> None:
    """The line of a step of nanoGPT includes the evaluation before it: guards against a peer that looks too slow."""
    from peer import read_output

    lines = ["step 0: train loss 4.2, val loss 4.3", "iter 0: loss 4.2, time 900.00ms, mfu -100.00%"]
    lines += [f"iter {step}: loss 3.0, time 20.00ms, mfu 1.00%" for step in (1, 2, 3)]
    lines += ["step 4: train loss 2.9, val loss 3.1", "saving checkpoint to out"]
    lines += ["iter 4: loss 2.9, time 520.00ms, mfu 1.00%"]
    run = read_output("\n".join(lines))
    assert sum(run.step_seconds.values()) == pytest.approx(5 * 0.020)
    assert run.other_seconds == pytest.approx(0.88 + 0.5)
    assert run.val_losses == {0: 4.3, 4: 3.1}


def test_time_to_a_loss_ends_with_the_first_validation_below_it() -> None:
    """Guards against a time that omits the steps between two logs, or counts those after the target."""
    from measuring import Finished
    from runs import read

    def row(step: int, milliseconds: float, loss: str = "") -> dict[str, str]:
        speed = {"perf/step_milliseconds": str(milliseconds), "perf/characters_per_second": "7"}
        return {"step": str(step), "val/loss": loss, **speed}

    rows = [row(10, 20.0), row(20, 40.0, "2.0"), row(30, 10.0, "1.8"), row(40, 10.0, "1.7")]
    done = Finished(9.0, None, 0.0, 0.0, 1, "", "compiled in 13 s\n")
    run = read(rows, 1.85, done)
    assert (run.met, run.loss, run.steps, run.best, run.compiling) == (True, 1.8, 30, 1.7, 13.0)
    assert run.seconds == pytest.approx(0.2 + 0.4 + 0.1)
    assert run.training == pytest.approx(0.8)
    missed = read(rows, 1.0, done)
    assert (missed.met, missed.steps, missed.loss) == (False, 40, 1.7)


def test_a_process_that_reaches_its_limit_keeps_its_output() -> None:
    """Guards against losing the output of a long run that exceeds its limit."""
    import sys

    from measuring import run_process

    program = "import time; print('step 1', flush=True); time.sleep(600)"
    assert run_process([sys.executable, "-c", program], limit=2.0).out == "step 1\n"
    with pytest.raises(RuntimeError, match="failed"):
        run_process([sys.executable, "-c", "raise SystemExit(3)"], limit=60.0)


def test_the_texts_of_a_benchmark_are_without_markup(tmp_path: Path) -> None:
    """Guards against tags, scripts and keys that count as text of a language."""
    from bench_bpe import read

    (tmp_path / "a.html").write_text(
        "<head><title>x</title></head><body class='y'>\n <p>a &amp; b</p>\n\n<p>c</p></body>"
    )
    (tmp_path / "a.json").write_text('[{"id": 1, "text": "a", "verses": [{"text": "b", "name": "x"}]}]')
    assert read(tmp_path / "a.html") == "a & b\nc\n"
    assert read(tmp_path / "a.json") == "a\nb\n"


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_at_a_small_size(tmp_path: Path, tinyshakespeare: Path) -> None:
    """Guards against errors that would only show when a GPU is available; without nanoGPT."""
    import json
    import sys

    from measuring import run_process

    command: list[Any] = [sys.executable, BENCHMARKS / "bench_gpu.py", "--small", "--out", tmp_path]
    run_process([*command, "--text", tinyshakespeare])
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert not [title for title, result in found.items() if isinstance(result, dict) and "failed" in result]
    assert [run["config"] for run in found["Whole runs"]] == ["scaled", "best"]


def test_differences_of_recipes_are_paired_by_seed() -> None:
    """Guards against the spread of seeds in a difference that all seeds agree on."""
    from bench_recipe import Result, rows_of

    losses = {"": {1337: 1.5, 1338: 1.6}, "--a 1": {1337: 1.49, 1338: 1.59}, "--b 2": {1338: 1.7}, "--c 3": {}}
    results = {
        change: {seed: Result(1620, loss, loss - 0.1, 1.25, 60.0) for seed, loss in by_seed.items()}
        for change, by_seed in losses.items()
    }
    rows = rows_of(results)
    assert [row[2] for row in rows] == ["1.5500 ± 0.0707", "1.5400 ± 0.0707", "1.7000", "failed"]
    assert [row[3] for row in rows] == ["", "-0.0100 ± 0.0000", "+0.1000", "failed"]
    assert rows[1] == ("`--a 1`", "1,620", "1.5400 ± 0.0707", "-0.0100 ± 0.0000", "1.4400 ± 0.0707", "1.250", "60")


def test_a_trial_is_resumed_and_never_mixed_up_with_another(tmp_path: Path) -> None:
    """Guards against results of other settings under the name of a trial."""
    from bench_recipe import command_of, make_trials, refuse_own_options

    changes = ["", "--model.gpt.n_head 2", "--model.gpt.n_head=2", "--model.gpt.n_head 2"]
    (tmp_path / "base.yaml").write_text("seed_everything: 1")
    (tmp_path / "fast.yaml").write_text("seed_everything: 2")
    trials = [
        trial
        for config, flags in (("base", []), ("base", ["--x", "1"]), ("fast", []))
        for trial in make_trials(tmp_path, [tmp_path / f"{config}.yaml"], flags, changes, seeds=2)
    ]
    assert len({trial.folder for trial in trials}) == len(trials) == 18
    assert [trial.seed for trial in trials[:6]] == [1337] * 3 + [1338] * 3
    trial = trials[1]
    fresh = [str(part) for part in command_of(trial, "base", ["--x", "1"])[3:]]
    settings = ["--x", "1", "--model.gpt.n_head", "2", "--seed_everything", "1337"]
    assert fresh == ["fit", "--config", "base", *settings, "--run_dir", str(trial.folder)]
    trial.folder.mkdir()
    (trial.folder / "config.yaml").touch()
    assert [str(part) for part in command_of(trial, "base", ["--x", "1"])[3:]] == fresh
    assert not trial.folder.exists(), "a run would get another name"
    trial.folder.mkdir()
    (trial.folder / "last.ckpt").touch()
    assert [str(part) for part in command_of(trial, "base", [])[3:]] == ["fit", "--ckpt_path", str(trial.folder)]
    refuse_own_options(changes)
    with pytest.raises(SystemExit, match="--seed_everything belongs to each run"):
        refuse_own_options(["--model.gpt.n_head 2 --seed_everything=5"])
