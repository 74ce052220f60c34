"""The GPT equals the lecture's formulas in every dialect, with the published numbers of parameters."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from conftest import DIALECTS, LECTURE, NANOGPT, random_gpt
from lightning.fabric.utilities.throughput import measure_flops
from torch import Tensor
from torch.nn import functional as F

from gptlit.errors import UserError
from gptlit.model.block import CausalSelfAttention, attend, plain_attention_is_faster, rms_norm, shift_tokens
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT, meta_model
from gptlit.model.kv_cache import KVCache
from gptlit.model.loss import cross_entropy
from gptlit.model.noise import drop, with_noise
from gptlit.model.rope import rope_angles, rotate

SCALED = {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384}
PUBLISHED_COUNTS = {
    "lecture, bigram": (DIALECTS["bigram"], 4_225),
    "lecture, positions": (DIALECTS["positions"], 4_481),
    "lecture, residual": (DIALECTS["residual"], 41_921),
    "lecture, layernorm": (DIALECTS["layernorm"], 42_369),
    "lecture, scaled up": ({**LECTURE, **SCALED, "norm": "layernorm"}, 10_788_929),
    "nanoGPT, GPU": ({**NANOGPT, **SCALED}, 10_745_088),
    "nanoGPT, CPU": ({**NANOGPT, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}, 804_096),
    "GPT-2": (
        {
            **NANOGPT,
            "vocab_size": 50_257,
            "block_size": 1024,
            "n_layer": 12,
            "n_head": 12,
            "n_embd": 768,
            "bias": True,
            "qkv_bias": True,
        },
        124_439_808,
    ),
}


@pytest.mark.parametrize(("fields", "count"), PUBLISHED_COUNTS.values(), ids=PUBLISHED_COUNTS)
def test_parameter_counts_are_the_published_ones(fields: dict, count: int) -> None:
    """Guards against a missing or an extra bias, tie or norm."""
    model = meta_model(GPTConfig(**fields))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_set_of_switches_is_frozen() -> None:
    """A new switch needs a measured benefit: change this test together with the measurement."""
    assert [field.name for field in dataclasses.fields(GPTConfig)] == [
        "vocab_size",
        "block_size",
        "n_layer",
        "n_head",
        "n_embd",
        "dropout",
        "attention_dropout",
        "embedding_dropout",
        "token_noise",
        "bias",
        "qkv_bias",
        "position",
        "rope_base",
        "norm",
        "residual",
        "mlp_ratio",
        "activation",
        "token_shift",
        "qk_norm",
        "tie_weights",
        "logit_softcap",
        "init",
    ]


def written_out_attention(attn: CausalSelfAttention, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """The lecture's attention, head by head: q·kᵀ/√d, lower-triangular mask, softmax, ·v, concatenation, projection."""
    T, C = x.shape[1:]
    D = C // attn.n_head
    mask = torch.tril(torch.ones(T, T, dtype=torch.bool))
    q, k, v = attn.c_attn(x).split(C, dim=2)  # (B, T, C) each
    heads = []
    for h in range(attn.n_head):
        qh, kh, vh = (part[:, :, h * D : (h + 1) * D] for part in (q, k, v))  # (B, T, D) each
        if rotation is not None:
            qh, kh = (turned_by_complex_numbers(part, rotation) for part in (qh, kh))
        if attn.qk_norm:
            qh, kh = (part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in (qh, kh))
        weights = qh @ kh.transpose(1, 2) / math.sqrt(D)  # (B, T, T)
        weights = weights.masked_fill(~mask, float("-inf")).softmax(-1)
        heads.append(weights @ vh)  # (B, T, D)
    return attn.c_proj(torch.cat(heads, dim=2))


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_plain_and_fused_attention_agree(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a mask, at the precisions that choose between them."""
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    mask = torch.rand(2, 1, 7, 7) > 0.3
    mask[..., 0] = True
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert plain_attention_is_faster(q) == (precision == "medium")
    fused = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attend(q, k, v, None, 0.0), fused(q, k, v, is_causal=True))
    torch.testing.assert_close(attend(q, k, v, mask, 0.0), fused(q, k, v, attn_mask=mask))
    torch.testing.assert_close(attend(q[:, :, :1], k, v, None, 0.0), fused(q[:, :, :1], k, v))


def turned_by_complex_numbers(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding as multiplication by e^(-iθ)."""
    half = x.size(-1) // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(rotation[0], -rotation[1])
    return torch.cat((z.real, z.imag), dim=-1)


def test_attention_equals_the_lectures_formula(dialect: GPTConfig) -> None:
    """Guards against a wrong mask, scale, head split or rotation in the call of the fused kernel."""
    if not dialect.n_layer:
        pytest.skip("no attention in this dialect")
    model = random_gpt(dialect)
    x = torch.randn(3, 7, dialect.n_embd, dtype=torch.float64)
    rotation = model.rotation(torch.arange(7), torch.float64)
    for block in model.transformer["h"]:
        torch.testing.assert_close(block.attn(x, rotation), written_out_attention(block.attn, x, rotation))


def test_no_token_sees_the_future(dialect: GPTConfig) -> None:
    """Changing token t changes no logits before t, and does change those at t."""
    model = random_gpt(dialect)
    T = dialect.block_size
    ids = torch.randint(65, (2, T))
    logits = model(ids)
    for t in (0, T // 2, T - 1):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % 65
        changed = model(other)
        torch.testing.assert_close(changed[:, :t], logits[:, :t], rtol=0, atol=0)
        assert (changed[:, t] != logits[:, t]).any()


def test_every_parameter_receives_a_gradient(dialect: GPTConfig) -> None:
    """Guards against a module that the forward pass does not use."""
    model = random_gpt(dialect)
    ids = torch.randint(65, (4, dialect.block_size))
    F.cross_entropy(model(ids).flatten(0, 1), torch.randint(65, (4 * dialect.block_size,))).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("name", ["bigram", "positions", "residual", "nanogpt", "modern"])
def test_the_first_loss_is_that_of_guessing(name: str) -> None:
    """The loss of a new model is ln(65). Guards against an init with confident predictions."""
    torch.manual_seed(0)
    config = GPTConfig(**DIALECTS[name])
    ids = torch.randint(65, (64, config.block_size + 1))
    loss = F.cross_entropy(GPT(config)(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(65)) < 0.06


def test_init_follows_its_table() -> None:
    """Guards against an output projection with the scale of another architecture."""
    torch.manual_seed(0)
    wide = {"vocab_size": 65, "n_layer": 8, "n_embd": 256}
    projections = {
        init: [p for name, p in GPT(GPTConfig(**wide, init=init)).named_parameters() if name.endswith("c_proj.weight")]
        for init in ("normal", "scaled", "zero")
    }
    for parameter in projections["normal"]:
        assert parameter.std().item() == pytest.approx(0.02, rel=0.03)
    for parameter in projections["scaled"]:
        assert parameter.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    for parameter in projections["zero"]:
        assert not parameter.any()


@pytest.mark.parametrize("pieces", [(16,), (1,) * 16, (5, 1, 1, 9), (3, 13)], ids=str)
def test_a_cached_forward_pass_equals_a_full_one(dialect: GPTConfig, pieces: tuple[int, ...]) -> None:
    """Guards against wrong masks and positions when the cache is not empty."""
    model = random_gpt(dialect)
    ids = torch.randint(65, (3, dialect.block_size))
    cache = KVCache(dialect, 3, dtype=torch.float64)
    parts = ids.split(fitting(pieces, dialect.block_size), dim=1)
    torch.testing.assert_close(torch.cat([model(part, cache) for part in parts], dim=1), model(ids))


def fitting(pieces: tuple[int, ...], total: int) -> list[int]:
    """Return the pieces, cut off at a sum of `total`."""
    kept: list[int] = []
    for piece in pieces:
        kept.append(min(piece, total - sum(kept)))
    return [piece for piece in kept if piece > 0]


def test_rows_of_different_lengths_share_a_cache(dialect: GPTConfig) -> None:
    """Prompts padded on the right, then one token each: guards against rows that read another row's padding."""
    model = random_gpt(dialect)
    prompts = [torch.randint(65, (length,)) for length in (3, 6, 1)]
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    cache = KVCache(dialect, 3, dtype=torch.float64)
    model(padded, cache)
    cache.truncate(torch.tensor([3, 6, 1]))
    for _ in range(2):
        new = torch.randint(65, (3, 1))
        prompts = [torch.cat((prompt, token)) for prompt, token in zip(prompts, new, strict=True)]
        logits = model(new, cache)
        for row, prompt in enumerate(prompts):
            torch.testing.assert_close(logits[row, -1], model(prompt[None])[0, -1])


def test_too_long_a_context_is_refused(dialect: GPTConfig) -> None:
    """Guards against an index error deep inside the position table."""
    with pytest.raises(UserError, match="block_size"):
        random_gpt(dialect)(torch.zeros(1, dialect.block_size + 1, dtype=torch.int64))


def test_each_group_of_channels_is_shifted_by_its_own_distance() -> None:
    """Guards against a shift by one too many, into the future, or across the start."""
    x = torch.arange(1, 6, dtype=torch.float64)[None, :, None].expand(1, 5, 8)  # position t holds t + 1
    shifted = shift_tokens(x, 2, 4)[0]
    assert shifted[:, :2].tolist() == [[t, t] for t in (0, 1, 2, 3, 4)]
    assert shifted[:, 2:4].tolist() == [[t, t] for t in (0, 0, 1, 2, 3)]
    assert torch.equal(shifted[:, 4:], x[0, :, 4:])


def test_no_position_depends_on_later_tokens(dialect: GPTConfig) -> None:
    """Guards against a very low loss of a model that sees the tokens to predict."""
    model = random_gpt(dialect)
    ids = torch.randint(65, (2, dialect.block_size))
    changed = ids.clone()
    changed[:, 5:] = (ids[:, 5:] + 1) % 65
    assert torch.equal(model(ids)[:, :5], model(changed)[:, :5])


def test_rope_scores_depend_on_distance_only() -> None:
    """The score of a query at p and a key at r is a function of p - r."""
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(p: int, r: int) -> float:
        at_p, at_r = (rope_angles(torch.tensor([x]), 8, 1e4, torch.float64) for x in (p, r))
        return (rotate(q, *at_p) * rotate(k, *at_r)).sum().item()

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-12)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-6)


def test_rms_norm_gives_a_root_mean_square_of_one() -> None:
    """Guards against a norm over the wrong axis."""
    x = torch.randn(4, 5, 64, dtype=torch.float64) * 30
    torch.testing.assert_close(rms_norm(x).square().mean(-1), torch.ones(4, 5, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_embd": 100, "n_head": 3}, "n_embd is 100, which is not a multiple of n_head"),
        ({"block_size": 0}, "block_size is 0"),
        ({"n_layer": -1}, "n_layer is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"n_embd": 12, "n_head": 4}, "even number"),
        ({"logit_softcap": 0.0}, "logit_softcap"),
        ({"token_shift": 4}, "token_shift is 4"),
        ({"token_shift": 1, "mlp_ratio": 0}, "needs an MLP"),
    ],
)
def test_an_impossible_architecture_is_refused_by_name(fields: dict, words: str) -> None:
    """Guards against a shape error later, far from the setting that caused it."""
    with pytest.raises(UserError, match=words) as caught:
        GPTConfig(**fields)
    assert caught.value.setting in {field.name for field in dataclasses.fields(GPTConfig)}


def test_dropout_zeroes_the_right_fraction_and_rescales() -> None:
    """Dropout by random bytes, as on a CPU: a fraction p of zeros, the rest times 1 / (1 - p)."""
    model = GPT(GPTConfig(vocab_size=65, dropout=0.25)).train()
    x = torch.ones(8, 64, 128)
    for random_bytes in (model.dropout_bytes(x)[0, 0], None):
        dropped = drop(x, 0.25, random_bytes)
        assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
        assert dropped.max().item() == pytest.approx(4 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_noise_is_as_rare_in_every_default_dtype(dtype: torch.dtype) -> None:
    """Lightning's bf16-true and 16-true set it; their random numbers were 0 once in 512 or 4,096."""
    torch.manual_seed(0)
    ids = torch.full((2_000_000,), 1_000)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        share = (with_noise(ids, 0.001, 1_000) != ids).double().mean().item()
    finally:
        torch.set_default_dtype(before)
    assert share == pytest.approx(0.001, rel=0.1)


def test_token_noise_replaces_the_right_fraction_of_tokens_in_training_only() -> None:
    """Guards against noise in sampling and validation."""
    torch.manual_seed(0)
    ids = torch.full((100, 100), 7)
    share = (with_noise(ids, 0.2, 50) != ids).float().mean().item()
    assert share == pytest.approx(0.2 * 49 / 50, abs=0.02)
    model = GPT(GPTConfig(**DIALECTS["modern"] | {"token_noise": 0.5, "init": "normal"}))
    ids = torch.randint(65, (2, 8))
    assert not torch.equal(model.train()(ids), model.train()(ids))
    assert torch.equal(model.eval()(ids), model.eval()(ids))


def test_dropout_is_off_outside_training_and_follows_the_seed() -> None:
    """Guards against sampling with dropout, and against masks that do not follow the seed."""
    config = GPTConfig(**DIALECTS["modern"] | {"dropout": 0.3, "init": "normal"})
    model = GPT(config)
    ids = torch.randint(65, (4, 16))
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model.train()(ids))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(model.eval()(ids), model(ids))


# ---------------------------------------------------------------- ignored targets


@pytest.mark.parametrize("ignored", [-100, -1, -7])
def test_negative_targets_are_ignored(ignored: int) -> None:
    """Loss and gradients are those of the other positions, bit-exactly."""
    model = random_gpt(GPTConfig(**DIALECTS["nanogpt"]))
    ids = torch.randint(65, (3, 8), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[:, 5:] = ignored
    targets[1] = ignored
    model(ids, targets=targets).backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    loss = F.cross_entropy(model(ids)[[0, 2], :5].flatten(0, 1), targets[[0, 2], :5].flatten())
    loss.backward()
    torch.testing.assert_close(model(ids, targets=targets), loss)
    torch.testing.assert_close(gradient, model.lm_head.weight.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_with_all_targets_ignored_has_zero_loss_and_gradients(reduction: str) -> None:
    """The mean of an empty set would be NaN, which stops training."""
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 3), -1), reduction)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_loss_that_is_nan_stays_nan() -> None:
    """Guards against a rule for ignored targets that hides divergence."""
    assert cross_entropy(torch.full((1, 2, 5), torch.nan), torch.zeros(1, 2, dtype=torch.long)).isnan()


# ---------------------------------------------------------------- other programs


def test_the_meta_model_has_the_names_and_shapes_of_the_model(dialect: GPTConfig) -> None:
    model = meta_model(dialect)
    assert all(parameter.is_meta for parameter in model.parameters())
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in GPT(dialect).state_dict().items()}


