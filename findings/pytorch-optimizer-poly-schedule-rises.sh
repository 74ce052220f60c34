#!/usr/bin/env bash
# pytorch_optimizer 4.1.0, torch 2.13.0: PolyScheduler raises the learning rate, and all groups get the same rate.
# expected: polynomial decay: the rate falls from max_lr after the warm-up to min_lr at t_max, as in
#           torch.optim.lr_scheduler.PolynomialLR. Parameter groups keep the ratio of their rates (Muon for matrices,
#           AdamW for the rest), as with the schedulers of torch.
# seen:     the rate after the warm-up is min_lr + (max_lr − min_lr) · steps^poly_order, without a division by the number
#           of steps: with the default 0.5 it is 6 times max_lr after 35 steps, and grows on. The rates of the groups
#           are replaced by one number in LinearScheduler, CosineScheduler and PolyScheduler; the first step is made
#           with min_lr, and the second with init_lr.
# usage:    findings/pytorch-optimizer-poly-schedule-rises.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pytorch_optimizer==4.1.0 torch==2.13.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import sys
from collections.abc import Callable
from importlib.metadata import version

import torch
from pytorch_optimizer.lr_scheduler import CosineScheduler, LinearScheduler, PolyScheduler
from torch.optim.lr_scheduler import PolynomialLR

STEPS, WARMUP, MAX_LR, MIN_LR = 40, 5, 0.1, 0.001
SETTINGS = {"t_max": STEPS, "max_lr": MAX_LR, "min_lr": MIN_LR, "init_lr": 0.0, "warmup_steps": WARMUP}


def rates(make: Callable[[torch.optim.Optimizer], object]) -> list[tuple[float, float]]:
    """The rates of two groups, 0.1 and 0.01 at the beginning, in each of the optimizer steps."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in (0.1, 0.01)]
    optimizer = torch.optim.SGD(groups)
    scheduler = make(optimizer)
    used = []
    for _ in range(STEPS):
        used.append(tuple(round(float(group["lr"]), 4) for group in optimizer.param_groups))
        optimizer.step()
        scheduler.step()
    return [*used, tuple(round(float(group["lr"]), 4) for group in optimizer.param_groups)]


found = {
    "PolynomialLR of torch": rates(lambda optimizer: PolynomialLR(optimizer, STEPS, power=0.5)),
    "LinearScheduler": rates(lambda optimizer: LinearScheduler(optimizer, **SETTINGS)),
    "CosineScheduler": rates(lambda optimizer: CosineScheduler(optimizer, **SETTINGS)),
    "PolyScheduler": rates(lambda optimizer: PolyScheduler(optimizer, **SETTINGS)),
}
print("pytorch_optimizer", version("pytorch_optimizer"), "torch", version("torch"))
for name, used in found.items():
    print(f"{name:22} steps 0, 1, 2: {used[:3]}, step 20: {used[20]}, after the last step: {used[-1]}")
poly = [one for one, _ in found["PolyScheduler"]]
rises = all(a < b for a, b in zip(poly[WARMUP + 3 :], poly[WARMUP + 4 :])) and poly[-1] > 5 * MAX_LR
falls = all(found[name][-1][0] < found[name][10][0] for name in found if name != "PolyScheduler")
together = all(one == other for name in found if "torch" not in name for one, other in found[name][1:])
order = found["CosineScheduler"][0][0] == MIN_LR and found["CosineScheduler"][1][0] == 0.0
kept = all(abs(one - 10 * other) < 1e-3 for one, other in found["PolynomialLR of torch"])
sys.exit(0 if rises and falls and together and order and kept else "the behaviour has changed")
PYTHON
