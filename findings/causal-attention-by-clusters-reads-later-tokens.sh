#!/usr/bin/env bash
# reformer-pytorch 1.4.4, routing-transformer 1.6.1, torch 2.13.0: language models with causal=True that are not causal.
# expected: a language model with causal=True predicts a token from those before it. Attention that is cheaper than the
#           full one loses accuracy, not causality: the mask still hides later keys.
# seen:     later keys are hidden, but later tokens decide which of the earlier keys a query meets. Reformer sorts all
#           tokens of the window into buckets and cuts these into chunks; the Routing Transformer lets each cluster take
#           the tokens of the whole window that are nearest to it. Logits of the first 48 tokens change by tenths and more
#           when the next 16 do, and the loss over a window is not that of a text read token by token. Windowed
#           attention (local-attention) and Reformer with use_full_attn=True are causal to the last bit.
# usage:    findings/causal-attention-by-clusters-reads-later-tokens.sh      (PYTHON=python3.11 for another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 reformer-pytorch==1.4.4 routing-transformer==1.6.1 \
  local-attention==1.11.2
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import sys
from collections.abc import Callable
from importlib.metadata import version

import torch
from local_attention import LocalTransformer
from reformer_pytorch import ReformerLM
from routing_transformer import RoutingTransformerLM

SEEN, LENGTH, TOKENS = 48, 64, 65
SIZES = {"num_tokens": TOKENS, "max_seq_len": LENGTH, "dim": 64, "depth": 2, "heads": 2, "causal": True}


@torch.no_grad()
def change(make: Callable[[], torch.nn.Module]) -> float:
    """The greatest change of the first logits where later tokens are other ones; the same random numbers in both."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # initial weights are small, and some are zero
        if parameter.dim() > 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    ids = torch.randint(TOKENS, (1, LENGTH))
    other = torch.cat((ids[:, :SEEN], (ids[:, SEEN:] + 1) % TOKENS), 1)
    logits = []
    for text in (ids, ids, other):
        torch.manual_seed(1)
        output = model(text)
        logits.append((output[0] if isinstance(output, tuple) else output)[:, :SEEN])
    assert torch.equal(logits[0], logits[1])
    return float((logits[0] - logits[2]).abs().max())


found = {
    "local-attention": change(lambda: LocalTransformer(**SIZES, dim_head=32, local_attn_window_size=16)),
    "reformer, use_full_attn": change(lambda: ReformerLM(**SIZES, bucket_size=8, n_hashes=2, use_full_attn=True)),
    "reformer": change(lambda: ReformerLM(**SIZES, bucket_size=8, n_hashes=2)),
    "routing-transformer": change(lambda: RoutingTransformerLM(**SIZES, window_size=16)),
}
packages = ("reformer-pytorch", "routing-transformer", "local-attention", "torch")
print(*(f"{name} {version(name)}" for name in packages))
for name, difference in found.items():
    print(f"{name:24} logits of earlier tokens change by {difference:.5f}")
exact = found["local-attention"] == found["reformer, use_full_attn"] == 0.0
leaking = min(found["reformer"], found["routing-transformer"]) > 0.05
sys.exit(0 if exact and leaking else "the behaviour has changed")
PYTHON
