#!/usr/bin/env bash
# torch 2.13.0: get_optimizer_state_dict() before the first step changes the training that follows.
# expected: a function that gets a state changes nothing. A checkpoint of step 0, or the names of the states for a later
#           load, leaves training as it is without.
# seen:     an optimizer without states makes a step with gradients of 0 and the rate 0, and keeps what it leaves. AdamW
#           counts it: its first real step is number 2, whose bias correction is another one, and moves the weights by
#           0.74 of the rate instead of 1; losses of later steps differ too. In Rprop the rate 0 becomes the first step
#           size: it starts at its minimum, and training hardly moves. SGD, Muon and RMSprop train as without. After a
#           first step of one's own nothing changes.
# remedy:   optimizer.state_dict(), or ask after the first step only.
# usage:    findings/torch-reading-optimizer-state-is-a-step.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

RATE, STEPS, AFTER = 0.01, 20, 3


def train(kind, asked_after):
    """The first movement of the weights, in rates, and the last loss; the state is asked for after so many steps."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, bias=False)
    optimizer = kind(model.parameters(), lr=RATE)
    start, data = model.weight.detach().clone(), torch.randn(16, 8)
    for step in range(STEPS):
        if step == asked_after:
            get_optimizer_state_dict(model, optimizer)
        optimizer.zero_grad()
        loss = (model(data) - data.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        if step == 0:
            moved = ((model.weight.detach() - start).abs().mean() / RATE).item()
    return moved, loss.item()


found = {}
for kind in (torch.optim.AdamW, torch.optim.Rprop, torch.optim.RMSprop, torch.optim.Muon, torch.optim.SGD):
    found[kind.__name__] = never, before, later = [train(kind, asked_after) for asked_after in (None, 0, AFTER)]
    print(
        f"{kind.__name__}: first step {never[0]:.3f} rates, loss {never[1]:.6f}; state read before it {before[0]:.3f}, {before[1]:.6f}; "
        f"after step {AFTER} {later[0]:.3f}, {later[1]:.6f}"
    )
print(f"torch {torch.__version__}, {STEPS} steps")
changed = {name for name, (never, before, _) in found.items() if never != before}
same = changed == {"AdamW", "Rprop"} and all(never == later for never, _, later in found.values())
raise SystemExit(0 if same and found["AdamW"][1][0] < 0.8 else f"the behaviour has changed: {found}")
PYTHON
