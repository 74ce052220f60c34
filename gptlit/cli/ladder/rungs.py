"""The rungs of the road: the numbered files of configs/lecture, in their order."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gptlit.cli.settings import flat, packaged_configs
from gptlit.errors import UserError

SCALED = "7_scaled"  # the lecture's last rung wants a GPU: only when it is named
# A rung follows the one before it, but for these: the first has a size for a CPU again, the others leave out a detour.
FOLLOWS = {"8": "6", "10": "9", "13": "12"}
LEFT_OUT = ("val_check_interval", "log_every_n_steps", "estimate_batches", "save_every_n_steps")  # of "what changed"


@dataclass(frozen=True)
class Rung:
    """A configuration of the road."""

    name: str
    """`3_heads`: the name of its file."""
    path: Path
    before: str
    """Number of the rung that it leads on from; empty for the first."""
    change: str
    """What its settings change against that rung's."""

    @property
    def number(self) -> str:
        """`3`, `1b`."""
        return self.name.partition("_")[0]


def all_rungs() -> list[Rung]:
    """The files of the road in their order, each with what it changes."""
    folder = packaged_configs() / "lecture"
    paths = sorted(folder.glob("[0-9]*.yaml"), key=lambda path: order(path.stem))
    rungs: list[Rung] = []
    settings: dict[str, dict[str, Any]] = {}
    previous = ""
    for path in paths:
        number = path.stem.partition("_")[0]
        settings[number] = flat(yaml.safe_load(path.read_text(encoding="utf-8")))
        before = FOLLOWS.get(number, previous)
        change = describe_change(settings[before], settings[number]) if before else "the start"
        rungs.append(Rung(path.stem, path, before, change))
        previous = number
    return rungs


def order(name: str) -> tuple[int, str]:
    """Sorts 1_bigram, 1b_positions, 2_head, …, 10_…."""
    match = re.match(r"(\d+)([a-z]*)_", name)
    return (int(match[1]), match[2]) if match else (0, name)


def describe_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """`n_layer 3, residual`: the settings of `after` that differ from `before`, by their last names."""
    parts = []
    for key, value in after.items():
        name = key.rpartition(".")[2]
        if name in LEFT_OUT or before.get(key) == value:
            continue
        name = "optimizer" if name == "name" else name
        parts.append(f"no {name}" if value is False else name if value is True else f"{name} {value}")
    parts += [f"no {key.rpartition('.')[2]}" for key in before if key not in after]
    return ", ".join(parts)


def choose(rungs: Sequence[Rung], wanted: str | None) -> list[Rung]:
    """The rungs named, in the order of the road; by default all but the one that wants a GPU.

    Raises:
        UserError: for a name that is no rung's.
    """
    if wanted is None:
        return [rung for rung in rungs if rung.name != SCALED]
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    strangers = [name for name in names if not any(name in (rung.number, rung.name) for rung in rungs)]
    if strangers or not names:
        known = ", ".join(rung.number for rung in rungs)
        raise UserError(f"--rungs {wanted}: there is no rung {', '.join(strangers) or 'named'} (there are {known})")
    return [rung for rung in rungs if rung.number in names or rung.name in names]
