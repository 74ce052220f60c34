"""The parts of a CPU training step with derivatives of their own equal the plain formulas, values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import random_gpt
from torch import Tensor
from torch.nn import functional as F

from gptlit.model import fused
from gptlit.model.block import RMSNorm
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT

SMALL = {"vocab_size": 11, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16}
CASES: dict[str, dict[str, Any]] = {
    "modern": {},
    "without QK-norm": {"qk_norm": False},
    "without RoPE": {"position": "learned"},
    "nanoGPT": {
        "position": "learned",
        "norm": "layernorm",
        "qk_norm": False,
        "activation": "gelu",
        "tie_weights": True,
    },
    "biases": {"bias": True, "qkv_bias": True},
    "token shift": {"token_shift": 3},
    "dropout": {"dropout": 0.25, "token_noise": 0.1},
    "attention dropout": {"attention_dropout": 0.25},
    "no residual": {"residual": False, "dropout": 0.25},
    "no MLP": {"mlp_ratio": 0},
}


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "pays", lambda x: False)


def loss_and_gradients(network: GPT, T: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids, targets = torch.randint(network.config.vocab_size, (2, 3, T), generator=generator)
    torch.manual_seed(4)  # of dropout
    loss = network.train()(ids, targets=targets)
    return loss.detach(), list(torch.autograd.grad(loss, list(network.parameters())))


@pytest.mark.parametrize("rows", [fused.ROWS, 5])
@pytest.mark.parametrize("T", [1, 2, 12])
@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_the_plain_one(case: str, T: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "ROWS", rows)
    network = random_gpt(GPTConfig(**{**SMALL, **CASES[case]}))
    loss, gradients = loss_and_gradients(network, T)
    plainly(monkeypatch)
    expected, plain = loss_and_gradients(network, T)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_the_cases_use_every_function(monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()
    functions = [
        value for value in vars(fused).values() if isinstance(value, type) and value.__module__ == fused.__name__
    ]
    assert functions
    for function in functions:

        def watched(*args: Any, name: str = function.__name__, apply: Callable[..., Any] = function.apply) -> Any:
            used.add(name)
            return apply(*args)

        monkeypatch.setattr(function, "apply", watched)
    for case in CASES.values():
        loss_and_gradients(random_gpt(GPTConfig(**{**SMALL, **case})), 12)
    assert used == {function.__name__ for function in functions}


@pytest.mark.parametrize("case", ["modern", "token shift", "dropout", "nanoGPT"])
def test_gradients_in_bfloat16_are_no_less_exact_than_the_plain_ones(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = random_gpt(GPTConfig(**{**SMALL, **CASES[case]}))
    _, exact = loss_and_gradients(network, 12)
    network.float()

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            _, gradients = loss_and_gradients(network, 12)
        far = sum((ours.double() - theirs).square().sum() for ours, theirs in zip(gradients, exact, strict=True))
        return float(far) ** 0.5

    ours = error()
    plainly(monkeypatch)
    assert ours < 1.3 * error()


def test_the_functions_are_left_where_they_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("used")

    monkeypatch.setattr(fused.CausalAttentionFunction, "apply", refuse)
    network = random_gpt(GPTConfig(**SMALL))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    network(ids)  # evaluation mode
    with torch.no_grad():
        network.train()(ids)
    compiled = torch.compile(network, backend="eager")
    compiled(ids)  # torch.compile fuses the plain formulas
    with pytest.raises(AssertionError, match="used"):
        network(ids)


def test_derivatives_of_torch_func_equal_those_of_autograd() -> None:
    network = random_gpt(GPTConfig(**SMALL)).train()
    ids = torch.zeros(1, 4, dtype=torch.int64)
    weights = {name: p.detach() for name, p in network.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(network, weights, (ids,), {"targets": ids})

    found = torch.func.grad(loss)(weights)
    network(ids, targets=ids).backward()
    for name, p in network.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


def test_attention_over_many_positions_keeps_its_weights_only_where_the_plain_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In full float32 torch's kernel stores no (T, T); a model of 1,024 positions took twice the memory."""
    network = random_gpt(GPTConfig(**{**SMALL, "block_size": 300, "n_layer": 1})).float().train()

    def saved_weights(T: int) -> int:
        """Return the number of attention weights, (B·H, rows, keys), that the backward pass keeps."""
        sizes: list[int] = []

        def count(x: Tensor) -> Tensor:
            sizes.append(x.numel() if x.dim() == 3 and x.size(0) == SMALL["n_head"] else 0)
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            network(torch.zeros(1, T, dtype=torch.int64))
        return sum(sizes)

    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    monkeypatch.setattr(fused, "ROWS", 100)
    assert saved_weights(256) == 2 * (100 * 100 + 100 * 200 + 56 * 256)
    assert saved_weights(300) == 0
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert saved_weights(300) == 2 * (100 * 100 + 100 * 200 + 100 * 300)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_norm_of_large_half_precision_activations_is_the_plain_one(dtype: torch.dtype) -> None:
    x = torch.full((2, 768), 3000, dtype=dtype, requires_grad=True)
    torch.testing.assert_close(RMSNorm().train()(x), torch.ones(2, 768, dtype=dtype))


def test_dropout_keeps_the_expected_share_and_mean() -> None:
    x, branch = torch.zeros(64, 64), torch.ones(64, 64, dtype=torch.bfloat16)
    random_bytes = torch.arange(256, dtype=torch.uint8).repeat(16).view(64, 64)
    y = fused.DropAddFunction.apply(x, branch, random_bytes, 64)
    assert y.count_nonzero() == 64 * 64 * 3 // 4
    torch.testing.assert_close(y.mean(), torch.tensor(1.0))


@pytest.mark.parametrize("fuse", [True, False])
def test_the_highest_dropout_keeps_one_byte_of_256(fuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "pays", lambda x: fuse)
    loss, _ = loss_and_gradients(random_gpt(GPTConfig(**SMALL, dropout=0.999)), 12)
    assert loss.isfinite()


def test_squared_relu_at_the_kink() -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 2.0], requires_grad=True)
    y = fused.SquaredReLUFunction.apply(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), F.relu(x.detach()) ** 2)
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.0, 0.0, 4.0]))
