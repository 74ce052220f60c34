#!/usr/bin/env bash
# datasets 5.2.0, torchdata 0.11.0, torch 2.13.0: after a resume, every later epoch of an IterableDataset lacks its head.
# expected: `load_state_dict` applies to the next iteration: the rest of that epoch. Later epochs have all examples.
# seen:     the loaded state is kept, and every `iter(dataset)` starts at it again. A state saved after 6 of 20 examples
#           gives epochs of 14; a state saved after the last example gives epochs of 0, a training loop without a step.
#           StatefulDataLoader without worker processes, or with persistent ones, does the same. The state counts for
#           one epoch only where the loop calls `dataset.set_epoch(epoch)`; the section "Save a dataset checkpoint and
#           resume iteration" and the docstring do not mention it.
# usage:    findings/datasets-short-epochs-after-resume.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy datasets==5.2.0 torchdata==0.11.0
cd "$folder"
cat > run.py <<'PYTHON'
import copy

import datasets
from torchdata.stateful_dataloader import StatefulDataLoader


def twenty():
    return datasets.Dataset.from_dict({"text": [str(i) for i in range(20)]}).to_iterable_dataset(num_shards=4)


def lengths(examples, set_epoch):
    """Number of examples of a resumed epoch and of the two after it."""
    dataset, seen = twenty(), 0
    for _ in dataset:
        seen += 1
        if seen == examples:
            state = copy.deepcopy(dataset.state_dict())
    resumed = twenty()
    resumed.load_state_dict(state)
    found = []
    for epoch in range(3):
        if set_epoch:
            resumed.set_epoch(epoch)
        found.append(len(list(resumed)))
    return found


def lengths_of_loader(batches, **settings):
    """The same for a StatefulDataLoader with batches of two."""
    loader = StatefulDataLoader(twenty(), batch_size=2, **settings)
    for batch, _ in enumerate(loader, 1):
        if batch == batches:
            state = loader.state_dict()
            break
    resumed = StatefulDataLoader(twenty(), batch_size=2, **settings)
    resumed.load_state_dict(state)
    return [sum(len(batch["text"]) for batch in resumed) for _ in range(3)]


if __name__ == "__main__":
    found = [lengths(6, False), lengths(20, False), lengths(6, True), lengths_of_loader(3, num_workers=0)]
    found += [lengths_of_loader(3, num_workers=2), lengths_of_loader(3, num_workers=2, persistent_workers=True)]
    kinds = ["saved after 6 of 20", "saved after 20 of 20", "saved after 6, set_epoch", "StatefulDataLoader, saved after 6"]
    kinds += ["the same, 2 workers", "the same, 2 persistent workers"]
    for kind, counts in zip(kinds, found):
        print(f"datasets {datasets.__version__}, {kind}: the rest and the next two epochs have {counts} examples")
    wanted = [[14] * 3, [0] * 3, [14, 20, 20], [14] * 3, [14, 20, 20], [14] * 3]
    raise SystemExit(0 if found == wanted else f"the behaviour has changed: {found}")
PYTHON
venv/bin/python run.py 2> errors || { cat errors >&2; exit 1; }
