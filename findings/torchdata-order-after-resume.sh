#!/usr/bin/env bash
# torchdata 0.11.0, torch 2.13.0: after a resume, every later epoch of StatefulDataLoader has another order than without.
# expected: with shuffle=True and a seeded generator, a loader that gets the state of another one continues like that
#           one: the rest of the epoch and the epochs after it.
# seen:     the rest of the epoch is right, the epochs after it have another order. Without worker processes, each epoch
#           draws the order and then one number more (the seed of the workers) from the generator; a resumed loader
#           restores the generator, draws the order and not that number. With worker processes, or without a generator,
#           all epochs are equal.
# usage:    findings/torchdata-order-after-resume.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 torchdata==0.11.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import torch
import torchdata
from torchdata.stateful_dataloader import StatefulDataLoader


def loader(seeded, workers):
    generator = torch.Generator().manual_seed(3) if seeded else None
    return StatefulDataLoader(list(range(20)), batch_size=4, shuffle=True, generator=generator, num_workers=workers)


def read(batches):
    return [batch.tolist() for batch in batches]


def same_after_resume(seeded, workers, batches):
    """Whether the rest of the second epoch, and the two after it, are those of a loader that never stopped."""
    torch.manual_seed(5)
    first = loader(seeded, workers)
    read(first)
    epoch = iter(first)
    for _ in range(batches):
        next(epoch)
    state = first.state_dict()
    wanted = [read(epoch), read(first), read(first)]
    torch.manual_seed(5)
    resumed = loader(seeded, workers)
    resumed.load_state_dict(state)
    return [read(resumed) == epoch for epoch in wanted]


found = []
for seeded, workers, batches in [(True, 0, 2), (True, 0, 4), (True, 2, 2), (False, 0, 2)]:
    found.append(same_after_resume(seeded, workers, batches))
    kind = f"{'a' if seeded else 'no'} generator, {workers} workers, resumed after {batches} of 5 batches"
    print(f"torchdata {torchdata.__version__}, {kind}: the rest and the next two epochs are the same: {found[-1]}")
wanted = [[True, False, False]] * 2 + [[True, True, True]] * 2
raise SystemExit(0 if found == wanted else f"the behaviour has changed: {found}")
PYTHON
