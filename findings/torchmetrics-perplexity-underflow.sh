#!/usr/bin/env bash
# torchmetrics 1.9.0, torch 2.13.0: Perplexity is infinite because of one unlikely token, although the loss is small.
# expected: the exponential of the mean cross-entropy, computed from log-probabilities.
# seen:     it takes the softmax first and then the logarithm of the probability, in the type of the logits. A token whose
#           probability underflows has the loss ∞: in float16 at 18 nats (half-precision training), in float32 at
#           105. One such token among any number makes perplexity ∞; the cross-entropy of torch stays finite.
# usage:    findings/torchmetrics-perplexity-underflow.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy torchmetrics==1.9.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import math

import torch
import torchmetrics
from torch.nn.functional import cross_entropy
from torchmetrics.text import Perplexity


def perplexities(margin, dtype, tokens=1000):
    """Perplexity of torchmetrics and of torch, if one of 1,000 tokens is less likely than another by e^margin."""
    logits = torch.zeros(1, tokens, 2)
    logits[..., 0] = margin
    targets = torch.zeros(1, tokens, dtype=torch.long)
    targets[0, 0] = 1
    metric = Perplexity()
    metric.update(logits.to(dtype), targets)
    return metric.compute().item(), cross_entropy(logits.to(dtype).float()[0], targets[0]).exp().item()


found = {}
for dtype, margin in ((torch.float16, 17), (torch.float16, 18), (torch.float32, 103), (torch.float32, 105)):
    found[dtype, margin] = theirs, exact = perplexities(margin, dtype)
    print(f"torchmetrics {torchmetrics.__version__}, {dtype}, loss of one of 1,000 tokens {margin} nats: {theirs:.4f}, exact {exact:.4f}")
infinite = [math.isinf(theirs) for theirs, _ in found.values()]
raise SystemExit(0 if infinite == [False, True, False, True] else "the behaviour has changed")
PYTHON
