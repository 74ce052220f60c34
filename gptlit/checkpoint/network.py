"""The network and tokenizer of a checkpoint, without Lightning."""

from typing import Any

from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import Tokenizer, from_json

PREFIX = "net."  # of the network's weights in the state dict of LitGPT


def load_network(checkpoint: dict[str, Any]) -> tuple[GPT, Tokenizer]:
    """Return the network of a checkpoint, with its weights, in evaluation mode, and its tokenizer.

    Args:
        checkpoint: content of a checkpoint, see `gptlit.checkpoint.files.read_checkpoint`.

    Raises:
        UserError: if the weights do not fit the settings in the checkpoint.
    """
    hyper = checkpoint["hyper_parameters"]
    network = GPT(GPTConfig(**hyper["gpt"]))
    weights = checkpoint["state_dict"].items()
    try:
        network.load_state_dict({name.removeprefix(PREFIX): w for name, w in weights if name.startswith(PREFIX)})
    except RuntimeError as error:
        raise UserError(f"the weights of the checkpoint do not fit its settings: {error}") from error
    return network.eval(), from_json(hyper["tokenizer"])
