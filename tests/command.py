"""Run the command in tests: in this process, which is fast, or in its own process, which can be killed."""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import yaml

from gptlit import __main__, cli

torch.set_num_threads(1)  # models this small gain nothing from more
REPOSITORY = Path(__file__).parent.parent
PLAY = REPOSITORY / "gptlit" / "assets" / "play.txt"
SMALL = {  # everything that resume must restore: dropout, Muon, clipping, different intervals of validation and saving
    "seed_everything": 7,
    "model": {
        "gpt": {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.3},
        "optimizer": {"name": "muon", "lr": 5e-3, "muon_lr": 0.02},
        "schedule": {"shape": "cosine", "warmup_steps": 3},
    },
    "data": {"corpus": "TEXT", "batch_size": 8, "eval_batch_size": 16},
    "trainer": {
        "max_steps": 20,
        "val_check_interval": 6,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "accelerator": "cpu",
        "devices": 1,
    },
    "save_every_n_steps": 5,
    "sample_text": {"max_new_tokens": 0},
    "pictures": {"when": "never"},
}


EXTRA_CALLBACKS: list[pl.Callback] = []


@contextlib.contextmanager
def extra_callbacks(*callbacks: pl.Callback) -> Iterator[None]:
    """Add callbacks to the Trainer of every `gptlit("fit", …)`, validate and test inside."""
    EXTRA_CALLBACKS.extend(callbacks)
    try:
        yield
    finally:
        EXTRA_CALLBACKS.clear()


class At(pl.Callback):
    """Callback that runs an action once, at a hook, after a given number of optimizer steps."""

    def __init__(self, hook: str, step: int, action: Callable[[], Any]) -> None:
        self.done = False

        def act(trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == step and not self.done:
                self.done = True
                action()

        setattr(self, hook, act)


@dataclass(frozen=True)
class Answer:
    """Exit code and output of the command."""

    code: int
    out: str
    err: str


def gptlit(*arguments: Any) -> Answer:
    """Run `gptlit ARGUMENTS` in this process; exceptions that would be tracebacks propagate."""
    if arguments[0] == "fit" and "--ckpt_path" in arguments:
        # TensorBoard sorts event files by the second in their names; in tests a run can resume within the same second.
        time.sleep(1 - time.time() % 1)
    out, err = Stream(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["gptlit", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            if EXTRA_CALLBACKS and arguments[0] in ("fit", "validate", "test"):
                verb, *flags = map(str, arguments)
                code = cli.run(verb, flags, extra_callbacks=tuple(EXTRA_CALLBACKS))
            else:
                code = __main__.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


class Stream(io.StringIO):
    """Captured stdout for `gptlit predict`, which reconfigures the real one."""

    def reconfigure(self, **settings: Any) -> None:
        """Accept and ignore any encoding."""


def start(*arguments: Any, env: Mapping[str, str] | None = None, **options: Any) -> "subprocess.Popen[str]":
    """Start `gptlit ARGUMENTS` in its own process, with stderr as a pipe."""
    command = [sys.executable, "-m", "gptlit", *map(str, arguments)]
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(command, env=environment, text=True, **{"stderr": subprocess.PIPE, **options})


def write_config(folder: Path, **changes: Any) -> Path:
    """Write `small.yaml` and its text; `changes` are settings named by flag, with two underscores for a dot."""
    config = yaml.safe_load(yaml.safe_dump(SMALL))
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(PLAY.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    config["data"]["corpus"] = str(text)
    for name, value in changes.items():
        *groups, last = name.split("__")
        place = config
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint."""
    return torch.load(path, map_location="cpu", weights_only=True)


REPORT: dict[str, list[tuple[str, ...]]] = {}
# With several workers of pytest-xdist each writes a file of its own: FILE.gw0, FILE.gw1, …
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
REPORT_FILE = os.environ.get("GPTLIT_REPORT") and Path(f"{os.environ['GPTLIT_REPORT']}.{WORKER}".rstrip(".")).resolve()


def report(table: str, header: tuple[str, ...], *cells: object) -> None:
    """Add a row to a generated table of tests/README.md, if `GPTLIT_REPORT=FILE` asks for them.

    Args:
        table: name of the table.
        header: titles of the columns; the same in every call for a table.
        cells: the row.
    """
    if not REPORT_FILE:
        return
    rows = REPORT.setdefault(table, [header, ("---",) * len(header)])
    rows.append(tuple(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells))
    lines = [f"## {name}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows) for name, rows in REPORT.items()]
    Path(REPORT_FILE).write_text("\n".join(lines), encoding="utf-8")


def tensors(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors of nested dicts and lists with their paths."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors(value, f"{name}/{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from tensors(value, f"{name}/{index}")


def digest(path: Path) -> str:
    """Return the SHA-256 of the weights, their average if there is one, and the optimizer state of a checkpoint."""
    checkpoint = load(path)
    sha = hashlib.sha256()
    state = {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "global_step")}
    state["current_model_state"] = checkpoint.get("current_model_state")  # raw weights next to an average
    for name, tensor in tensors(state):
        sha.update(name.encode())
        sha.update(tensor.contiguous().numpy().tobytes())
    sha.update(str(state["global_step"]).encode())
    return sha.hexdigest()
