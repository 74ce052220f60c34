"""What several test files share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="session", autouse=True)
def signals_that_arrive() -> Iterator[None]:
    """A shell starts what a script puts into the background with SIGINT ignored, and the command keeps to that."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ignored = [number for number in handlers if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, handlers[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def in_any_order_again() -> Iterator[None]:
    """Switches deterministic kernels off in the end; Lightning leaves them on."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=list(DIALECTS.values()), ids=list(DIALECTS))
def dialect(request: pytest.FixtureRequest) -> GPTConfig:
    """Every rung of the lecture and every dialect, small."""
    return GPTConfig(**request.param)


def random_gpt(config: GPTConfig, seed: int = 0, std: float = 0.2) -> GPT:
    """A GPT in float64 whose weights are all well away from zero, so that nothing is hidden by its first weights."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return model


@pytest.fixture(scope="session")
def tinyshakespeare() -> Path:
    """The real corpus, from the environment."""
    path = os.environ.get("GPTLIT_TINYSHAKESPEARE")
    if not path:
        pytest.skip("GPTLIT_TINYSHAKESPEARE names no file")
    return Path(path).resolve()
