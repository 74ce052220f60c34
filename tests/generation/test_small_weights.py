"""Weights in bfloat16 and int8: of that type, right in every path of sampling, and refused where they do not serve."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from conftest import DIALECTS, random_gpt
from torch import Tensor, nn

from gptlit.device.cpu import cpu_multiplies_bfloat16
from gptlit.errors import UserError
from gptlit.generation import GenerationConfig, Sampling, generate, generate_texts, next_token_probabilities
from gptlit.generation.engine import small_weights
from gptlit.generation.engine.affine import Affine
from gptlit.generation.engine.choose import make_step
from gptlit.generation.engine.decoder import Decoder
from gptlit.generation.engine.limits import SMALL_FROM_WEIGHT, UNPACK_FROM_ROWS
from gptlit.generation.engine.small_weights import Bfloat16Weight, Int8Weight, WeightsDtype, check_weights_dtype
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import CharTokenizer

TYPES: tuple[WeightsDtype, ...] = get_args(WeightsDtype)
ROUNDING = 2.0**-8
"""Largest relative error of rounding to bfloat16."""
needs_bfloat16 = pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="no instructions for bfloat16")


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of any size are rounded."""
    monkeypatch.setattr(small_weights, "SMALL_FROM_WEIGHT", 1)


def rounded(weight: Tensor, dtype: WeightsDtype) -> Tensor:
    """Return the weight (out, in) as the type has it, by the definition of the type."""
    if dtype == "bfloat16":
        return weight.bfloat16().to(weight)
    single = weight.float()  # in float64 a few numbers halfway between two integers would become the other one
    scales = single.abs().amax(1, keepdim=True) / 127
    return (single / scales).round().to(weight) * scales.to(weight)


def rounded_gpt(model: GPT, dtype: WeightsDtype) -> GPT:
    """Return a float64 model with the matrices of its blocks rounded."""
    other = GPT(model.config).double().eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for module in other.transformer["h"].modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded(module.weight, dtype))
    return other


# ---------------------------------------------------------------- matmuls


@needs_bfloat16
@pytest.mark.parametrize("rows", [1, 2, 7, UNPACK_FROM_ROWS - 1, UNPACK_FROM_ROWS, 70])
@pytest.mark.parametrize("shape", [(96, 32), (97, 31), (1, 5), (384, 1536)])
@pytest.mark.parametrize("kind", [Bfloat16Weight, Int8Weight])
def test_a_product_is_that_of_the_rounded_weight(kind: Any, shape: tuple[int, int], rows: int) -> None:
    """Rows of different magnitude: a scale of another row, or one that is off by a percent, would show."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-3, 2, shape[0])[:, None]
    x = torch.randn(2 * rows, shape[1], generator=generator)[::2]  # not contiguous
    inputs, held = x.bfloat16().double(), rounded(weight.double(), "int8" if kind is Int8Weight else "bfloat16")
    error = (kind.of(weight)(x) - inputs @ held.t()).abs()
    in_float32 = 1e-6 * inputs.abs() @ held.abs().t()  # of the sums
    assert (error <= ROUNDING * (inputs @ held.t()).abs() + in_float32).all()


def test_integers_are_the_nearest_of_their_scale() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    weight[5] = 0
    small = Int8Weight.of(weight)
    assert small.integers.dtype == torch.int8
    assert small.integers.abs().amax(1).tolist() == [127 if row != 5 else 0 for row in range(64)]
    scales = small.scales[:, None]
    assert ((small.integers * scales - weight).abs() <= 0.5001 * scales).all()


@needs_bfloat16
@pytest.mark.parametrize("kind", [Bfloat16Weight, Int8Weight])
def test_a_product_hardly_depends_on_the_number_of_rows(kind: Any) -> None:
    """Sample k must not depend on the other samples, although many rows take another kernel."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(384, 1536, generator=generator), torch.randn(64, 1536, generator=generator)
    product = kind.of(weight)
    for rows in (1, 2, UNPACK_FROM_ROWS - 1, UNPACK_FROM_ROWS):
        assert (product(x[:rows]) != product(x)[:rows]).float().mean() < 0.02