def test_a_model_on_the_meta_device_computes_shapes(dialect: GPTConfig) -> None:
    """Building it failed with RoPE, and a forward pass with rmsnorm."""
    noisy = dataclasses.replace(dialect, dropout=0.1, embedding_dropout=0.1, token_noise=0.1)
    with torch.device("meta"):
        built, ids = GPT(noisy), torch.zeros(2, 7, dtype=torch.long)
    for model in (built, GPT(noisy).to("meta")):
        cache = KVCache(dialect, 2, "meta")
        logits = model.train()(ids)
        loss = model(ids, targets=ids)
        assert (logits.shape, loss.shape, logits.device.type) == ((2, 7, dialect.vocab_size), (), "meta")
        loss.backward()
        assert [model.eval()(part, cache).size(1) for part in ids.split((5, 2), dim=1)] == [5, 2]
        assert measure_flops(model, partial(model, ids)) > 0


def test_a_model_of_the_meta_device_computes_with_the_weights_it_is_given(dialect: GPTConfig) -> None:
    """The tables of RoPE are in no checkpoint: `to_empty` must not leave them as they are in memory."""
    expected, ids = random_gpt(dialect), torch.randint(65, (2, 7))
    before = torch.get_rng_state()
    model = meta_model(dialect).double().to_empty(device="cpu").eval()
    assert torch.equal(before, torch.get_rng_state())
    model.load_state_dict(expected.state_dict())
    assert torch.equal(model(ids), expected(ids))
    model = meta_model(dialect).eval()
    model.load_state_dict(expected.state_dict(), assign=True)
    model.make_rope_tables()
    assert torch.equal(model(ids), expected(ids))


def test_torch_export_takes_any_batch_and_length(dialect: GPTConfig) -> None:
    model, T = random_gpt(dialect), dialect.block_size
    dimensions = {"ids": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=T)}}
    example = torch.randint(65, (2, 4))
    exported = torch.export.export(model, (example,), dynamic_shapes=dimensions)
    for shape in ((1, T), (3, 5)):
        ids = torch.randint(65, shape)
        torch.testing.assert_close(exported.module()(ids), model(ids))


@pytest.mark.filterwarnings("ignore")
def test_torch_jit_trace_takes_any_batch_of_the_traced_length(dialect: GPTConfig) -> None:
    model = random_gpt(dialect)
    with torch.no_grad():
        traced = torch.jit.trace(model, (torch.randint(65, (2, 7)),))
        ids = torch.randint(65, (5, 7))
        torch.testing.assert_close(traced(ids), model(ids))
