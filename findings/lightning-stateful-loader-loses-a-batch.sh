#!/usr/bin/env bash
# lightning 2.6.6, torchdata 0.11.0, torch 2.13.0: a resume in the middle of an epoch leaves out a batch of a stream.
# expected: Lightning saves the state of a StatefulDataLoader in its checkpoints and restores it, so the resumed fit
#           begins with the batch after the last one that was trained on, as with a data set that has a length.
# seen:     of a loader without a length (an IterableDataset, a streamed text) Lightning takes one batch ahead, to know
#           which one is the last, and saves the loader's state after it. That batch is never trained on: one is lost at
#           every resume, without a warning. A loader with a length resumes exactly.
# remedy:   give the data set its length (`__len__`).
# usage:    findings/lightning-stateful-loader-loses-a-batch.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lightning==2.6.6 torchdata==0.11.0 torch==2.13.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import sys
from collections.abc import Iterator
from importlib.metadata import version

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

SIZE, BATCH, FIRST_STEPS = 24, 4, 2


class Numbers(IterableDataset):
    """0 … SIZE − 1 in order, and where it stands."""

    position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        start, self.position = self.position, 0
        for number in range(start, SIZE):
            self.position = number + 1
            yield torch.tensor([float(number)])
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class NumbersWithLength(Numbers):
    def __len__(self) -> int:
        return SIZE


class Model(pl.LightningModule):
    """Notes what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen += [int(number) for number in batch.flatten()]
        return (self.weight * batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(dataset: Numbers, steps: int, checkpoint: str | None) -> list[int]:
    """Train one epoch, or up to a number of steps; return the numbers that were trained on."""
    saving = ModelCheckpoint(dirpath=type(dataset).__name__, filename="saved", every_n_train_steps=FIRST_STEPS)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, max_steps=steps, accelerator="cpu", callbacks=[saving], **quiet)
    model = Model()
    trainer.fit(model, StatefulDataLoader(dataset, batch_size=BATCH), ckpt_path=checkpoint)
    return model.seen


lost = {}
for kind in (NumbersWithLength, Numbers):
    before = fit(kind(), FIRST_STEPS, None)
    after = fit(kind(), -1, f"{kind.__name__}/saved.ckpt")
    lost[kind.__name__] = sorted(set(range(SIZE)) - {*before, *after})
    print(f"{kind.__name__}: first fit {before}, resumed {after}, lost {lost[kind.__name__]}")
print(*(f"{name} {version(name)}" for name in ("lightning", "torchdata", "torch")))
expected = {"NumbersWithLength": [], "Numbers": [8, 9, 10, 11]}
sys.exit(0 if lost == expected else "the behaviour has changed")
PYTHON