# ---------------------------------------------------------------- the model


@needs_bfloat16
@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", TYPES)
def test_the_matrices_of_the_blocks_are_of_the_type_and_the_rest_stays(dialect: GPTConfig, dtype: WeightsDtype) -> None:
    model = random_gpt(dialect).float()
    decoder = Decoder(model, 1, dtype)
    kind, type_ = (Bfloat16Weight, torch.bfloat16) if dtype == "bfloat16" else (Int8Weight, torch.int8)
    for layer in decoder.layers:
        for part in (layer.qkv, layer.proj, layer.fc, layer.out):
            if part is not None:
                assert isinstance(part.small, kind)
                assert part.packed is None
                held = part.small.packed if isinstance(part.small, Bfloat16Weight) else part.small.integers
                assert held.dtype == type_
                assert part.bias is None or part.bias.dtype == torch.float32
    assert decoder.lm_head.small is None
    assert decoder.lm_head.weight.dtype == decoder.token_embedding.dtype == torch.float32
    assert decoder.new_cache(1, 4).keys.dtype == torch.float32
    if decoder.layers:
        assert make_step(decoder, 1, 100) == decoder.step  # numpy has no bfloat16


@needs_bfloat16
@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 3, UNPACK_FROM_ROWS])
def test_logits_are_those_of_the_rounded_model(dialect: GPTConfig, rows: int, dtype: WeightsDtype) -> None:
    """Reading a prompt and reading one token. A scale that is off by a tenth exceeds the bound."""
    model = random_gpt(dialect, std=0.1)
    expected, T = rounded_gpt(model, dtype), dialect.block_size
    ids = torch.randint(65, (rows, T), generator=torch.Generator().manual_seed(1))

    def difference(decoder: Decoder) -> float:
        cache = decoder.new_cache(rows, T)
        got = [decoder(ids[:, :3], cache=cache), *(decoder.step(ids[:, t], cache) for t in range(3, T))]
        return float((torch.stack(got, 1) - logits).norm() / logits.norm())

    with torch.no_grad():
        logits = expected(ids)[:, 2:]
        decoder = Decoder(model.float(), rows, dtype)
        assert difference(decoder) < 0.01
        if dtype == "int8" and dialect.mlp_ratio and dialect.n_layer:  # attention adds little in a random model
            decoder.layers = [replace(layer, fc=with_scale(layer.fc, 1.1)) for layer in decoder.layers]
            assert difference(decoder) > 0.01


def with_scale(affine: Affine | None, factor: float) -> Affine:
    """Return the map with wrong scales."""
    assert affine is not None
    assert isinstance(affine.small, Int8Weight)
    return replace(affine, small=replace(affine.small, scales=affine.small.scales * factor))


