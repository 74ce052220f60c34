"""Parameter groups, AdamW and Muon against independent implementations, and the learning-rate schedules."""

import copy
import io
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.optim import (
    MuonAdamW,
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    learning_rate_factor,
    newton_schulz,
    parameter_groups,
)
from gptlit.optim.muon import product_dtype

SMALL = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16)
NANOGPT = replace(
    SMALL,
    position="learned",
    norm="layernorm",
    activation="gelu",
    qk_norm=False,
    tie_weights=True,
    init="scaled",
)
LECTURE = replace(NANOGPT, bias=True, tie_weights=False, activation="relu", init="normal")
SETTINGS = pytest.mark.parametrize(
    "config",
    [OptimizerConfig(name=name, decay=decay) for name in ("adamw", "muon") for decay in ("matrices", "all")],
    ids=lambda config: f"{config.name}-{config.decay}",
)
MUON = OptimizerConfig(lr=3e-3, weight_decay=0.2, muon_lr=0.02, muon_weight_decay=0.3)


def build(gpt: GPTConfig = SMALL, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(gpt)
    with torch.no_grad():  # output projections that start at zero would hide a wrong decay
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def give_gradients(model: nn.Module, step: int) -> None:
    """Set gradients that depend only on the shapes and the step."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def by_role(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {group["role"]: group for group in groups}


def assert_same(ours: nn.Module, theirs: nn.Module, atol: float = 0.0) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@SETTINGS
def test_a_step_leaves_the_gradients_as_they_are(config: OptimizerConfig) -> None:
    """Callbacks may read them afterwards. Other implementations of Muon overwrite them
    (findings/optimizers-overwrite-gradients.sh).
    """
    config = replace(config, weight_decay=0.2, muon_weight_decay=0.3, muon_interval=2 if config.name == "muon" else 1)
    model = build()
    optimizer = build_optimizer(model, config, fused=True)
    for step in range(4):
        give_gradients(model, step)
        before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
        after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert len(after) == len(list(model.parameters()))
        assert all(map(torch.equal, before, after))


class TestParameterGroups:
    @SETTINGS
    def test_every_parameter_is_in_exactly_one_group(self, dialect: GPTConfig, config: OptimizerConfig) -> None:
        """A weight in no group is never updated; one in two groups (such as a tied one) is updated twice a step."""
        model = GPT(dialect)
        grouped = [id(p) for group in parameter_groups(model, config) for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())

    def test_adamw_decays_what_has_two_axes_as_nanogpt_does(self, dialect: GPTConfig) -> None:
        """Grouping by module gives the same groups as nanoGPT's rule, which counts axes."""
        model = GPT(dialect)
        groups = by_role(parameter_groups(model, OptimizerConfig(name="adamw")))
        expected = [name for name, p in model.named_parameters() if p.dim() >= 2]
        assert groups["decay"]["names"] == expected
        rest = [name for name, p in model.named_parameters() if p.dim() < 2]
        if rest:
            assert groups["no_decay"]["names"] == rest
            assert groups["no_decay"]["weight_decay"] == 0

    @pytest.mark.parametrize(
        ("n_layer", "n_embd", "block_size", "decayed", "undecayed"),
        [(4, 128, 64, (18, 802_944), (9, 1_152)), (6, 384, 256, (26, 10_740_096), (13, 4_992))],
        ids=["cpu size", "gpu size"],
    )
    def test_the_counts_are_those_that_nanogpt_prints(
        self, n_layer: int, n_embd: int, block_size: int, decayed: tuple[int, int], undecayed: tuple[int, int]
    ) -> None:
        gpt = replace(NANOGPT, vocab_size=65, n_layer=n_layer, n_embd=n_embd, block_size=block_size)
        groups = by_role(parameter_groups(GPT(gpt), OptimizerConfig(name="adamw")))
        counts = {role: (len(g["params"]), sum(p.numel() for p in g["params"])) for role, g in groups.items()}
        assert counts == {"decay": decayed, "no_decay": undecayed}

    def test_muon_takes_the_projections_inside_the_blocks_and_nothing_else(self) -> None:
        """Muon on embeddings or the head is known to hurt; a tied head is both."""
        groups = by_role(parameter_groups(GPT(LECTURE), OptimizerConfig()))
        inside = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        assert groups["matrix"]["names"] == [f"transformer.h.{i}.{part}.weight" for i in (0, 1) for part in inside]
        assert groups["decay"]["names"] == ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"]

    def test_queries_keys_and_values_are_three_matrices(self) -> None:
        matrices = by_role(parameter_groups(GPT(SMALL), OptimizerConfig()))["matrix"]
        splits = dict(zip(matrices["names"], matrices["splits"], strict=True))
        assert {name for name, n in splits.items() if n == 3} == {
            f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)
        }
        assert set(splits.values()) == {1, 3}

    def test_a_model_without_blocks_trains_with_adamw_alone(self) -> None:
        model = build(replace(SMALL, n_layer=0))
        optimizer = build_optimizer(model, OptimizerConfig(), fused=True)
        assert [group["role"] for group in optimizer.param_groups] == ["decay"]
        before = copy.deepcopy(model)
        train(model, optimizer, range(1))
        assert all((a != b).any() for a, b in zip(model.parameters(), before.parameters(), strict=True))

    @pytest.mark.parametrize("name", ["muon", "adamw"])
    def test_the_head_has_a_rate_of_its_own_where_one_is_given(self, name: Literal["muon", "adamw"]) -> None:
        """Through the schedule too, and nothing else changes: the first step of AdamW is as long as its rate."""
        steps = {}
        for head_lr in (None, 1e-3):
            model = build(LECTURE)
            before = copy.deepcopy(model)
            optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=4e-3, head_lr=head_lr), fused=False)
            train(model, optimizer, range(1))
            steps[head_lr] = {
                key: (a - b).detach().abs().max().item()
                for (key, a), b in zip(model.named_parameters(), before.parameters(), strict=True)
            }
        rates = {g["role"]: g["initial_lr"] for g in optimizer.param_groups}
        assert rates["head"] == 1e-3
        assert rates["decay"] == 4e-3
        ratio = steps[1e-3].pop("lm_head.weight") / steps[None].pop("lm_head.weight")
        assert ratio == pytest.approx(0.25, rel=0.01)
        assert steps[1e-3] == steps[None]

    def test_a_rate_for_a_head_that_is_the_embedding_is_refused(self) -> None:
        with pytest.raises(UserError, match="tie_weights") as refused:
            parameter_groups(GPT(replace(SMALL, tie_weights=True)), OptimizerConfig(head_lr=1e-3))
        assert refused.value.setting == "model.optimizer.head_lr"
        assert parameter_groups(GPT(replace(SMALL, tie_weights=True)), OptimizerConfig())

    def test_decay_all_reaches_biases_and_norms_under_both_optimizers(self) -> None:
        """The lecture uses torch's AdamW with its defaults, which decay every parameter."""
        model = GPT(LECTURE)
        groups = parameter_groups(model, OptimizerConfig(name="adamw", decay="all", weight_decay=0.01))
        assert [(g["role"], g["weight_decay"], len(g["params"])) for g in groups] == [
            ("decay", 0.01, len(list(model.parameters())))
        ]
        assert set(by_role(parameter_groups(model, OptimizerConfig(decay="all")))) == {"matrix", "decay"}

    def test_a_frozen_parameter_is_left_out(self) -> None:
        model = GPT(SMALL)
        model.transformer["wte"].weight.requires_grad_(False)
        names = [name for group in parameter_groups(model, OptimizerConfig()) for name in group["names"]]
        assert "transformer.wte.weight" not in names
        assert "lm_head.weight" in names

    def test_a_parameter_without_a_role_is_named(self) -> None:
        """A new part of the model must not silently stay untrained."""
        model = GPT(SMALL)
        model.transformer["h"][1].attn.gain = nn.Parameter(torch.ones(2))
        with pytest.raises(RuntimeError, match=r"transformer\.h\.1\.attn\.gain \(no role\)"):
            parameter_groups(model, OptimizerConfig())

    def test_a_parameter_with_two_roles_is_named(self) -> None:
        """A table that is also a matrix of a block would be updated by Muon and by AdamW."""
        model = GPT(replace(SMALL, vocab_size=16))
        model.transformer["wte"].weight = model.transformer["h"][0].attn.c_proj.weight
        with pytest.raises(RuntimeError, match=r"transformer\.wte\.weight \(decay and matrix\)"):
            parameter_groups(model, OptimizerConfig())

    def test_sharded_matrices_are_refused_by_muon_with_the_flags_to_change(self) -> None:
        """Newton-Schulz on a flat shard would give wrong updates without an error."""
        model = GPT(SMALL)
        weight = model.transformer["h"][0].mlp.c_fc.weight
        model.transformer["h"][0].mlp.c_fc.weight = nn.Parameter(weight.detach().flatten())
        with pytest.raises(
            UserError, match=r"model\.optimizer\.name is muon.*c_fc.*choose adamw, or trainer\.strategy ddp"
        ):
            parameter_groups(model, OptimizerConfig())
        assert parameter_groups(model, OptimizerConfig(name="adamw"))


