"""Which architectures each export format can express."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from gptlit.errors import UserError
from gptlit.model.config import REGULARISATION, GPTConfig

SIZES = frozenset({"vocab_size", "block_size", "n_layer", "n_head", "n_embd", "mlp_ratio"})
TRAINING_ONLY = frozenset({*REGULARISATION, "init"})
POSITIVE = ("n_layer", "mlp_ratio")  # no format has a model without blocks, or a block without an MLP


@dataclass(frozen=True, eq=False)
class Dialect:
    """What an architecture of another project can compute.

    A field of `GPTConfig` that is in neither table must have its default value, so that a new switch is refused until
    this table knows it.
    """

    name: str
    """Name of the architecture, for messages."""
    values: Mapping[str, tuple[Any, ...]]
    """Fields of `GPTConfig` with the values it can express."""
    free: frozenset[str]
    """Fields that may have any value."""

    @property
    def fixed(self) -> dict[str, Any]:
        """Fields of `GPTConfig` with the one value that it can express."""
        return {name: allowed[0] for name, allowed in self.values.items() if len(allowed) == 1}

    def obstacles(self, gpt: GPTConfig) -> list[str]:
        """Return one phrase for each setting of `gpt` that this architecture cannot express."""
        found = []
        for field in fields(gpt):
            value = getattr(gpt, field.name)
            allowed = self.values.get(field.name, () if field.name in self.free else (field.default,))
            if allowed and value not in allowed:
                found.append(f"model.gpt.{field.name} {show(value)} (only {' or '.join(map(show, allowed))})")
        found += [f"model.gpt.{name} 0 (only 1 or more)" for name in POSITIVE if getattr(gpt, name) == 0]
        return found


def show(value: Any) -> str:
    """Return a value as YAML writes it."""
    return json.dumps(value).strip('"')


GPT2_VALUES: dict[str, tuple[Any, ...]] = {
    "position": ("learned",),
    "norm": ("layernorm",),
    "residual": (True,),
    "qk_norm": (False,),
    "logit_softcap": (None,),
}
GPT2_FREE = SIZES | TRAINING_ONLY | {"bias", "qkv_bias", "tie_weights", "rope_base", "activation"}
GPT2 = Dialect("GPT2LMHeadModel", GPT2_VALUES, GPT2_FREE)
NANOCHAT = Dialect(
    "NanoChatForCausalLM",
    {
        "position": ("rope",),
        "norm": ("rmsnorm",),
        "residual": (True,),
        "qk_norm": (True,),
        "bias": (False,),
        "qkv_bias": (False,),
    },
    SIZES | TRAINING_ONLY | {"activation", "tie_weights", "rope_base", "logit_softcap"},
)
GGUF = Dialect("GGUF's gpt2", GPT2_VALUES | {"activation": ("gelu", "gelu_tanh")}, GPT2_FREE)
NANOGPT = Dialect(
    "nanoGPT", GPT2_VALUES | {"activation": ("gelu",), "tie_weights": (True,), "mlp_ratio": (4,)}, GPT2_FREE
)


def require_dialect(gpt: GPTConfig, *candidates: Dialect) -> Dialect:
    """Return the first architecture that computes the same function as `gpt`.

    Raises:
        UserError: if there is none; names what the nearest one cannot express.
    """
    nearest = min(candidates, key=lambda dialect: len(dialect.obstacles(gpt)))
    obstacles = nearest.obstacles(gpt)
    if obstacles:
        raise UserError(
            f"this model cannot be exported to {nearest.name}, which has no {', nor '.join(obstacles)}: "
            "--format onnx takes every model"
        )
    return nearest