@needs_bfloat16
@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("context", ["exact", "rolling"])
@pytest.mark.parametrize("name", ["nanogpt", "gpt2", "modern, token shift"])
@pytest.mark.parametrize("dtype", TYPES)
def test_log_probabilities_of_generated_ids_are_those_of_the_rounded_model(
    dtype: WeightsDtype, name: str, context: Any
) -> None:
    """Prompts of different lengths, several samples, and texts beyond block_size; float32 is farther away."""
    model = random_gpt(GPTConfig(**DIALECTS[name]), std=0.1).float()
    prompts, block, new = [[1, 2, 3], [4], [5, 6, 7, 8]], model.config.block_size, 40
    kept: list[Tensor] = []
    steps = generate(
        model,
        prompts,
        new,
        num_samples=2,
        seed=5,
        context=context,
        weights_dtype=dtype,
        log_probabilities=kept,
    )
    rows = torch.stack(list(steps), 1).tolist()
    assert len({tuple(row) for row in rows}) > 3
    errors: dict[str, list[float]] = {"rounded": [], "model": []}
    for name, reference in (("rounded", rounded_gpt(model.double(), dtype)), ("model", model.double())):
        for row, ids in enumerate(rows):
            text = prompts[row // 2] + ids
            length = len(prompts[row // 2])
            view = length
            for t in range(new):
                with torch.no_grad():
                    logits = reference(torch.tensor([text[length + t - view : length + t]]))[0, -1]
                errors[name].append(float(logits.log_softmax(0)[ids[t]] - kept[t][row]) ** 2)
                view = view + 1 if view < block else block if context == "exact" else max(block // 2, 1)
    mean_squares = {name: sum(values) / len(values) for name, values in errors.items()}
    assert mean_squares["rounded"] < 1e-4
    assert mean_squares["model"] > (2 if dtype == "int8" else 1) * mean_squares["rounded"]


@needs_bfloat16
@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", TYPES)
def test_texts_repeat_with_the_seed_and_the_models_weights_stay(dtype: WeightsDtype) -> None:
    model = random_gpt(GPTConfig(**DIALECTS["nanogpt"])).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = [
        [ids.tolist() for ids in generate(model, [[1]], 50, num_samples=3, seed=seed, weights_dtype=dtype)]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    probabilities = next_token_probabilities(model, [[1, 2]], weights_dtype=dtype)
    plain = next_token_probabilities(model, [[1, 2]])
    assert 0 < (probabilities - plain).abs().max() < 0.05
    greedy = next(iter(generate(model, [[1, 2]], 1, Sampling(temperature=0), weights_dtype=dtype)))
    assert int(greedy) == int(probabilities.argmax())


def test_only_large_matrices_are_rounded() -> None:
    """Products of small ones take longer in bfloat16 than in float32."""
    small, large = nn.Linear(128, 128), nn.Linear(384, 384)
    assert small.weight.numel() < SMALL_FROM_WEIGHT <= large.weight.numel()
    assert Affine.of(small, 1, "int8").small is None
    assert isinstance(Affine.of(large, 1, "int8").small, Int8Weight)
    assert Affine.of(large, 1).small is None


# ---------------------------------------------------------------- refusals


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> GPT:
    """A model large enough, on a CPU with the instructions."""
    monkeypatch.setattr(small_weights, "cpu_multiplies_bfloat16", lambda: True)
    return GPT(GPTConfig(vocab_size=65, block_size=4, n_layer=1, n_head=4, n_embd=384))


@pytest.mark.parametrize("dtype", TYPES)
def test_where_a_type_does_not_serve_it_is_refused_by_name(
    large: GPT, dtype: WeightsDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_weights_dtype(large, dtype)
    refused = {
        "the model runs on cuda: it is for CPUs": (large, torch.device("cuda")),
        "the model runs on meta": (GPT(large.config).to("meta"), None),
        "the model's weights are bfloat16, not float32": (GPT(large.config).bfloat16(), None),
        "the model's weights are float64, not float32": (GPT(large.config).double(), None),
        "no matrix of this model's blocks has 131,072 numbers": (GPT(GPTConfig(vocab_size=65)), None),
        "no matrix of this model's blocks": (GPT(replace(large.config, n_layer=0)), None),
    }
    for message, (model, device) in refused.items():
        with pytest.raises(UserError, match=message) as error:
            check_weights_dtype(model, dtype, device)
        assert error.value.setting == "weights_dtype"
        check_weights_dtype(model, None, device)
    monkeypatch.setattr(small_weights, "cpu_multiplies_bfloat16", lambda: False)
    with pytest.raises(UserError, match=f"is {dtype}, but this CPU has no instructions for bfloat16"):
        check_weights_dtype(large, dtype)


def test_every_function_refuses_at_the_call(large: GPT) -> None:
    wrong: Any = "int4"
    with pytest.raises(UserError, match="weights_dtype is int4: choose bfloat16 or int8"):
        generate(large, [[1]], 1, weights_dtype=wrong)
    with pytest.raises(UserError, match="weights_dtype is int4"):
        next_token_probabilities(large, [[1]], weights_dtype=wrong)

    class Sink:
        def begin(self, batch: object) -> None:
            raise AssertionError("something was written")

        write = end = begin

    with pytest.raises(UserError, match="weights_dtype is int4"):
        generate_texts(large, CharTokenizer("ab"), [[1]], GenerationConfig(weights_dtype=wrong), Sink())  # type: ignore[arg-type]
