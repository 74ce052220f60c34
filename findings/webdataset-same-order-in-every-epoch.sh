#!/usr/bin/env bash
# webdataset 1.0.2, torch 2.13.0: WebDataset(shardshuffle=100) reads the shards in the same order in every epoch.
# expected: without a seed, each epoch draws a new order, as with DataLoader(shuffle=True). With detshuffle=True the order
#           is a function of the seed and the epoch ("deterministic shuffling").
# seen:     a data set without a seed draws one when it is made, and every epoch starts from it: the epochs are copies of
#           each other, with worker processes and without. detshuffle=True counts epochs, but each worker process counts
#           its own: a DataLoader with num_workers, without persistent_workers, starts them again, and its epochs are
#           copies again. The later .shuffle(n) changes the order within its buffer only.
# remedy:   detshuffle=True with persistent_workers=True, or resampled=True.
# usage:    findings/webdataset-same-order-in-every-epoch.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy webdataset==1.0.2
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
from importlib.metadata import version

import webdataset
from torch.utils.data import DataLoader

SHARDS, SIZE, EPOCHS = 8, 3, 4
for shard in range(SHARDS):
    with webdataset.TarWriter(f"{shard}.tar") as writer:
        for sample in range(SIZE):
            writer.write({"__key__": f"{shard}-{sample}", "shard.txt": str(shard)})


def orders(workers, **options):
    """The order of the shards in each of the epochs."""
    data = webdataset.WebDataset(f"{{0..{SHARDS - 1}}}.tar", **options).map(lambda sample: int(sample["shard.txt"]))
    loader = DataLoader(data, batch_size=None, num_workers=workers.pop("num_workers", 0), **workers)
    epochs = [tuple(dict.fromkeys(loader)) for _ in range(EPOCHS)]
    if any(sorted(order) != list(range(SHARDS)) for order in epochs):
        raise SystemExit(f"an epoch lacks shards: {epochs}")
    return epochs


settings = {
    "shardshuffle=100": ({}, {}),
    "shardshuffle=100, 2 workers": ({"num_workers": 2}, {}),
    "detshuffle=True": ({}, {"detshuffle": True}),
    "detshuffle=True, 2 workers": ({"num_workers": 2}, {"detshuffle": True}),
    "detshuffle=True, 2 persistent workers": ({"num_workers": 2, "persistent_workers": True}, {"detshuffle": True}),
}
different = {}
for name, (workers, options) in settings.items():
    epochs = orders(dict(workers), shardshuffle=100, **options)
    different[name] = len(set(epochs))
    print(f"{name}: {different[name]} orders in {EPOCHS} epochs, the first two {epochs[0]} {epochs[1]}")
print(*(f"{name} {version(name)}" for name in ("webdataset", "torch")))
same = [count > 1 for count in different.values()] == [False, False, True, False, True]
raise SystemExit(0 if same else f"the behaviour has changed: {different}")
PYTHON
