#!/usr/bin/env bash
# lightning 2.6.6, torch 2.13.0: with precision "bf16-true", every validation rounds the average of EMAWeightAveraging.
# expected: validating reads the average and changes nothing: however often a fit validates, weights and average are the
#           same at its end.
# seen:     for a validation, average and weights exchange their values. The average is made in float32, before the model
#           is converted, so its values pass through bfloat16 weights and come back rounded, and the small steps of an
#           average (0.01 of a difference) are lost: validated after every step it follows other values than validated
#           once. With "64-true" it is the trained weights that come back rounded to float32. With float32 weights
#           ("32-true", "bf16-mixed") nothing is rounded.
# usage:    findings/lightning-ema-rounded-by-validation.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lightning==2.6.6 torch==2.13.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import sys
from importlib.metadata import version

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

STEPS = 400
TYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 8)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.layer(batch) - 1).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", (self.layer(batch) - 1).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class TrainedWeights(pl.Callback):
    """Keeps the trained weights after the last step, before the last validation."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Model, *_: object) -> None:
        self.weights = pl_module.layer.weight.detach().double().clone()


def train(precision: str, interval: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The trained weights and their average after all steps, validated after every `interval` steps."""
    torch.manual_seed(0)
    batches = [torch.randn(4, 8).to(TYPES[precision]) for _ in range(STEPS)]
    average, trained = EMAWeightAveraging(decay=0.99), TrainedWeights()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision=precision,
        val_check_interval=interval,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[average, trained],
        **quiet,
    )
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(Model(), loader, loader)
    return trained.weights, average._average_model.module.layer.weight.detach().double()


print("lightning", version("lightning"), "torch", version("torch"))
found = {}
for precision in TYPES:
    (weights, average), (others, other_average) = train(precision, STEPS), train(precision, 1)
    found[precision] = float((weights - others).abs().max()), float((average - other_average).abs().max())
    print(f"{precision:9} validated once or {STEPS} times: trained weights differ by {found[precision][0]:.1e}, "
          f"their average by {found[precision][1]:.1e}")
once = found["32-true"] == (0.0, 0.0) and found["bf16-true"][0] == 0.0 and found["bf16-true"][1] > 1e-3
sys.exit(0 if once and found["64-true"][0] > 0.0 else "the behaviour has changed")
PYTHON
