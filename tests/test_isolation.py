"""Tests do not depend on the checkout, on their order or on the shell that starts them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import STOPPING

ROOT = Path(__file__).parent.parent
PROBE = "test_a_test_starts_in_an_empty_folder_with_default_handlers"


def test_a_test_starts_in_an_empty_folder_with_default_handlers(tmp_path: Path) -> None:
    """Relative paths such as checkpoints/base/best.ckpt find nothing, and signals arrive."""
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []
    assert ROOT not in tmp_path.parents
    for name in STOPPING:
        assert signal.getsignal(getattr(signal, name)) != signal.SIG_IGN, name
    assert not Path(os.environ["XDG_CACHE_HOME"]).is_relative_to(Path.home() / ".cache")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_the_suite_runs_where_the_shell_ignores_signals() -> None:
    """Guards against results that differ under nohup and in background jobs."""
    command = f"trap '' HUP INT TERM USR1; exec {sys.executable} -m pytest -q -p no:cacheprovider {__file__} -k {PROBE}"
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # of this suite
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("round", [1, 2])
def test_settings_of_torch_do_not_reach_the_next_test(round: int) -> None:
    """Whatever the first round changes, the second finds the defaults."""
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
