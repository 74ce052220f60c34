#!/usr/bin/env bash
# A Lightning fit with strategy="ddp" leaves LOCAL_RANK in the environment, where later Trainers read it.
#
# Packages: lightning==2.6.6 torch==2.13.0
# Expected (a good engineer's guess): after the fit the environment is as before; teardown does remove WORLD_SIZE.
# Seen: LOCAL_RANK, NODE_RANK, MASTER_ADDR, MASTER_PORT and OMP_NUM_THREADS stay. A later Trainer in this process, or in
#       a program that it starts, then takes its processes for externally started.
# Exits with a non-zero code when this behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check lightning==2.6.6 torch==2.13.0
echo "expected: after a fit with strategy=ddp on one device, the environment is as before."
echo "seen: LOCAL_RANK and others stay, and a later Trainer takes its processes for externally started."
unset LOCAL_RANK NODE_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS
venv/bin/python - <<'PROGRAM'
import logging
import os
import platform
import subprocess
import sys
import warnings

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

ASK = """
import lightning.pytorch as pl
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
print(trainer.strategy.cluster_environment.creates_processes_externally)
"""


def processes_are_external():
    """Whether a new program with a Trainer for two devices would start no process."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1] == "True"


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.simplefilter("ignore")
print("python", platform.python_version(), "lightning", lightning.__version__, "torch", torch.__version__)
before, at_first = set(os.environ), processes_are_external()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = pl.Trainer(accelerator="cpu", devices=1, strategy="ddp", max_steps=1, limit_val_batches=0, **quiet)
trainer.fit(BoringModel())
torch.distributed.destroy_process_group()
left = sorted(set(os.environ) - before)
print("left:", *left)
print("processes taken for externally started: before the fit", at_first, "- after it", processes_are_external())
assert left == ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "OMP_NUM_THREADS"], "the behaviour has changed"
assert (at_first, processes_are_external()) == (False, True), "the behaviour has changed"
PROGRAM
