"""`--threads`: a part of the configuration, measured once and kept."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from command import digest, extra_callbacks, gptlit, load, start, write_config
from lightning.pytorch.callbacks import LambdaCallback

from gptlit.cli.fit import threads
from gptlit.cli.fit.threads import Threads, choose_threads
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.training import threads as measurement

LEFT_OUT = (
    "threads 1 of the checkpoint is left out: it belongs to another number of processes; "
    "--threads sets the number of each process\n"
)
TWO = ("--trainer.devices", 2, "--trainer.strategy", "ddp")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two threads are available; every new run is measured, and the measurement answers as this list says."""
    answers: list[int] = []
    measure = threads.fastest_threads
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "measuring_pays", lambda *_: True)
    monkeypatch.setattr(threads, "fastest_threads", lambda *parts: [measure(*parts), answers.pop()][1])
    torch.set_num_threads(2)
    return answers


def stored(run: Path) -> Any:
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["threads"]


def fit(*arguments: Any) -> tuple[str, set[int]]:
    """Return what a fit says, and the numbers of threads that its steps ran with."""
    seen: set[int] = set()
    with extra_callbacks(LambdaCallback(on_train_batch_end=lambda *_: seen.add(torch.get_num_threads()))):
        answer = gptlit("fit", *arguments)
    assert answer.code == 0, answer.err
    return answer.err, seen


@pytest.mark.parametrize("number", [1, 2])
def test_a_measured_run_equals_one_with_the_number_given(tmp_path: Path, measured: list[int], number: int) -> None:
    """Bit by bit: the measurement leaves no trace. Each resumed run uses the stored number."""
    config = write_config(tmp_path, trainer__max_steps=6)
    measured.append(number)
    err, seen = fit("--config", config, "--run_dir", tmp_path / "a")
    assert f"threads     {number} (measured)\n" in err
    assert (seen, stored(tmp_path / "a"), measured) == ({number}, number, [])
    assert torch.get_num_threads() == 2  # for the next run of this process
    err, seen = fit("--config", config, "--run_dir", tmp_path / "b", "--threads", number)
    assert f"threads     {number}\n" in err
    assert (seen, stored(tmp_path / "b")) == ({number}, number)
    assert digest(tmp_path / "a" / "last.ckpt") == digest(tmp_path / "b" / "last.ckpt")
    err, seen = fit("--ckpt_path", tmp_path / "a", "--trainer.max_steps", 8)
    assert f"threads     {number}\n" in err
    assert (seen, stored(tmp_path / "a")) == ({number}, number)
    assert "changed: threads" not in err


