#!/usr/bin/env bash
# torchdata 0.11.0, torch 2.13.0: a resumed torchdata.nodes.Loader continues at the saved place of another permutation.
# expected: Loader.state_dict() restores a pipeline that begins with a RandomSampler, as in the documentation's first
#           example: the resumed epoch has the batches that are left, as with StatefulDataLoader.
# seen:     of the sampler only the number of samples is saved. A resume draws a new permutation and skips that many: some
#           samples of the epoch come twice and others never, without a warning. With a seeded generator the new
#           permutation is that of the first epoch, so a resume in the first epoch is right and later ones are not. The
#           RandomSampler of torchdata.stateful_dataloader, made for this, gives the same: its iterator has a state, which
#           the node does not ask for. DistributedSampler, which has set_epoch, is right, with one process too.
# remedy:   MapStyleWrapper with DistributedSampler(data, num_replicas=1, rank=0).
# usage:    findings/torchdata-nodes-resume-with-another-order.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy torchdata==0.11.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
from importlib.metadata import version

import torch
from torch.utils.data import DistributedSampler, RandomSampler
from torchdata.nodes import Batcher, Loader, MapStyleWrapper
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulRandomSampler

DATA, BATCH, SAVED = range(40), 4, 4


def seeded():
    return torch.Generator().manual_seed(0)


samplers = {
    "RandomSampler": lambda: RandomSampler(DATA),
    "RandomSampler, seeded": lambda: RandomSampler(DATA, generator=seeded()),
    "torchdata's RandomSampler, seeded": lambda: StatefulRandomSampler(DATA, generator=seeded()),
    "DistributedSampler": lambda: DistributedSampler(DATA, num_replicas=1, rank=0),
}


def loader(sampler):
    return Loader(Batcher(MapStyleWrapper(DATA, sampler()), BATCH))


def trained(sampler, epoch):
    """The samples of an epoch that is interrupted after four batches and resumed in another process."""
    first, before = loader(sampler), []
    for _ in range(epoch):
        list(first)
    for number, batch in enumerate(first, 1):
        before += batch
        if number == SAVED:
            break
    state = first.state_dict()
    second = loader(sampler)
    second.load_state_dict(state)
    return before + [sample for batch in second for sample in batch]


torch.manual_seed(0)
missing = {}
for name, sampler in samplers.items():
    missing[name] = [len(set(DATA) - set(trained(sampler, epoch))) for epoch in (0, 1)]
    print(f"{name}: of {len(DATA)} samples, {missing[name][0]} never come in a resumed first epoch, {missing[name][1]} in a second one")
print(*(f"{name} {version(name)}" for name in ("torchdata", "torch")))
plain, fixed, theirs, distributed = missing.values()
same = min(plain) > 0 and fixed[0] == theirs[0] == 0 < min(fixed[1], theirs[1]) and distributed == [0, 0]
raise SystemExit(0 if same else f"the behaviour has changed: {missing}")
PYTHON
