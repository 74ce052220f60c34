"""Configurations of every architecture, and the isolation of each test from the checkout, the shell and the others."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gptlit
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT

LECTURE = {
    "vocab_size": 65,
    "block_size": 8,
    "n_embd": 32,
    "n_head": 1,
    "bias": True,
    "norm": "none",
    "position": "learned",
    "qk_norm": False,
    "activation": "relu",
    "init": "normal",
}
NANOGPT = {
    "vocab_size": 65,
    "position": "learned",
    "norm": "layernorm",
    "tie_weights": True,
    "qk_norm": False,
    "activation": "gelu",
    "init": "scaled",
}
DIALECTS = {
    "bigram": {**LECTURE, "n_layer": 0, "position": "none"},
    "positions": {**LECTURE, "n_layer": 0},
    "one head": {**LECTURE, "n_layer": 1, "mlp_ratio": 0, "residual": False},
    "four heads": {**LECTURE, "n_layer": 1, "n_head": 4, "mlp_ratio": 0, "residual": False},
    "feed-forward": {**LECTURE, "n_layer": 1, "n_head": 4, "mlp_ratio": 1, "residual": False},
    "residual": {**LECTURE, "n_layer": 3, "n_head": 4},
    "layernorm": {**LECTURE, "n_layer": 3, "n_head": 4, "norm": "layernorm"},
    "nanogpt": {**NANOGPT, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32},
    "gpt2": {
        **NANOGPT,
        "block_size": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "bias": True,
        "qkv_bias": True,
        "activation": "gelu_tanh",
    },
    "modern": {"vocab_size": 65, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32},
    "modern, token shift": {
        "vocab_size": 65,
        "block_size": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "token_shift": 3,
    },
    "modern, softcap": {
        "vocab_size": 65,
        "block_size": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "logit_softcap": 15.0,
    },
}


STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


@pytest.fixture(scope="session", autouse=True)
def default_signal_handlers() -> Iterator[None]:
    """Restore handlers that the shell ignores: nohup ignores SIGHUP, a script's background job SIGINT."""
    numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]  # Windows has no SIGHUP
    ignored = [number for number in numbers if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="session", autouse=True)
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty working directory for fixtures of modules and sessions, and caches apart from the user's.

    Processes that tests start import the gptlit that the tests import, from any folder.
    """
    folder = tmp_path_factory.mktemp("session")
    imported_from = str(Path(gptlit.__file__).parent.parent)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PYTHONPATH", imported_from, prepend=os.pathsep)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts in an empty folder of its own, whatever lies in the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Restore the environment: a process that inherits Lightning's `NODE_RANK` waits for others for ever."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """Restore torch's process-wide settings, which Lightning changes and leaves: tests run in any order."""
    precision, threads, dtype = torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(params=list(DIALECTS.values()), ids=list(DIALECTS))
def dialect(request: pytest.FixtureRequest) -> GPTConfig:
    """A small configuration of every lecture step and of every other architecture."""
    return GPTConfig(**request.param)


def random_gpt(config: GPTConfig, seed: int = 0, std: float = 0.2) -> GPT:
    """Return a float64 GPT with all weights away from zero, so that no term is hidden by its initial weights."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return model


@pytest.fixture(scope="session")
def tinyshakespeare() -> Path:
    """Path of Tiny Shakespeare, from the environment."""
    path = os.environ.get("GPTLIT_TINYSHAKESPEARE")
    if not path:
        pytest.skip("GPTLIT_TINYSHAKESPEARE names no file")
    return Path(path).resolve()
