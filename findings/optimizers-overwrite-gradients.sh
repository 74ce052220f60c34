#!/usr/bin/env bash
# muon-optimizer 0.1.0, heavyball 3.2.1, pytorch_optimizer 4.1.0, torch 2.13.0: `step` overwrites the gradients.
# expected: an optimizer reads `p.grad`, as those of torch.optim do (torch.optim.Muon among them), so that a gradient
#           norm may be logged after the step as well as before: gradients stay until zero_grad.
# seen:     SingleDeviceMuon mixes the momentum into the gradient in place: after the first step its norm is 0.1 of what
#           it was. heavyball sets it to None (consume_grad is True by default), so that a sum of norms is 0. A number of
#           pytorch_optimizer's classes scale, centre or filter it in place, GrokFastAdamW to three times the norm, and
#           more of them add the weight decay to it. Lightning's on_before_zero_grad and on_train_batch_end run after it.
# remedy:   log gradient norms between backward and step (on_before_optimizer_step).
# usage:    findings/optimizers-overwrite-gradients.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet muon-optimizer==0.1.0 heavyball==3.2.1 pytorch_optimizer==4.1.0 torch==2.13.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import sys
from collections.abc import Callable
from importlib.metadata import version

import heavyball
import muon
import pytorch_optimizer
import torch

heavyball.utils.compile_mode = None
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def norm_after_step(make: Make) -> float | None:
    """The norm of the gradient after the first step over that before it; None if the gradient is gone."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 16))
    optimizer = make([weight])
    gradient = torch.randn_like(weight)
    weight.grad = gradient.clone()
    optimizer.step()
    return None if weight.grad is None else round(float(weight.grad.norm() / gradient.norm()), 2)


def of_pytorch_optimizer(name: str, weight_decay: float) -> Make:
    return lambda weights: pytorch_optimizer.load_optimizer(name)(weights, lr=0.01, weight_decay=weight_decay)


makers: dict[str, Make] = {
    "torch.optim.AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01),
    "torch.optim.Adam, weight decay": lambda weights: torch.optim.Adam(weights, lr=0.01, weight_decay=1.0),
    "torch.optim.Muon": lambda weights: torch.optim.Muon(weights, lr=0.01),
    "muon.SingleDeviceMuon": lambda weights: muon.SingleDeviceMuon(weights, lr=0.01),
    "heavyball.AdamW": lambda weights: heavyball.AdamW(weights, lr=0.01),
    "heavyball.AdamW, consume_grad=False": lambda weights: heavyball.AdamW(weights, lr=0.01, consume_grad=False),
    "pytorch_optimizer AdamW": of_pytorch_optimizer("adamw", 0.0),
    "pytorch_optimizer GrokFastAdamW": of_pytorch_optimizer("grokfastadamw", 0.0),
    "pytorch_optimizer LARS": of_pytorch_optimizer("lars", 0.0),
    "pytorch_optimizer AdEMAMix": of_pytorch_optimizer("ademamix", 0.0),
    "pytorch_optimizer AdEMAMix, weight decay": of_pytorch_optimizer("ademamix", 1.0),
}
found = {name: norm_after_step(make) for name, make in makers.items()}
print(*(f"{name} {version(name)}" for name in ("muon-optimizer", "heavyball", "pytorch_optimizer", "torch")))
for name, ratio in found.items():
    print(f"{name:42} {'no gradient' if ratio is None else ratio}")
kept = [name for name, ratio in found.items() if ratio == 1.0]
changed = {name: ratio for name, ratio in found.items() if ratio != 1.0}
expected = {
    "muon.SingleDeviceMuon": 0.1,
    "heavyball.AdamW": None,
    "pytorch_optimizer GrokFastAdamW": 3.0,
    "pytorch_optimizer LARS": 0.0,
    "pytorch_optimizer AdEMAMix, weight decay": 1.69,
}
sys.exit(0 if changed == expected and len(kept) == 6 else "the behaviour has changed")
PYTHON
