"""Starting a run from the weights of another model (`model.init_from`)."""

from gptlit.convert.pretrained import Pretrained, fit_to, load_pretrained
from gptlit.model.config import REGULARISATION, GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import Tokenizer


class InitialWeights:
    """Weights, architecture and tokenizer of a model to start from; the weights are read last, by `load_into`.

    Args:
        source: as `gptlit.convert.pretrained.load_pretrained` takes it.
        gpt: `block_size` and the regularisation are taken from here, everything else from the source.

    Raises:
        UserError: when the source cannot be read, or contradicts `gpt`.
    """

    def __init__(self, source: str, gpt: GPTConfig) -> None:
        kept = {name: getattr(gpt, name) for name in ("block_size", *REGULARISATION)}
        self._pretrained: Pretrained = fit_to(load_pretrained(source), **kept)

    @property
    def gpt(self) -> GPTConfig:
        """Architecture of the new run."""
        return self._pretrained.gpt

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer of the source, if it has one."""
        return self._pretrained.tokenizer

    def fit_vocabulary(self, size: int) -> None:
        """Crop the padding of the source's vocabulary to the tokenizer's size.

        Raises:
            UserError: when the sizes do not belong together.
        """
        self._pretrained = fit_to(self._pretrained, vocab_size=size)

    def load_into(self, network: GPT) -> None:
        """Read the weights."""
        network.load_state_dict(self._pretrained.state_dict())
