#!/usr/bin/env bash
# x-transformers 2.31.10, torch 2.13.0: generate() samples from the most likely tenth of the tokens only.
# expected: as in nanoGPT and transformers, temperature 1 without other arguments samples from the model's distribution.
# seen:     `filter_logits_fn` is `top_k` by default, which keeps ⌈0.1 · tokens⌉: of 65 characters the 7 most likely ones,
#           which an untrained model gives a quarter of the probability. With filter_logits_fn=lambda logits: logits, all
#           characters are sampled.
# usage:    findings/x-transformers-generates-from-a-tenth.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q x-transformers==2.31.10 torch==2.13.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
from importlib.metadata import version

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

CHARACTERS, SAMPLES = 65, 20_000
torch.manual_seed(1)
network = TransformerWrapper(num_tokens=CHARACTERS, max_seq_len=8, attn_layers=Decoder(dim=64, depth=1, heads=1))
model = AutoregressiveWrapper(network).eval()
prompts = torch.zeros(SAMPLES, 1, dtype=torch.long)
with torch.no_grad():
    probabilities = network(prompts[:1])[0, -1].softmax(0)
    default = model.generate(prompts, 1, temperature=1.0).unique()
    unfiltered = model.generate(prompts, 1, temperature=1.0, filter_logits_fn=lambda logits: logits).unique()
print(f"x-transformers {version('x-transformers')}: of {CHARACTERS} characters, {SAMPLES:,} samples at temperature 1")
print(f"default: {len(default)} different ones, which the model gives {probabilities[default].sum():.0%}")
print(f"without the filter: {len(unfiltered)}")
raise SystemExit(0 if (len(default), len(unfiltered)) == (7, CHARACTERS) else "the behaviour has changed")
PYTHON
