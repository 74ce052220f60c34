"""A model from the contents of a checkpoint, for sampling and export."""

from typing import Any

from gptlit.errors import UserError
from gptlit.training.module import LitGPT


def load_model(checkpoint: dict[str, Any]) -> LitGPT:
    """Return the model of a checkpoint in evaluation mode, with its weights and tokenizer; needs no corpus.

    Args:
        checkpoint: as `gptlit.checkpoint.files.read_checkpoint` returns it.

    Raises:
        UserError: when weights and settings do not belong together.
    """
    try:
        model = LitGPT(**checkpoint["hyper_parameters"] | {"init_from": None})  # a checkpoint holds its own weights
        model.configure_model()
        model.load_state_dict(checkpoint["state_dict"])
    except UserError:
        raise
    except RuntimeError as error:
        raise UserError(f"the checkpoint does not fit its own settings: {error}") from error
    return model.eval()
