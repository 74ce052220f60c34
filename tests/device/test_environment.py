"""What a run leaves in the environment of its process, on which later runs and programs depend."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import At, extra_callbacks, gptlit, write_config
from test_devices import finish

from gptlit.device.processes import LAUNCH_VARIABLES

ONE = ("--trainer.strategy", "ddp", "--trainer.accelerator", "cpu")
SCRIPT = """
import os
import sys

import lightning.pytorch as pl

from gptlit.cli import run

class Fail(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank == 0:
            raise RuntimeError("built in")

if __name__ == "__main__":
    config, fault = sys.argv[1:]
    before = dict(os.environ)
    flags = ["--config", config, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    for name in ("a", "b"):
        try:
            code = run("fit", [*flags, "--run_dir", name], extra_callbacks=[Fail()] if fault == "fail" else [])
        except RuntimeError as error:
            code = str(error)
        new = sorted(set(os.environ) - set(before) - {"PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR"})
        if "LOCAL_RANK" not in before:
            print(name, code, *(variable.partition("_")[0] for variable in new), flush=True)
        if fault == "fail":
            break
"""


def launch_variables() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in LAUNCH_VARIABLES}


def stop() -> None:
    raise RuntimeError("built in")


def test_a_run_in_one_process_leaves_no_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against later runs that wait for other processes, and against a number of threads that nobody gave."""
    config, run = write_config(tmp_path, trainer__max_steps=1), tmp_path / "run"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MASTER_PORT", "0")
    before = launch_variables()
    uses: tuple[tuple[Any, ...], ...] = (
        ("fit", "--config", config, "--run_dir", run),
        ("validate", "--ckpt_path", run),
        ("predict", "--ckpt_path", run, "--max_new_tokens", 2),
    )
    for use in uses:
        answer = gptlit(*use, *ONE)
        assert answer.code == 0, answer.err
        assert launch_variables() == before
        assert not torch.distributed.is_initialized()


def test_a_failed_run_leaves_no_variables(tmp_path: Path) -> None:
    config, before = write_config(tmp_path, trainer__max_steps=4), launch_variables()
    with extra_callbacks(At("on_train_batch_end", 2, stop)), pytest.raises(RuntimeError, match="built in"):
        gptlit("fit", "--config", config, *ONE)
    assert launch_variables() == before


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param("none", "a 0 LOCAL MASTER MASTER NODE\nb 0 LOCAL MASTER MASTER NODE\n", marks=pytest.mark.slow),
        pytest.param("fail", "a built in\n", marks=pytest.mark.slow),
    ],
)
def test_two_processes_keep_the_variables_while_both_live(tmp_path: Path, fault: str, said: str) -> None:
    """Each process runs the script, so its second run finds the other process. After a failure there is none."""
    config = write_config(tmp_path, trainer__max_steps=2)
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "script.py", str(config), fault]
    with (tmp_path / "said.txt").open("w") as file:
        streams: dict[str, Any] = {"stdout": file, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, **streams
        )
        err = finish(process)
    assert process.returncode == 0, err
    assert (tmp_path / "said.txt").read_text() == said, err