class TestAdamWHalf:
    """AdamW inside MuonAdamW equals `torch.optim.AdamW` bit-exactly."""

    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    def test_it_equals_torch_step_for_step(self, fused: bool) -> None:
        ours, theirs = build(LECTURE), build(LECTURE)
        config = replace(MUON, name="adamw")
        mine = MuonAdamW(parameter_groups(ours, config), fused=fused)
        reference = torch.optim.AdamW(parameter_groups(theirs, config), fused=fused)
        for step in range(6):
            for group in (*mine.param_groups, *reference.param_groups):
                group["lr"] = group["initial_lr"] * (1 + step) / 6  # as a schedule does
            train(ours, mine, range(step, step + 1))
            train(theirs, reference, range(step, step + 1))
            assert_same(ours, theirs)

    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    def test_it_equals_torch_next_to_muon_and_after_loading_a_state_dict(self, fused: bool) -> None:
        ours, theirs = build(LECTURE), build(LECTURE)
        mine = build_optimizer(ours, MUON, fused)
        rest = [group for group in parameter_groups(theirs, MUON) if group["role"] != "matrix"]
        reference = torch.optim.AdamW(rest, fused=fused)
        train(ours, mine, range(3))
        train(theirs, reference, range(3))
        again = build_optimizer(ours, MUON, fused)
        again.load_state_dict(mine.state_dict())
        train(ours, again, range(3, 6))
        train(theirs, reference, range(3, 6))
        ours_rest = [p for group in again.param_groups if group["role"] != "matrix" for p in group["params"]]
        theirs_rest = [p for group in rest for p in group["params"]]
        assert all(torch.equal(a, b) for a, b in zip(ours_rest, theirs_rest, strict=True))

    def test_the_name_adamw_builds_torch_s_own(self) -> None:
        optimizer = build_optimizer(build(), OptimizerConfig(name="adamw"), fused=True)
        assert type(optimizer) is torch.optim.AdamW
        assert all(group["fused"] for group in optimizer.param_groups)


