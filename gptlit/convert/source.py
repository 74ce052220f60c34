"""A model to start from, wherever it comes from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gptlit.convert.gpt2_weights import Weights
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import meta_model
from gptlit.tokenizer import Tokenizer

SETTING = "model.init_from"  # for messages


@dataclass(frozen=True)
class Pretrained:
    """A model to start from. Cheap: weights are read when `state_dict()` is called."""

    gpt: GPTConfig
    """Its architecture."""
    tokenizer: Tokenizer | None
    """Its vocabulary; None if the source has none, and the data must bring one of `gpt.vocab_size` tokens."""
    source: str
    """Description for messages."""
    state_dict: Callable[[], Weights]
    """Read the weights, under the names of `GPT(gpt).state_dict()`."""
    checkpoint: Mapping[str, Any] | None = None
    """The complete content of the file, where that is a checkpoint of gptlit."""


def check_complete(weights: Weights, gpt: GPTConfig, source: object) -> Weights:
    """Return the weights if their names and shapes are those of the architecture.

    Raises:
        UserError: names one that is missing, unknown or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in meta_model(gpt).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{source}: {name} has the shape {found.get(name)} where its configuration says {expected.get(name)}: "
                "the file is damaged, or of another architecture",
                SETTING,
            )
    return weights


def crop_vocabulary(weights: Weights, vocab_size: int) -> Weights:
    """Keep the first `vocab_size` rows of the embedding and the head."""
    names = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")
    if weights[names[0]].size(0) == vocab_size:
        return dict(weights)
    return {name: tensor[:vocab_size].clone() if name in names else tensor for name, tensor in weights.items()}
