#!/usr/bin/env bash
# torchmetrics 1.9.0, torch 2.13.0: after `compute`, merged or loaded states are ignored; a merged list is out of order.
# expected: `a.merge_state(b)` appends the values of b to those of a, and `a.compute()` then returns the metric of both;
#           after `a.load_state_dict(...)` it returns the metric of the loaded state.
# seen:     `compute` caches its result, and only `update`, `forward` and `reset` clear the cache. A metric that was
#           computed once (for a progress bar, say) keeps its old value after `merge_state` and `load_state_dict`,
#           although its states are new. And the values of b come before those of a: per-sample values
#           (CatMetric, EditDistance with reduction="none") no longer fit the samples.
# usage:    findings/torchmetrics-merge-state.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy torchmetrics==1.9.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
import torchmetrics
from torchmetrics.aggregation import CatMetric, MeanMetric
from torchmetrics.text import EditDistance


def mean_of(*values):
    metric = MeanMetric()
    metric.persistent(True)
    metric.update(torch.tensor(values))
    return metric


def after(computed_before, change):
    metric = mean_of(1.0, 3.0)
    if computed_before:
        metric.compute()
    change(metric)
    return metric.compute().item()


changes = {
    "merge_state": (lambda metric: metric.merge_state(mean_of(8.0)), 4.0),
    "load_state_dict": (lambda metric: metric.load_state_dict(mean_of(8.0).state_dict()), 8.0),
    "update": (lambda metric: metric.update(torch.tensor(8.0)), 4.0),
}
found = {name: [after(False, change), after(True, change)] for name, (change, _) in changes.items()}
for name, (first, second) in found.items():
    print(f"torchmetrics {torchmetrics.__version__}, mean of (1, 3), {name}: {first}; after an earlier compute: {second}; exact {changes[name][1]}")

first, second = CatMetric(), CatMetric()
first.update(torch.tensor([1.0, 2.0]))
second.update(torch.tensor([3.0]))
first.merge_state(second)
values = first.compute().tolist()
first, second = EditDistance(reduction="none"), EditDistance(reduction="none")
first.update(["a", "ab"], ["a", "a"])  # distances 0 and 1
second.update(["abc"], ["a"])  # distance 2
first.merge_state(second)
distances = first.compute().tolist()
print(f"CatMetric of (1, 2) merged with (3): {values}; EditDistance of (0, 1) merged with (2): {distances}")
wanted = {"merge_state": [4.0, 2.0], "load_state_dict": [8.0, 2.0], "update": [4.0, 4.0]}
same = found == wanted and values == [3.0, 1.0, 2.0] and distances == [2, 0, 1]
raise SystemExit(0 if same else "the behaviour has changed")
PYTHON