def with_singular_values(rows: int, columns: int, values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a matrix (1, rows, columns) with the given singular values, and the nearest orthonormal one, U·Vᵀ."""
    generator = torch.Generator().manual_seed(seed)
    U, _, Vt = torch.linalg.svd(
        torch.randn(rows, columns, generator=generator, dtype=torch.float64), full_matrices=False
    )
    return (U * values @ Vt)[None], (U @ Vt)[None]


SHAPES = pytest.mark.parametrize(
    ("rows", "columns"), [(32, 32), (32, 128), (128, 32), (32, 48), (48, 32)], ids=lambda n: str(n)
)


class TestNewtonSchulz:
    @SHAPES
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_singular_values_land_near_one(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        """[0.68, 1.21] is the range of the quintic after five steps, for values above 1/500 of the norm."""
        values = torch.logspace(0, -1.8, min(rows, columns), dtype=torch.float64)
        matrix, _ = with_singular_values(rows, columns, values)
        result = newton_schulz(matrix.to(dtype)).double()
        slack = 0.05 if dtype == torch.bfloat16 else 1e-3
        landed = torch.linalg.svdvals(result)
        assert 0.68 - slack < landed.min()
        assert landed.max() < 1.21 + slack

    @SHAPES
    def test_singular_vectors_are_kept(self, rows: int, columns: int) -> None:
        """An update along other directions than the gradient's could also be orthonormal."""
        values = torch.logspace(0, -1.5, min(rows, columns), dtype=torch.float64)
        matrix, nearest = with_singular_values(rows, columns, values)
        result = newton_schulz(matrix)
        U, S, Vt = torch.linalg.svd(matrix[0], full_matrices=False)
        turned = U.T @ result[0] @ Vt.T
        assert (turned - turned.diagonal().diag()).abs().max() < 1e-9
        a, b, c = 3.4445, -4.7750, 2.0315
        sigma = S / S.norm()
        for _ in range(5):
            sigma = a * sigma + b * sigma**3 + c * sigma**5
        torch.testing.assert_close(turned.diagonal(), sigma, rtol=0, atol=1e-9)
        assert torch.nn.functional.cosine_similarity(result.flatten(), nearest.flatten(), dim=0) > 0.95

    @SHAPES
    def test_a_batch_equals_its_matrices_alone(self, rows: int, columns: int) -> None:
        """A norm over the whole batch, or wrong indices, would couple matrices."""
        stack = torch.randn(5, rows, columns) * torch.tensor([1.0, 1e-3, 10.0, 1.0, 0.5])[:, None, None]
        together = newton_schulz(stack)
        for i in range(5):
            torch.testing.assert_close(together[i : i + 1], newton_schulz(stack[i : i + 1]), rtol=0, atol=1e-5)

    @SHAPES
    def test_a_transposed_matrix_gives_the_transposed_result(self, rows: int, columns: int) -> None:
        stack = torch.randn(3, rows, columns, dtype=torch.float64)
        torch.testing.assert_close(newton_schulz(stack.mT), newton_schulz(stack).mT, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 256), (256, 64)])
    def test_float32_is_as_good_as_float64_on_matrices_of_low_rank(self, rows: int, columns: int) -> None:
        """Gradients are nearly of low rank; working on X·Xᵀ must not amplify float32's rounding errors."""
        generator = torch.Generator().manual_seed(3)
        narrow = torch.randn(2, rows, 3, generator=generator, dtype=torch.float64)
        stack = narrow @ torch.randn(2, 3, columns, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(newton_schulz(stack.float()).double(), newton_schulz(stack), rtol=0, atol=1e-3)

    def test_zeros_stay_zeros_and_the_input_is_not_modified(self) -> None:
        """Zero-initialised output projections cause zero gradients at first: 0 / 0 would make weights NaN."""
        for shape in ((2, 8, 8), (2, 8, 32), (2, 32, 8)):
            assert newton_schulz(torch.zeros(shape)).abs().max() == 0
            stack = torch.randn(shape)
            before = stack.clone()
            newton_schulz(stack)
            assert torch.equal(stack, before)

    def test_the_result_does_not_depend_on_the_scale_of_the_gradient(self) -> None:
        stack = torch.randn(2, 16, 64)
        torch.testing.assert_close(newton_schulz(stack * 1e-4), newton_schulz(stack), rtol=0, atol=1e-5)


def matrix_group(params: list[nn.Parameter], splits: list[int] | None = None, **settings: Any) -> dict[str, Any]:
    defaults = {"role": "matrix", "lr": 0.02, "momentum": 0.95, "weight_decay": 0.1, "interval": 1}
    return {**defaults, **settings, "params": params, "splits": splits or [1] * len(params)}


class TestMuonHalf:
    def test_it_equals_torch_muon_up_to_bfloat16(self) -> None:
        """Momentum, Nesterov, scale and decay against torch's implementation, over several steps."""
        shapes = [(32, 32), (64, 16), (16, 64), (32, 32), (24, 16)]
        torch.manual_seed(0)
        ours = nn.ParameterList(torch.randn(shape) for shape in shapes)
        theirs, start = copy.deepcopy(ours), copy.deepcopy(ours)
        mine = MuonAdamW([matrix_group(list(ours))])
        reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True)
        for step in range(4):
            train(ours, mine, range(step, step + 1))
            train(theirs, reference, range(step, step + 1))
            for a, b, first in zip(ours, theirs, start, strict=True):
                assert (a - b).norm() < 0.02 * (b - first).norm()

    def test_it_equals_a_naive_version_without_batching(self) -> None:
        """Batching by shape, splitting c_attn into three, and iterating on the Gram matrix must change nothing."""
        gpt = replace(LECTURE, n_layer=3)
        ours, theirs = build(gpt).double(), build(gpt).double()
        config = replace(MUON, muon_momentum=0.9)
        optimizer = build_optimizer(ours, config, fused=False)
        matrices = {
            name: p
            for name, p in theirs.named_parameters()
            if ".h." in name and name.endswith("weight") and p.dim() == 2
        }
        momenta = {name: torch.zeros_like(p) for name, p in matrices.items()}

        def orthogonal(X: Tensor) -> Tensor:
            X = X / X.norm()
            for _ in range(5):
                X = 3.4445 * X - 4.7750 * X @ X.T @ X + 2.0315 * X @ X.T @ X @ X.T @ X
            return X

        for step in range(3):
            train(ours, optimizer, range(step, step + 1))
            give_gradients(theirs, step)
            with torch.no_grad():
                for name, p in matrices.items():
                    momenta[name] = 0.9 * momenta[name] + 0.1 * p.grad
                    ahead = 0.9 * momenta[name] + 0.1 * p.grad
                    parts = ahead.split(16) if name.endswith("c_attn.weight") else [ahead]
                    update = torch.cat(
                        [orthogonal(part) * max(1, part.size(0) / part.size(1)) ** 0.5 for part in parts]
                    )
                    p.copy_(p - 0.02 * 0.3 * p - 0.02 * update)
        found = dict(ours.named_parameters())
        for name, p in matrices.items():
            torch.testing.assert_close(found[name], p, rtol=0, atol=1e-10)

    def test_with_an_interval_every_second_step_moves_twice_as_far_along_the_momentum_of_both(self) -> None:
        torch.manual_seed(0)
        ours = nn.ParameterList(torch.randn(shape, dtype=torch.float64) for shape in [(8, 8), (16, 4)])
        alone = copy.deepcopy(ours)
        optimizer = MuonAdamW([matrix_group(list(ours), interval=2, momentum=0.9)])
        for step in range(4):
            before = copy.deepcopy(ours)
            train(ours, optimizer, range(step, step + 1))
            moved = [not torch.equal(a, b) for a, b in zip(ours, before, strict=True)]
            assert moved == [step % 2 == 1] * 2
            if step == 1:  # a plain step at twice the rate, from the momentum of the first gradient
                plain = MuonAdamW([matrix_group(list(alone), lr=0.04, momentum=0.9)])
                give_gradients(alone, 0)
                for p in alone:
                    plain.state[p]["momentum"] = 0.1 * p.grad
                train(alone, plain, range(1, 2))
                for a, b in zip(ours, alone, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    def test_a_run_resumed_between_two_updates_makes_the_next_one_in_time(self) -> None:
        model = build(LECTURE)
        config = replace(MUON, muon_interval=3)
        optimizer = build_optimizer(model, config, fused=False)
        train(model, optimizer, range(2))
        resumed = copy.deepcopy(model)
        again = build_optimizer(resumed, config, fused=False)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for network, steps in ((model, optimizer), (resumed, again)):
            train(network, steps, range(2, 6))
        for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_a_state_without_the_count_of_steps_loads(self) -> None:
        model = build(LECTURE)
        optimizer = build_optimizer(model, MUON, fused=False)
        train(model, optimizer, range(2))
        saved = copy.deepcopy(optimizer.state_dict())
        for index in next(group for group in saved["param_groups"] if group["role"] == "matrix")["params"]:
            del saved["state"][index]["step"]
        again = build_optimizer(model, MUON, fused=False)
        again.load_state_dict(saved)
        train(model, again, range(2, 3))

    def test_the_state_of_an_optimizer_without_an_interval_loads_without_build_optimizer(self) -> None:
        network = nn.ParameterList([torch.ones(4, 4)])
        optimizer = MuonAdamW([matrix_group(list(network))])
        train(network, optimizer, range(1))
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["param_groups"][0]["interval"]
        again = MuonAdamW([matrix_group(list(network))])
        again.load_state_dict(saved)
        before = copy.deepcopy(network)
        train(network, again, range(1, 2))
        assert not torch.equal(network[0], before[0])

    def test_the_count_of_steps_stays_on_the_cpu_where_reading_it_makes_nothing_wait(self) -> None:
        """Torch moves the counters of fused groups to the device of the weights when it loads them."""
        weights = nn.Parameter(torch.ones(4, 4, device="meta"))
        optimizer = MuonAdamW([matrix_group([weights])], fused=True)
        state = {"momentum": torch.zeros(4, 4, device="meta"), "step": torch.tensor(2.0)}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
        assert optimizer.state[weights]["step"].device.type == "cpu"

    def test_parameters_without_a_gradient_do_not_change_and_get_no_state(self) -> None:
        model = build(LECTURE)
        optimizer = build_optimizer(model, MUON, fused=True)
        before = copy.deepcopy(model)
        give_gradients(model, 0)
        idle = {"transformer.h.0.attn.c_attn.weight", "transformer.wpe.weight", "transformer.h.1.ln_1.bias"}
        for name in idle:
            model.get_parameter(name).grad = None
        optimizer.step()
        unchanged = {
            name
            for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True)
            if torch.equal(a, b)
        }
        assert unchanged == idle
        assert not any(optimizer.state.get(model.get_parameter(name)) for name in idle)

    def test_a_group_without_its_settings_is_refused(self) -> None:
        with pytest.raises(ValueError, match="lacks interval, momentum, splits"):
            MuonAdamW([{"role": "matrix", "params": [nn.Parameter(torch.ones(2, 2))], "lr": 0.1, "weight_decay": 0.0}])
        with pytest.raises(ValueError, match="lacks role"):
            MuonAdamW(
                [
                    {
                        "params": [nn.Parameter(torch.ones(2))],
                        "lr": 0.1,
                        "weight_decay": 0.0,
                        "betas": (0.9, 0.9),
                        "eps": 1e-8,
                    }
                ]
            )


