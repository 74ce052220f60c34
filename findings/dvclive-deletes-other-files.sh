#!/usr/bin/env bash
# dvclive 3.49.1, lightning 2.6.6, torch 2.13.0: DVCLiveLogger(log_model=True) deletes the files next to the checkpoints.
# expected: `log_model` hands the checkpoints to DVC. Files that the logger did not write stay, above all where nothing can
#           be handed over ("A DVC repo is required to log artifacts. Skipping").
# seen:     before it hands the folder of ModelCheckpoint over, it unlinks every file in it that is not a checkpoint of this
#           fit: settings, notes, and checkpoints of earlier runs, without a message. It does so without a DVC repository
#           too. log_model="all" deletes the same; resume=True switches it off.
# remedy:   give ModelCheckpoint a folder that nothing else writes to.
# usage:    findings/dvclive-deletes-other-files.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet dvclive==3.49.1 lightning==2.6.6 torch==2.13.0
cd "$folder"
DVC_NO_ANALYTICS=1 "$folder/venv/bin/python" - <<'PYTHON'
import logging
import warnings
from importlib.metadata import version
from pathlib import Path

import lightning.pytorch as pl
from dvclive.lightning import DVCLiveLogger
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

warnings.simplefilter("ignore")
for name in ("lightning.pytorch", "dvclive"):
    logging.getLogger(name).setLevel(logging.ERROR)
print(*(f"{name} {version(name)}" for name in ("dvclive", "lightning", "torch")))


def files_after_fit(log_model: bool | str, resume: bool = False) -> set[str]:
    """Train two steps next to two files; return the names of the files that are there afterwards, but for the checkpoint."""
    run = Path(f"run-{log_model}-{resume}")
    run.mkdir()
    (run / "settings.yaml").write_text("lr: 0.1\n")
    (run / "earlier.ckpt").write_bytes(b"weights of another run")
    trainer = pl.Trainer(
        max_steps=2,
        limit_val_batches=0,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(dirpath=run, filename="new")],
        logger=DVCLiveLogger(dir=f"live-{log_model}-{resume}", save_dvc_exp=False, log_model=log_model, resume=resume),
    )
    trainer.fit(BoringModel())
    return {path.name for path in run.iterdir()} - {"new.ckpt"}


both = {"settings.yaml", "earlier.ckpt"}
left = {str(settings): files_after_fit(*settings) for settings in ((False,), (True,), ("all",), (True, True))}
print("left, by (log_model, resume):", left)
assert left == {"(False,)": both, "(True,)": set(), "('all',)": set(), "(True, True)": both}
PYTHON
