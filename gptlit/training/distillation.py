"""Knowledge distillation: a model that also learns from the predictions of trained ones (arXiv:1503.02531)."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlit.convert.pretrained import fit_to, load_pretrained
from gptlit.convert.source import Pretrained
from gptlit.errors import UserError, require
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.model.loss import cross_entropy
from gptlit.tokenizer import Tokenizer

SETTING, WEIGHT_SETTING = "model.teachers", "model.teacher_weight"
TEACHER_WEIGHT = 0.5  # by default


class Teachers:
    """Trained models that predict next to the one that is trained. They are in no checkpoint of it.

    Args:
        sources: as `gptlit.convert.pretrained.load_pretrained` takes them; weights are read by `load`.

    Raises:
        UserError: when a source cannot be read.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sources)
        with _as_teachers():
            self.pretrained = [load_pretrained(source) for source in self.sources]
        self.networks: list[GPT] = []
        self.digests: dict[str, str] = {}
        """SHA-256 of the weights by source, once they are loaded."""

    def fitted(self, gpt: GPTConfig, tokenizer: Tokenizer) -> list[Pretrained]:
        """Return the teachers with the vocabulary of a model that is trained. Reads no weights.

        Args:
            gpt: architecture of that model, with its vocabulary.
            tokenizer: of its data.

        Raises:
            UserError: names the teacher with other tokens or a shorter context.
        """
        for teacher in self.pretrained:
            if teacher.tokenizer is not None and teacher.tokenizer != tokenizer:
                raise UserError(
                    f"{teacher.source} was trained with other tokens than those of the data: train it on the same text",
                    SETTING,
                )
            if teacher.gpt.block_size < gpt.block_size:
                raise UserError(
                    f"{teacher.source} reads {teacher.gpt.block_size} tokens, but model.gpt.block_size is "
                    f"{gpt.block_size}: choose that or less",
                    SETTING,
                )
        with _as_teachers():
            return [fit_to(teacher, vocab_size=gpt.vocab_size) for teacher in self.pretrained]

    def load(self, gpt: GPTConfig, tokenizer: Tokenizer) -> None:
        """Read the weights, once.

        Raises:
            UserError: as `fitted`, and when weights are damaged or not finite.
        """
        if self.networks:
            return
        for source, teacher in zip(self.sources, self.fitted(gpt, tokenizer), strict=True):
            with _as_teachers():
                weights = teacher.state_dict()
            if not all(bool(weight.isfinite().all()) for weight in weights.values()):
                raise UserError(f"{teacher.source} holds non-finite weights: train it again", SETTING)
            with torch.random.fork_rng(devices=[]):  # its initial weights are overwritten
                network = GPT(teacher.gpt)
            network.load_state_dict(weights)
            self.networks.append(network.eval().requires_grad_(False))
            self.digests[source] = _digest(network)

    def move_to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights to the device of the model that is trained, in the type of its weights."""
        for network in self.networks:
            network.to(device, dtype)

    def require_those_of(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with other weights under the same name: the result would be that of neither.

        Raises:
            UserError: names the teacher.
        """
        before: dict[str, str] = checkpoint.get("gptlit", {}).get("teachers") or {}
        for source, digest in self.digests.items():
            if before.get(source, digest) != digest:
                raise UserError(
                    f"{source} has other weights than before the resume: put the old ones back, or name other teachers",
                    SETTING,
                )

    @torch.no_grad()
    def probabilities(self, ids: Tensor) -> Tensor:
        """Return the mean of the predicted probabilities (B, T, V), float32 or better, for ids (B, T)."""
        total = None
        for network in self.networks:
            logits = network(ids)
            found = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            total = found if total is None else total.add_(found)
        assert total is not None
        return total.div_(len(self.networks))


def make_teachers(teachers: str | Sequence[str] | None, weight: float) -> Teachers | None:
    """Return the teachers of these names, or None.

    Raises:
        UserError: when a name is empty or given twice, or the weight is out of its range or without teachers.
    """
    names = [teachers] if isinstance(teachers, str) else list(teachers or ())
    if not names:
        if weight != TEACHER_WEIGHT:
            raise UserError(f"is {weight}, but there are no {SETTING}: name them, or leave it out", WEIGHT_SETTING)
        return None
    require(0 < weight <= 1, WEIGHT_SETTING, weight, "above 0 and at most 1")
    if not all(names):
        raise UserError("has an empty name: give a run folder or a checkpoint file", SETTING)
    if "null" in names and not Path("null").exists():
        raise UserError("names null, and a text is taken as it is typed: write '[]' for no teachers", SETTING)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"names {twice} twice: name each model once", SETTING)
    return Teachers(names)


def distillation_loss(logits: Tensor, targets: Tensor, probabilities: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return the training loss, and the plain cross-entropy, which is what curves show.

    The loss is (1 − weight) · cross-entropy with the targets + weight · cross-entropy with the teachers' prediction.

    Args:
        logits: (B, T, V).
        targets: (B, T); negative ones are ignored in both terms.
        probabilities: of the teachers, (B, T, V).
        weight: of their prediction, in (0, 1].

    Returns:
        Two scalars in nats per token, the second without gradient.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    plain = cross_entropy(wide, targets)
    counted = targets >= 0
    soft = -(probabilities * wide.log_softmax(-1)).sum(-1) * counted  # (B, T)
    soft = soft.sum() / counted.sum().clamp(min=1)
    return torch.lerp(plain, soft, weight), plain.detach()


@contextmanager
def _as_teachers() -> Iterator[None]:
    """Name the setting of the teachers in errors about a model to start from."""
    try:
        yield
    except UserError as error:
        error.setting = SETTING
        raise


def _digest(network: GPT) -> str:
    sha = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()
