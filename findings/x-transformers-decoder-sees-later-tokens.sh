#!/usr/bin/env bash
# x-transformers 2.31.10, torch 2.13.0: with four of its options, a Decoder reads tokens that come later.
# expected: a Decoder is causal whatever the options are: the logits of a position depend on the tokens up to it, so that
#           the loss over a window is that of predicting each token from those before it. Options that cannot be causal
#           are refused.
# seen:     orthog_residual, attn_orthog_projected_values and attn_orthog_projected_values_per_head make the output
#           orthogonal over all positions of a text at once instead of at each position, and mv_split_residual subtracts
#           a mean over all positions. Logits of the first 16 tokens change by 0.05 to 0.1 when the next 8 do, and by 0.1
#           to 0.5 when those are left out. There is no warning, and a loss that is too low looks like success.
# usage:    findings/x-transformers-decoder-sees-later-tokens.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet x-transformers==2.31.10 torch==2.13.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import sys
from importlib.metadata import version

import torch
from x_transformers import Decoder, TransformerWrapper

SEEN, LENGTH, TOKENS = 16, 24, 65
OPTIONS = (
    *("attn_qk_norm", "attn_value_rmsnorm", "attn_laser"),
    *("attn_orthog_projected_values", "attn_orthog_projected_values_per_head"),
    *("rotary_pos_emb", "scale_residual", "gate_residual", "orthog_residual", "mv_split_residual"),
)


@torch.no_grad()
def changes(option: str | None) -> tuple[float, float]:
    """The greatest change of the first logits where later tokens are other ones, and where they are left out."""
    torch.manual_seed(0)
    settings = {} if option is None else {option: True}
    layers = Decoder(dim=64, depth=2, heads=2, attn_dim_head=32, **settings)
    model = TransformerWrapper(num_tokens=TOKENS, max_seq_len=LENGTH, attn_layers=layers).eval()
    for parameter in model.parameters():  # initial weights are small, and some are zero
        if parameter.dim() > 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids = torch.randint(TOKENS, (1, LENGTH))
    other = torch.cat((ids[:, :SEEN], torch.randint(TOKENS, (1, LENGTH - SEEN))), 1)
    logits = model(ids)[:, :SEEN]
    return tuple(float((logits - model(text)[:, :SEEN]).abs().max()) for text in (other, ids[:, :SEEN]))


print("x-transformers", version("x-transformers"), "torch", version("torch"))
found = {option: changes(option) for option in (None, *OPTIONS)}
for option, (replaced, left_out) in found.items():
    print(f"{option or 'no option':38} later tokens replaced {replaced:.4f}, left out {left_out:.4f}")
leaking = {option for option, both in found.items() if min(both) > 1e-3}
causal = {option for option, both in found.items() if max(both) < 1e-5}
named = {option for option in OPTIONS if "orthog" in option or option == "mv_split_residual"}
sys.exit(0 if leaking == named and causal == found.keys() - named else "the behaviour has changed")
PYTHON
