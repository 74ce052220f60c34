#!/usr/bin/env bash
# optuna-integration 5.0.0, optuna 5.0.0, lightning 2.6.6: pruning sees the first validation of an epoch only.
# expected: PyTorchLightningPruningCallback hands every validation loss to the pruner. A run that counts steps validates
#           many times in its one epoch (val_check_interval), as language models are trained.
# seen:     the callback reports under the number of the epoch, and Optuna ignores a second value of the same number
#           (a warning says that step 0 is already reported). The pruner always judges the first value: a trial whose
#           loss rises above the limit runs to its end, and the median pruner compares losses of the first validation.
# remedy:   a callback of one's own that reports under trainer.global_step.
# usage:    findings/optuna-pruning-within-an-epoch.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optuna==5.0.0 optuna-integration==5.0.0 lightning==2.6.6 torch==2.13.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
from importlib.metadata import version

import lightning.pytorch as pl
import optuna
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from optuna_integration import PyTorchLightningPruningCallback

LOSSES = {10: 1.0, 20: 50.0, 30: 70.0, 40: 90.0}  # by optimizer step: the second one is above the limit


class Diverging(BoringModel):
    """Trains as usual; its validation losses are those above."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", LOSSES[self.trainer.global_step])


def search(one_epoch: bool) -> tuple[str, dict[int, float], int]:
    """Train 40 steps, validated after every 10, in one epoch or in four: state, values that the pruner saw, and steps."""
    steps = 0

    def objective(trial: optuna.Trial) -> float:
        nonlocal steps
        length = {"max_epochs": 1, "val_check_interval": 10} if one_epoch else {"max_epochs": 4}
        trainer = pl.Trainer(
            **length,
            limit_train_batches=40 if one_epoch else 10,
            limit_val_batches=1,
            num_sanity_val_steps=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[PyTorchLightningPruningCallback(trial, monitor="val_loss")],
        )
        try:
            trainer.fit(Diverging())
        finally:
            steps = trainer.global_step
        return float(trainer.callback_metrics["val_loss"])

    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=10.0))
    study.optimize(objective, n_trials=1)
    return study.trials[0].state.name, study.trials[0].intermediate_values, steps


print(*(f"{name} {version(name)}" for name in ("optuna", "optuna-integration", "lightning")))
four, one = search(one_epoch=False), search(one_epoch=True)
print("four epochs:", *four)
print("one epoch:  ", *one)
expected = ("PRUNED", {0: 1.0, 1: 50.0}, 20), ("COMPLETE", {0: 1.0}, 40)
raise SystemExit(0 if (four, one) == expected else "the behaviour has changed")
PYTHON
