"""The rungs of the ladder: the numbered files of configs/lecture, in their order."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gptlit.cli.packaged import packaged_configs
from gptlit.cli.settings import flat
from gptlit.errors import UserError

SCALED = "7_scaled"  # the lecture's last rung, too large for a CPU: trained only if it is named
# A rung continues the one before it, except for these: 8 has a size for a CPU again, the others leave out a detour.
FOLLOWS = {"8": "6", "10": "9", "13": "12"}
NOT_A_CHANGE = ("val_check_interval", "log_every_n_steps", "estimate_batches", "save_every_n_steps")


@dataclass(frozen=True)
class Rung:
    """A configuration of the ladder."""

    name: str
    """`3_heads`: the name of its file."""
    path: Path
    before: str
    """Number of the rung that it continues; empty for the first."""
    change: str
    """Settings that differ from that rung's."""

    @property
    def number(self) -> str:
        """`3`, `1b`."""
        return self.name.partition("_")[0]


def all_rungs(overrides: Mapping[str, Any] | None = None) -> list[Rung]:
    """Return the rungs in their order.

    Args:
        overrides: settings that replace those of every rung, by their full names.
    """
    folder = packaged_configs() / "lecture"
    paths = sorted(folder.glob("[0-9]*.yaml"), key=lambda path: order(path.stem))
    rungs: list[Rung] = []
    settings: dict[str, dict[str, Any]] = {}
    previous = ""
    for path in paths:
        number = path.stem.partition("_")[0]
        settings[number] = flat(yaml.safe_load(path.read_text(encoding="utf-8"))) | dict(overrides or {})
        before = FOLLOWS.get(number, previous)
        change = describe_change(settings[before], settings[number]) if before else "the start"
        rungs.append(Rung(path.stem, path, before, change))
        previous = number
    return rungs


def order(name: str) -> tuple[int, str]:
    """Return the key that sorts 1_bigram, 1b_positions, 2_head, …, 10_…."""
    match = re.match(r"(\d+)([a-z]*)_", name)
    return (int(match[1]), match[2]) if match else (0, name)


def describe_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return the settings of `after` that differ from `before`, by their last names: `n_layer 3, residual`."""
    parts = []
    for key, value in after.items():
        name = key.rpartition(".")[2]
        if name in NOT_A_CHANGE or before.get(key) == value:
            continue
        name = "optimizer" if name == "name" else name
        parts.append(f"no {name}" if value is False else name if value is True else f"{name} {value}")
    parts += [f"no {key.rpartition('.')[2]}" for key in before if key not in after]
    return ", ".join(parts)


def choose(rungs: Sequence[Rung], wanted: str | None) -> list[Rung]:
    """Return the rungs that are named, in their order; by default all except the one that needs a GPU.

    Raises:
        UserError: if there is no rung of that name.
    """
    if wanted is None:
        return [rung for rung in rungs if rung.name != SCALED]
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if not any(name in (rung.number, rung.name) for rung in rungs)]
    if unknown or not names:
        known = ", ".join(rung.number for rung in rungs)
        missing = f"there is no configuration {', '.join(unknown)}" if unknown else "no configuration is named"
        raise UserError(f"--rungs {wanted}: {missing}: choose from {known}")
    return [rung for rung in rungs if rung.number in names or rung.name in names]