def both_optimizers(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("config", [MUON, replace(MUON, name="adamw")], ids=["muon", "adamw"])(test)


class TestOneOptimizer:
    @both_optimizers
    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    def test_training_is_equal_after_saving_and_loading(self, config: OptimizerConfig, fused: bool) -> None:
        """Guards against momentum or step counters that are not saved."""
        whole = build(LECTURE)
        optimizer = build_optimizer(whole, config, fused)
        train(whole, optimizer, range(3))
        file = io.BytesIO()
        torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
        train(whole, optimizer, range(3, 6))

        file.seek(0)
        checkpoint = torch.load(file, weights_only=True)
        resumed = build(LECTURE, seed=1)
        resumed.load_state_dict(checkpoint["model"])
        other = build_optimizer(resumed, config, fused)
        other.load_state_dict(checkpoint["optimizer"])
        train(resumed, other, range(3, 6))
        assert_same(resumed, whole)

    def test_role_names_and_splits_are_in_the_state_dict(self) -> None:
        optimizer = build_optimizer(build(LECTURE), MUON, fused=False)
        saved = by_role(optimizer.state_dict()["param_groups"])
        assert set(saved) == {"matrix", "decay", "no_decay"}
        assert saved["matrix"]["splits"] == [3, 1, 1, 1] * 2
        assert saved["no_decay"]["names"][0] == "transformer.h.0.ln_1.weight"

    @both_optimizers
    def test_loading_a_state_dict_keeps_the_current_settings(self, config: OptimizerConfig) -> None:
        """By default torch restores the saved ones: a flag given when resuming would be ignored silently."""
        model = build(LECTURE)
        optimizer = build_optimizer(model, config, fused=True)
        train(model, optimizer, range(1))
        changed = replace(config, lr=0.5, muon_lr=0.25, weight_decay=0.0, muon_momentum=0.5, betas=(0.5, 0.6))
        resumed = build_optimizer(model, changed, fused=False)
        resumed.load_state_dict(optimizer.state_dict())
        for group, fresh in zip(resumed.param_groups, parameter_groups(model, changed), strict=True):
            assert {key: group[key] for key in fresh if key != "params"} == {
                key: value for key, value in fresh.items() if key != "params"
            }
            assert not group["fused"]
        train(model, resumed, range(1, 2))

    @pytest.mark.parametrize("changed", [{"name": "adamw"}, {"decay": "all"}, {"head_lr": 1e-3}], ids=str)
    def test_state_of_other_groups_is_refused_with_the_flags_to_change(self, changed: dict[str, Any]) -> None:
        """Moments matched by position alone would go to wrong tensors of the same shape."""
        model = build(LECTURE)
        optimizer = build_optimizer(model, MUON, fused=False)
        train(model, optimizer, range(1))
        other = build_optimizer(model, replace(MUON, **changed), fused=False)
        with pytest.raises(UserError, match=r"optimizer\.name, .*optimizer\.decay and .*optimizer\.head_lr"):
            other.load_state_dict(optimizer.state_dict())

    def test_rate_zero_changes_nothing(self) -> None:
        """Weight decay must scale with the rate, or weights would still shrink at the end of a schedule."""
        model = build(LECTURE)
        before = copy.deepcopy(model)
        optimizer = build_optimizer(model, MUON, fused=True)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        train(model, optimizer, range(3))
        assert_same(model, before)

    @both_optimizers
    def test_without_gradient_a_step_is_weight_decay_alone(self, config: OptimizerConfig) -> None:
        model = build(LECTURE)
        before = copy.deepcopy(model)
        optimizer = build_optimizer(model, config, fused=False)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        old = dict(before.named_parameters())
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                torch.testing.assert_close(parameter, old[name] * (1 - group["lr"] * group["weight_decay"]))

    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    def test_a_gradient_scaler_changes_nothing_and_skips_a_step_with_infinite_gradients(self, fused: bool) -> None:
        """Under 16-mixed the scaler must unscale the gradients of Muon and of AdamW."""
        scaled, plain = build(LECTURE), build(LECTURE)
        ours, reference = build_optimizer(scaled, MUON, fused), build_optimizer(plain, MUON, fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            give_gradients(scaled, step)
            for parameter in scaled.parameters():
                parameter.grad = scaler.scale(parameter.grad)
            scaler.step(ours)
            scaler.update(1024.0)
            train(plain, reference, range(step, step + 1))
        assert_same(scaled, plain)
        give_gradients(scaled, 3)
        next(scaled.parameters()).grad[0, 0] = math.inf
        scaler.step(ours)
        assert_same(scaled, plain)

    @both_optimizers
    def test_a_closure_is_run_with_gradients_and_its_loss_returned(self, config: OptimizerConfig) -> None:
        """Lightning passes the training step to the optimizer as a closure."""
        model = build()
        optimizer = build_optimizer(model, config, fused=True)
        ids = torch.arange(8)[None]

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(ids).square().mean()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(5)]
        assert losses[-1] < losses[0]

    @both_optimizers
    def test_a_tiny_text_is_memorised(self, config: OptimizerConfig) -> None:
        model = build()
        optimizer = build_optimizer(model, replace(config, lr=0.01), fused=True)
        ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
        for _ in range(60):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.1

    def test_weights_may_be_bfloat16(self) -> None:
        """As under Lightning's bf16-true, where moments have the dtype of the weights and matmuls do not."""
        model = build(LECTURE).to(torch.bfloat16)
        before = copy.deepcopy(model)
        optimizer = build_optimizer(model, MUON, fused=True)
        train(model, optimizer, range(2))
        assert all(p.isfinite().all() for p in model.parameters())
        assert all((a != b).any() for a, b in zip(model.parameters(), before.parameters(), strict=True))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_a_gpu_equals_the_cpu_up_to_bfloat16(self) -> None:
        on_cpu, on_gpu = build(LECTURE), build(LECTURE).cuda()
        start = copy.deepcopy(on_cpu)
        train(on_cpu, build_optimizer(on_cpu, MUON, fused=True), range(3))
        optimizer = build_optimizer(on_gpu, MUON, fused=True)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in on_gpu.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
            optimizer.step()
        for a, b, first in zip(on_gpu.parameters(), on_cpu.parameters(), start.parameters(), strict=True):
            assert (a.cpu() - b).norm() < 0.03 * (b - first).norm()


def nanogpt_rate(it: int, warmup_iters: int, lr_decay_iters: int, learning_rate: float, min_lr: float) -> float:
    """The published schedule from its description: linear warm-up, cosine decay, then constant."""
    if it < warmup_iters:
        return learning_rate / (warmup_iters + 1) * (it + 1)
    if it > lr_decay_iters:
        return min_lr
    angle = math.pi * (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + (learning_rate - min_lr) * math.cos(angle / 2) ** 2


SHAPED = st.builds(
    ScheduleConfig,
    shape=st.sampled_from(["constant", "cosine", "linear", "wsd"]),
    warmup_steps=st.integers(0, 60),
    final_fraction=st.floats(0, 1),
    decay_fraction=st.floats(0.01, 1),
)


class TestSchedule:
    @pytest.mark.parametrize("it", [0, 1, 50, 99, 100, 101, 575, 1050, 1999, 2000, 2001, 5000])
    def test_nanogpt_s_cosine_is_expressible_exactly(self, it: int) -> None:
        schedule = ScheduleConfig(shape="cosine", warmup_steps=100, final_fraction=0.1)
        ours = 1e-3 * learning_rate_factor(it, 2000, schedule)
        assert ours == pytest.approx(nanogpt_rate(it, 100, 2000, 1e-3, 1e-4), rel=1e-12)

    @pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (8, 0.9), (9, 1.0), (54, 0.75), (99, 0.5), (100, 0.5)])
    def test_linear_falls_from_the_end_of_the_warm_up_to_the_end_of_the_run(self, step: int, expected: float) -> None:
        schedule = ScheduleConfig(shape="linear", warmup_steps=9, final_fraction=0.5)
        assert learning_rate_factor(step, 99, schedule) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("step", "expected"), [(0, 0.2), (4, 1.0), (79, 1.0), (80, 1.0), (90, 0.5), (99, 0.05), (100, 0.0)]
    )
    def test_wsd_stays_at_the_peak_until_its_last_part(self, step: int, expected: float) -> None:
        schedule = ScheduleConfig(shape="wsd", warmup_steps=4, decay_fraction=0.2)
        assert learning_rate_factor(step, 100, schedule) == pytest.approx(expected, abs=1e-12)

    @given(schedule=SHAPED, max_steps=st.integers(1, 200))
    def test_the_factor_is_above_zero_before_the_end_and_never_above_one(
        self, schedule: ScheduleConfig, max_steps: int
    ) -> None:
        """A first step at rate 0 is wasted; a factor above 1 would exceed the peak rate."""
        for step in range(max_steps):
            assert 0 < learning_rate_factor(step, max_steps, schedule) <= 1

    @given(schedule=SHAPED, max_steps=st.integers(1, 200))
    def test_it_does_not_rise_after_the_warm_up(self, schedule: ScheduleConfig, max_steps: int) -> None:
        factors = [learning_rate_factor(step, max_steps, schedule) for step in range(max_steps + 20)]
        peak = min(schedule.warmup_steps, len(factors) - 1)
        assert factors[: peak + 1] == sorted(factors[: peak + 1])
        assert all(b <= a + 1e-12 for a, b in pairwise(factors[peak:]))

    @given(schedule=SHAPED, max_steps=st.integers(61, 300))
    def test_it_has_its_peak_after_the_warm_up_and_its_end_at_the_end(
        self, schedule: ScheduleConfig, max_steps: int
    ) -> None:
        assert learning_rate_factor(schedule.warmup_steps, max_steps, schedule) == 1
        final = 1 if schedule.shape == "constant" else schedule.final_fraction
        for step in (max_steps, max_steps + 1, 10 * max_steps):
            assert learning_rate_factor(step, max_steps, schedule) == pytest.approx(final)

    @given(schedule=SHAPED)
    def test_it_has_no_jumps(self, schedule: ScheduleConfig) -> None:
        """A jump in the rate causes a spike in the loss; adjacent pieces must have equal values."""
        schedule = replace(schedule, warmup_steps=10 * schedule.warmup_steps + 500, decay_fraction=0.5)
        factors = [learning_rate_factor(step, 4000, schedule) for step in range(4010)]
        assert max(abs(b - a) for a, b in pairwise(factors)) < 0.003

    @given(schedule=SHAPED, step=st.integers(0, 500), max_steps=st.integers(1, 300))
    def test_constant_is_one_from_the_end_of_the_warm_up_on(
        self, schedule: ScheduleConfig, step: int, max_steps: int
    ) -> None:
        schedule = replace(schedule, shape="constant")
        assert (learning_rate_factor(step, max_steps, schedule) == 1) == (step >= schedule.warmup_steps)

    def test_wsd_over_the_whole_run_is_linear(self) -> None:
        wsd = ScheduleConfig(shape="wsd", warmup_steps=7, decay_fraction=1.0, final_fraction=0.2)
        for step in range(120):
            assert learning_rate_factor(step, 100, wsd) == learning_rate_factor(step, 100, replace(wsd, shape="linear"))


