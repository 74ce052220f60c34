#!/usr/bin/env bash
# torch 2.13.0, torchinfo 1.8.0, ptflops 0.7.5: three counters give a GPT three wrong numbers of operations on a CPU.
# expected: multiplications of the linear layers at every position, and those of attention's two matmuls; a head that is
#           tied to the embedding is one matrix.
# seen:     FlopCounterMode of torch counts no attention: the operation that scaled_dot_product_attention calls on a CPU
#           has no formula, and nothing says so; its backward pass neither. ptflops leaves attention out too. torchinfo
#           multiplies the weights of a linear layer by the sequences, not by the positions, leaves attention out, and
#           counts a tied head twice. A model FLOPs utilisation from any of them is too low.
# usage:    findings/flop-counters-of-a-gpt.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy torchinfo==1.8.0 ptflops==0.7.5
cd "$folder"
venv/bin/python - <<'PYTHON'
import contextlib
import io
from importlib.metadata import version

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

with contextlib.redirect_stdout(io.StringIO()):
    import ptflops
    import torchinfo

B, T, C, V = 2, 64, 32, 65


class Tiny(torch.nn.Module):
    """Embedding, one head of attention, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(V, C)
        self.c_attn = torch.nn.Linear(C, 3 * C, bias=False)
        self.lm_head = torch.nn.Linear(C, V, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids):
        q, k, v = self.c_attn(self.wte(ids)).unsqueeze(1).chunk(3, dim=-1)
        return self.lm_head(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))


ids, model = torch.zeros(B, T, dtype=torch.long), Tiny()
linear = B * T * (3 * C * C + C * V)  # multiplications
attention = 2 * B * T * T * C
parameters = sum(p.numel() for p in model.parameters())
print(f"true: {linear:,} in linear layers and {attention:,} in attention; {parameters:,} parameters")

with FlopCounterMode(display=False) as counter:
    loss = model(ids).sum()
torch_forward = counter.get_total_flops() // 2  # it counts additions too
with FlopCounterMode(display=False) as counter:
    loss.backward()
torch_backward = counter.get_total_flops() // 2
print(f"torch {version('torch')}: {torch_forward:,}, backward {torch_backward:,} (true: {2 * (linear + attention):,})")

table = torchinfo.summary(model, input_data=ids, verbose=0)
print(f"torchinfo {version('torchinfo')}: {table.total_mult_adds:,}, {table.total_params:,} parameters")

with contextlib.redirect_stdout(io.StringIO()):
    theirs, _ = ptflops.get_model_complexity_info(
        model, (T,), input_constructor=lambda _: {"ids": ids}, as_strings=False, print_per_layer_stat=False
    )
print(f"ptflops {version('ptflops')}: {theirs:,}")

# torchinfo adds one multiplication per weight of the embedding and sequence.
found = (torch_forward, torch_backward, theirs, table.total_mult_adds, table.total_params)
expected = (linear, 2 * linear, linear, B * (3 * C * C + 2 * C * V), parameters + C * V)
raise SystemExit(0 if found == expected else f"the behaviour has changed: {found}, not {expected}")
PYTHON
