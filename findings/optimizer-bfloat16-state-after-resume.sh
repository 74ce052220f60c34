#!/usr/bin/env bash
# heavyball 3.2.1, came-pytorch 0.1.3, torch 2.13.0: float32 optimizer states are bfloat16 after a resume.
# expected: an optimizer that keeps float32 moments for bfloat16 weights (heavyball's default storage_dtype="float32")
#           keeps them after `load_state_dict`, and training resumes exactly.
# seen:     torch's `Optimizer.load_state_dict` casts every floating-point state but "step" to the type of its parameter,
#           and neither library restores it. The moments stay bfloat16 for the rest of the run, without a message. In
#           CAME, whose decay of 0.999 is too slow for 8 bits, the second moment then never moves again.
#           torchao's and bitsandbytes' optimizers keep their types; float32 weights are not affected.
# usage:    findings/optimizer-bfloat16-state-after-resume.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy heavyball==3.2.1 came-pytorch==0.1.3
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import copy
from importlib.metadata import version

import heavyball
import heavyball.utils
import torch
from came_pytorch import CAME

heavyball.utils.compile_mode = None  # the same without a compiler


def tensors(state):
    if torch.is_tensor(state):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)


def types(optimizer):
    states = tensors(optimizer.state_dict()["state"])
    return sorted({str(state.dtype)[6:] for state in states if state.is_floating_point() and state.numel() > 1})


def step(parameter, optimizer, gradient, times):
    for _ in range(times):
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()


def resume(make, dtype):
    """Types of the states before and after a resume, and an optimizer that continues and one that resumes."""
    weights = [torch.nn.Parameter(torch.ones(64, dtype=dtype)) for _ in range(2)]
    first, second = (make([weight]) for weight in weights)
    step(weights[0], first, 1.0, 3000)
    weights[1].data.copy_(weights[0].data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    return types(first), types(second), list(zip(weights, (first, second)))


found = {}
for name, package, make in (
    ("AdamW", "heavyball", lambda weights: heavyball.AdamW(weights, lr=1e-4, storage_dtype="float32")),
    ("CAME", "came-pytorch", lambda weights: CAME(weights, lr=1e-4)),
):
    for dtype in (torch.float32, torch.bfloat16):
        before, after, runs = found[name, dtype] = resume(make, dtype)
        print(f"{package} {version(package)} {name}, weights {dtype}: states {before}, after load_state_dict {after}")
moments = []
for weight, optimizer in found["CAME", torch.bfloat16][2]:
    step(weight, optimizer, 1.25, 3000)
    moments.append(round(optimizer.state[weight]["exp_avg_sq"].float().mean().item(), 2))
print(f"CAME, second moment after 3,000 steps with gradient² 1.56 instead of 1: {moments[0]}, resumed {moments[1]}")
wide = [(["float32"], ["float32"]), (["float32"], ["bfloat16"])] * 2
same = [(before, after) for before, after, _ in found.values()] == wide and moments[0] > 1.4 and moments[1] < 1.1
raise SystemExit(0 if same else f"the behaviour has changed: {moments}")
PYTHON
