#!/usr/bin/env bash
# torchmetrics 1.9.0, lightning 2.6.6, torch 2.13.0: with bf16-true, a MeanMetric of 2,000 losses is three times too high.
# expected: a metric accumulates in float32 whatever the precision of the model is: its documentation says that .half(),
#           .bfloat16() and their like do not change its states, and that set_dtype does.
# seen:     model.bfloat16() leaves a metric inside the model alone, and model.to(torch.bfloat16), which is what Lightning
#           and Fabric call with precision="bf16-true", converts its states. A sum in bfloat16 does not change any more
#           when a step is below half of its last digit: a count stops at 256, and a sum of values later, so that a mean
#           rises beyond every value or stays at that of the first ones, without a warning. The same for Perplexity and
#           SumMetric, and for metrics that are made while the default type is bfloat16 (configure_model). self.log of the
#           tensor itself, which Lightning averages in float32, is right, and so is bf16-mixed.
# remedy:   metric.set_dtype(torch.float32) when training or validation begins.
# usage:    findings/torchmetrics-bfloat16-means.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy torchmetrics==1.9.0 lightning==2.6.6
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
from importlib.metadata import version

import lightning.pytorch as pl
import torch
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.text import Perplexity

COUNT, TOKENS = 2000, 64
losses = torch.linspace(0.5, 2.5, COUNT, dtype=torch.float64).float()  # mean 1.5
logits = torch.linspace(0, 3, COUNT)[:, None] * torch.tensor([1.0, 0, 0, 0])
targets = torch.zeros(COUNT, dtype=torch.long)


def metrics():
    return torch.nn.ModuleDict({"mean": MeanMetric(), "count": SumMetric(), "perplexity": Perplexity()})


def results(model):
    for loss, row in zip(losses, logits):
        model["mean"].update(loss)
        model["count"].update(1.0)
        model["perplexity"].update(row.expand(1, TOKENS, -1), targets[:1].expand(1, TOKENS))
    return [model[name].compute().item() for name in ("mean", "count", "perplexity")]


class Model(pl.LightningModule):
    """Logs one loss twice: as a value, and by a metric."""

    def __init__(self):
        super().__init__()
        self.layer, self.metric = torch.nn.Linear(1, 1), MeanMetric()

    def validation_step(self, batch, number):
        loss = losses[number]
        self.metric.update(loss)
        self.log("value", loss, on_epoch=True)
        self.log("metric", self.metric, on_epoch=True)


def validate(precision):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", precision=precision, **quiet)
    loader = torch.utils.data.DataLoader(torch.zeros(COUNT, 1), batch_size=1)
    (logged,) = trainer.validate(Model(), loader, verbose=False)
    return logged["value"], logged["metric"]


exact = [losses.mean().item(), float(COUNT), cross_entropy(logits, targets).exp().item()]
found = {"float32": results(metrics()), ".bfloat16()": results(metrics().bfloat16()), ".to(bfloat16)": results(metrics().to(torch.bfloat16))}
torch.set_default_dtype(torch.bfloat16)
made = metrics()
torch.set_default_dtype(torch.float32)
found["default type bfloat16"] = results(made)
again = metrics().to(torch.bfloat16)
for metric in again.values():
    metric.set_dtype(torch.float32)
found["set_dtype(float32) later"] = results(again)
print(f"exact: mean {exact[0]:.3f}, count {exact[1]:.0f}, perplexity {exact[2]:.3f}")
for name, (mean, count, perplexity) in found.items():
    print(f"metrics, {name}: mean {mean:.3f}, count {count:.0f}, perplexity {perplexity:.3f}")
logged = {precision: validate(precision) for precision in ("32-true", "bf16-mixed", "bf16-true")}
for precision, (value, metric) in logged.items():
    print(f"Trainer, {precision}: mean of the logged value {value:.3f}, of the metric {metric:.3f}")
print(*(f"{name} {version(name)}" for name in ("torchmetrics", "lightning", "torch")))
right = {name for name, values in found.items() if all(abs(value / true - 1) < 0.01 for value, true in zip(values, exact))}
same = right == {"float32", ".bfloat16()", "set_dtype(float32) later"} and found[".to(bfloat16)"][1] == 256
same = same and all(abs(value - exact[0]) < 0.01 for value, _ in logged.values())
same = same and [metric > 2 * exact[0] for _, metric in logged.values()] == [False, False, True]
raise SystemExit(0 if same else f"the behaviour has changed: {found} {logged}")
PYTHON
