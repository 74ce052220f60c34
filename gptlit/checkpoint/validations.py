"""What a checkpoint says about the validations of its run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True)
class Validations:
    """Best and last validation of a run, as `RunCheckpoints` keeps them in every checkpoint."""

    best_loss: float | None = None
    """Nats per token; None if the run was not validated."""
    best_step: int = 0
    last_step: int = 0
    best_part: str | None = None
    """Batches that the best loss is the mean of, such as `1 of 23 batches`; None for the whole validation part."""
    last_part: str | None = None
    """The same of the last validation."""


def validations_of(checkpoint: Mapping[str, Any]) -> Validations:
    """Return the validations that a checkpoint knows of; reads no tensors."""
    state = (checkpoint.get("callbacks") or {}).get("RunCheckpoints") or {}
    if state.get("best_score") is None:
        return Validations(last_step=state.get("validated_step", 0))
    best, last = state.get("best_batches"), state.get("validated_batches")
    limit = limit_in_config(checkpoint) if best is None or last is None else None
    return Validations(
        best_loss=state["best_score"],
        best_step=state["best_step"],
        last_step=state.get("validated_step", state["best_step"]),
        best_part=limit if best is None else part_of(best),
        last_part=limit if last is None else part_of(last),
    )


def part_of(batches: list[int]) -> str | None:
    """Return `1 of 23 batches` for [1, 23]; None if these are all."""
    done, whole = batches
    return None if done == whole else f"{done:,} of {whole:,} batches"


def limit_in_config(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the limit of a run whose checkpoint has no count of batches; None if all were evaluated."""
    text = (checkpoint.get("gptlit") or {}).get("config")
    trainer = (yaml.safe_load(text) if text else {}).get("trainer") or {}
    limit = trainer.get("limit_val_batches")
    if limit is None or (isinstance(limit, float) and limit == 1):
        return None
    return f"at most {limit:,} batch{'es' * (limit != 1)}" if isinstance(limit, int) else f"{limit:.0%} of the batches"
