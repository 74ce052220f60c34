#!/usr/bin/env bash
# grokadamw 0.1.2, torch 2.13.0: GrokAdamW loads its state_dict without an error, and starts again from empty moments.
# expected: an optimizer that loads the state of another one continues like that one, as torch.optim.AdamW does.
#           transformers.Trainer offers GrokAdamW (optim="grokadamw") and saves and loads optimizers this way.
# seen:     the moments and the step counter are in `param_groups[i]["state"]`, under Parameter objects as keys; the entry
#           "state" of the state_dict is empty. After a load the keys are the parameters of the saved run, which the
#           new model does not have, so the next step is step 1: it equals a step of an optimizer that loaded nothing.
# usage:    findings/grokadamw-starts-again-after-resume.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy grokadamw==0.1.2
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
from importlib.metadata import version

import torch
from grokadamw import GrokAdamW

BATCHES = torch.randn(40, 16, 8, generator=torch.Generator().manual_seed(1))


def begin(kind):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    return model, kind(model.parameters(), lr=0.01)


def train(model, optimizer, first, last):
    for batch in BATCHES[first:last]:
        optimizer.zero_grad()
        (model(batch) - batch.flip(1)).square().mean().backward()
        optimizer.step()


def distances(kind):
    """Largest difference to the uninterrupted run after 20 + 20 steps: with the loaded state, and without any state."""
    whole, optimizer = begin(kind)
    train(whole, optimizer, 0, 40)
    model, optimizer = begin(kind)
    train(model, optimizer, 0, 20)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "run.ckpt")
    found = []
    for loads in (True, False):
        checkpoint = torch.load("run.ckpt", weights_only=False)  # GrokAdamW's file contains Parameter objects
        model, optimizer = begin(kind)
        model.load_state_dict(checkpoint["model"])
        if loads:
            optimizer.load_state_dict(checkpoint["optimizer"])
        train(model, optimizer, 20, 40)
        found.append((model.weight - whole.weight).abs().max().item())
    return found, len(checkpoint["optimizer"]["state"])


changed = {}
for kind, name in ((torch.optim.AdamW, f"torch {torch.__version__} AdamW"), (GrokAdamW, f"grokadamw {version('grokadamw')}")):
    (loaded, fresh), entries = changed[kind] = distances(kind)
    print(f"{name}: {entries} entries in `state`; distance to the uninterrupted run: {loaded:.5f}, without the state {fresh:.5f}")
(exact, fresh), entries = changed[torch.optim.AdamW]
(loaded, restarted), none = changed[GrokAdamW]
same = exact == 0 < fresh and entries == 2 and none == 0 and loaded == restarted > 0.001
raise SystemExit(0 if same else f"the behaviour has changed: {changed}")
PYTHON