def test_the_measured_network_is_the_one_that_is_trained(
    tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `init_from` it has the size of the model to start from, not that of the settings."""
    config = write_config(tmp_path, trainer__max_steps=2)
    fit("--config", config, "--run_dir", tmp_path / "wide", "--model.gpt.n_embd", 24, "--threads", 2)
    seen: list[GPTConfig] = []
    monkeypatch.setattr(measurement, "GPT", lambda config: [seen.append(config), GPT(config)][1])
    measured.append(2)
    fit("--config", config, "--run_dir", tmp_path / "run", "--model.init_from", tmp_path / "wide")
    trained = load(tmp_path / "run" / "last.ckpt")["hyper_parameters"]["gpt"]
    assert [asdict(config) for config in seen] == [trained]
    assert (trained["n_embd"], trained["vocab_size"]) == (24, 57)


def test_another_number_is_announced_and_kept(tmp_path: Path, measured: list[int]) -> None:
    measured.append(2)
    fit("--config", write_config(tmp_path, trainer__max_steps=2), "--run_dir", tmp_path / "run")
    err, seen = fit("--ckpt_path", tmp_path / "run", "--trainer.max_steps", 4, "--threads", 1)
    assert "changed: threads 2 -> 1\n" in err
    assert (seen, stored(tmp_path / "run")) == ({1}, 1)


def test_nothing_is_measured_where_the_environment_says_it(
    tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OMP_NUM_THREADS, a single core, or a short run."""
    config = write_config(tmp_path, trainer__max_steps=2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    err, seen = fit("--config", config, "--run_dir", tmp_path / "a")
    assert "threads     2\n" in err
    assert (seen, stored(tmp_path / "a")) == ({2}, 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    fit("--config", config, "--run_dir", tmp_path / "b")
    assert stored(tmp_path / "b") == 1
    torch.set_num_threads(2)
    monkeypatch.undo()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "fastest_threads", lambda *_: pytest.fail("measured a run of two steps"))
    gptlit("fit", "--config", config, "--run_dir", tmp_path / "c")
    assert stored(tmp_path / "c") == 2


@pytest.mark.parametrize("number", [0, -2])
def test_fewer_than_one_thread_is_refused(tmp_path: Path, number: int) -> None:
    answer = gptlit("fit", "--config", write_config(tmp_path), f"--threads={number}")
    assert answer.code == 2
    assert answer.err == f"gptlit: --threads is {number}: it must be 1 to 1,024, or null\n"


def choice(
    given: int | None, world_size: int = 1, device: str = "cpu", changes: tuple[str, ...] = (), flag: bool = False
) -> tuple[Threads, Any]:
    """What is chosen for a run, and what its configuration holds."""
    start = object() if changes else None
    plan: Any = SimpleNamespace(
        settings={"threads": given}, start=start, changes=changes, flags={"threads"} if flag else set()
    )
    strategy = SimpleNamespace(root_device=torch.device(device))
    trainer: Any = SimpleNamespace(world_size=world_size, strategy=strategy, max_steps=10)
    model: Any = SimpleNamespace(run_config="threads: null\nother: 1\n")
    chosen = choose_threads(plan, model, None, trainer)  # type: ignore[arg-type]
    assert yaml.safe_load(model.run_config) == {"threads": chosen.number, "other": 1}
    return chosen, model


@pytest.mark.parametrize(("world_size", "device"), [(2, "cpu"), (1, "cuda"), (2, "cuda"), (1, "meta")])
def test_other_runs_use_a_given_number_only(measured: list[int], world_size: int, device: str) -> None:
    """Several processes or a GPU: nothing is measured."""
    assert choice(None, world_size, device)[0] == Threads(None)
    assert choice(3, world_size, device)[0] == Threads(3)


def test_a_stored_number_does_not_outlive_the_number_of_processes(measured: list[int]) -> None:
    """Two threads in each of two processes on two cores would wait for each other."""
    assert choice(2, 2, changes=("trainer.devices",))[0] == Threads(None, left_out=2)
    assert choice(2, 2, changes=("trainer.devices",), flag=True)[0] == Threads(2)
    assert choice(2, 2, changes=("trainer.devices", "threads"))[0] == Threads(2), "given in a configuration"
    assert choice(2, 2, changes=("trainer.max_steps",))[0] == Threads(2)
    assert choice(2, 1, changes=("trainer.devices",))[0] == Threads(2)


@pytest.mark.slow
def test_a_number_that_is_left_out_is_announced_with_the_reason(tmp_path: Path) -> None:
    """No change of a setting is reported that the user did not make."""
    config, run = write_config(tmp_path, trainer__max_steps=1, trainer__limit_val_batches=0), tmp_path / "run"
    fit("--config", config, "--run_dir", run, "--threads", 1)
    for flags, said in (((), 1), (("--threads", 2), 0)):
        process = start("fit", "--ckpt_path", run, "--trainer.max_steps", 3 - said, *flags, *TWO, cwd=tmp_path)
        _, err = process.communicate()
        assert process.returncode == 0, err
        assert err.count(LEFT_OUT) == said
        assert ("changed: threads" in err) == bool(flags)
        assert "changed: trainer.devices 1 -> 2\n" in err or not said
        assert stored(run) == (2 if flags else None)


def test_an_old_run_resumes_as_it_did(measured: list[int]) -> None:
    """Without a stored number nothing is measured."""
    assert choice(None, changes=("trainer.max_steps",))[0] == Threads(None)


@pytest.mark.slow
def test_every_process_of_a_run_uses_the_number(tmp_path: Path) -> None:
    """Lightning sets another one when it starts the processes."""
    (tmp_path / "noting.py").write_text(
        "import lightning.pytorch as pl\nimport torch\n"
        "class Note(pl.Callback):\n    def on_train_end(self, trainer, module):\n"
        "        open(f'threads-{trainer.global_rank}', 'w').write(str(torch.get_num_threads()))\n"
    )
    config = write_config(tmp_path, trainer__max_steps=1, trainer__limit_val_batches=0)
    flags = ("--threads", 1, "--trainer.callbacks", "noting.Note", "--run_dir", tmp_path / "run", *TWO)
    process = start("fit", "--config", config, *flags, env={"OMP_NUM_THREADS": "3"}, cwd=tmp_path)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
