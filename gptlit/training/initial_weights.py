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
        self.pretrained: Pretrained = fit_to(load_pretrained(source), **kept)

    @property
    def gpt(self) -> GPTConfig:
        """Architecture of the new run, with the vocabulary of the source."""
        return self.pretrained.gpt

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer of the source, if it has one."""
        return self.pretrained.tokenizer

    def gpt_for(self, vocab_size: int) -> GPTConfig:
        """Return the architecture with the tokenizer's vocabulary, without the padding of the source's.

        Raises:
            UserError: when the sizes do not belong together.
        """
        return fit_to(self.pretrained, vocab_size=vocab_size).gpt

    def load_into(self, network: GPT) -> None:
        """Read the weights into a network of the architecture that `gpt_for` returns."""
        weights = fit_to(self.pretrained, vocab_size=network.config.vocab_size)
        network.load_state_dict(weights.state_dict())
