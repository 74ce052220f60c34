#!/usr/bin/env bash
# torchmetrics 1.9.0, torch 2.13.0: a RunningMean that loads its state forgets recent values and keeps old ones.
# expected: with persistent states, the mean over the last N values continues after `load_state_dict` as without it.
# seen:     the N values are saved, the position in the window is not. A loaded metric overwrites from place 0 again,
#           which is any place of the window, so it drops newer values and keeps older ones until N more values are there.
#           The value right after the load is correct. The same for RunningSum and the wrapper Running.
# usage:    findings/torchmetrics-running-window-after-resume.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy torchmetrics==1.9.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import torch
import torchmetrics
from torchmetrics.aggregation import RunningMean

WINDOW, SAVED, LOSSES = 10, 15, [10.0] * 10 + [1.0] * 20  # a loss that falls after 10 steps, saved after 15


def running():
    metric = RunningMean(window=WINDOW)
    metric.persistent(True)
    return metric


def means(metric, losses):
    values = []
    for loss in losses:
        metric.update(torch.tensor(loss))
        values.append(round(metric.compute().item(), 4))
    return values


whole = running()
before = means(whole, LOSSES[:SAVED])
resumed = running()
resumed.load_state_dict(whole.state_dict())
loaded = round(resumed.compute().item(), 4)
expected, seen = means(whole, LOSSES[SAVED:]), means(resumed, LOSSES[SAVED:])
print(f"torchmetrics {torchmetrics.__version__}, mean of the last {WINDOW} losses at step {SAVED}: {before[-1]}, after the load {loaded}")
print(f"next steps: {expected}\nresumed:    {seen}")
same = loaded == before[-1] == 5.5 and expected[:6] == [4.6, 3.7, 2.8, 1.9, 1.0, 1.0]
same = same and seen[:5] == [5.5] * 5 and seen[5:10] == [4.6, 3.7, 2.8, 1.9, 1.0]
raise SystemExit(0 if same else "the behaviour has changed")
PYTHON