class TestSettings:
    @pytest.mark.parametrize(
        ("flag", "value"),
        [
            ("lr", -1.0),
            ("lr", 0.0),
            ("lr", math.nan),
            ("lr", math.inf),
            ("head_lr", 0.0),
            ("eps", 0.0),
            ("weight_decay", -0.1),
            ("muon_lr", 0.0),
            ("muon_weight_decay", math.nan),
            ("muon_momentum", 1.0),
            ("muon_momentum", -0.1),
            ("betas", (0.9, 1.0)),
            ("betas", (-0.1, 0.9)),
            ("betas", (0.9,)),
        ],
    )
    def test_an_impossible_optimizer_setting_is_refused_by_its_flag(self, flag: str, value: Any) -> None:
        with pytest.raises(UserError, match=rf"^{flag} is .*: it must be ") as caught:
            OptimizerConfig(**{flag: value})
        assert str(value) in str(caught.value)

    @pytest.mark.parametrize(
        ("flag", "value"),
        [
            ("warmup_steps", -1),
            ("final_fraction", 1.1),
            ("final_fraction", -0.1),
            ("decay_fraction", 0.0),
            ("decay_fraction", math.nan),
        ],
    )
    def test_an_impossible_schedule_setting_is_refused_by_its_flag(self, flag: str, value: Any) -> None:
        with pytest.raises(UserError, match=rf"^{flag} is {value}: it must be "):
            ScheduleConfig(**{flag: value})

    def test_betas_may_come_as_a_list_of_any_numbers(self) -> None:
        """YAML has no tuples, and 0 in YAML is an int, which torch's AdamW refuses next to a float."""
        config = OptimizerConfig(name="adamw", betas=[0, 0.99])  # type: ignore[arg-type]
        assert config.betas == (0.0, 0.99)
        assert hash(config) == hash(replace(config))
        build_optimizer(build(), config, fused=False)


@pytest.mark.parametrize("shape", [(256, 64), (64, 256)], ids=str)
def test_newton_schulz_is_stable_when_matmuls_round_to_bfloat16(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `matmul_precision: medium` a float32 matmul may round to bfloat16, which an iteration on squared singular
    values does not tolerate: its updates of the MLPs were noise.
    """
    generator = torch.Generator().manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    gradients = (U * torch.logspace(0, -2.5, 64)) @ V  # a few strong directions, many weak ones
    exact = newton_schulz(gradients[None].double())

    def rounded(name: str) -> Callable[..., Tensor]:
        product = getattr(torch, name)

        def multiply(*tensors: Tensor, **settings: Any) -> Tensor:
            *first, a, b = tensors
            return product(*first, a.bfloat16().float(), b.bfloat16().float(), **settings)

        return multiply

    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    monkeypatch.setattr("gptlit.optim.muon.cpu_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(torch, "bmm", rounded("bmm"))
    monkeypatch.setattr(torch, "baddbmm", rounded("baddbmm"))
    error = (newton_schulz(gradients[None]) - exact).norm() / exact.norm()
    assert error < 0.2
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")  # the code path that must not be used
    assert (newton_schulz(gradients[None]) - exact).norm() / exact.norm() > 2 * error


@pytest.mark.parametrize(
    ("precision", "hardware", "dtype"),
    [
        ("medium", True, torch.bfloat16),
        ("medium", False, torch.float32),
        ("highest", True, torch.float32),
    ],
)
def test_newton_schulz_uses_bfloat16_only_where_allowed_and_fast(
    monkeypatch: pytest.MonkeyPatch, precision: str, hardware: bool, dtype: torch.dtype
) -> None:
    """Guards against rounding in a run in full float32, and against matmuls that are ten times slower."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    monkeypatch.setattr("gptlit.optim.muon.cpu_multiplies_bfloat16", lambda: hardware)
    assert product_dtype(torch.zeros(1, 2, 2)) == dtype
    assert product_dtype(torch.zeros(1, 2, 2, dtype=torch.float64)) == torch.float64


@pytest.mark.parametrize("shape", [(256, 64), (64, 256)], ids=str)
def test_newton_schulz_takes_the_short_way_where_no_cpu_instruction_could_round(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    """Without instructions for bfloat16, `medium` is full float32: the iteration on the Gram matrix is exact there and
    half the work. The permission to round made it take the long way on every such CPU.
    """
    stack = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("gptlit.optim.muon.cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    exact = newton_schulz(stack)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert torch.equal(newton_schulz(stack), exact)
