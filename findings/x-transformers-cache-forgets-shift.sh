#!/usr/bin/env bash
# x-transformers 2.31.10, torch 2.13.0: with shift_tokens, generate() with its key-value cache writes another text.
# expected: the cache saves time and changes nothing: greedy text is the same with cache_kv=True, the default, and False,
#           as it is without shift_tokens. Options that the cache does not support raise an error.
# seen:     shift_tokens gives each token a part of the channels of the token before. With the cache a layer has the
#           new token alone, and zeros instead of those channels: the text differs after a few tokens, without a warning.
# usage:    findings/x-transformers-cache-forgets-shift.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 x-transformers==2.31.10
cd "$folder"
venv/bin/python - <<'PYTHON'
from importlib.metadata import version

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper


def first_difference(shift_tokens):
    """Position at which greedy texts with and without the cache differ; None if they are equal."""
    torch.manual_seed(0)
    layers = Decoder(dim=32, depth=2, heads=2, shift_tokens=shift_tokens)
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=65, max_seq_len=64, attn_layers=layers)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # clear decisions, so that rounding does not matter
    prompt = torch.tensor([[7, 21, 42, 3]])
    cached, plain = (model.generate(prompt, 40, temperature=0.0, cache_kv=cache)[0].tolist() for cache in (True, False))
    return next((place for place in range(40) if cached[place] != plain[place]), None)


found = [first_difference(shift_tokens) for shift_tokens in (0, 1)]
for shift_tokens, place in enumerate(found):
    text = "equal" if place is None else f"different from token {place + 1} on"
    print(f"x-transformers {version('x-transformers')}, shift_tokens={shift_tokens}: 40 tokens with and without the cache are {text}")
raise SystemExit(0 if found[0] is None and found[1] is not None else f"the behaviour has changed: {found}")
PYTHON
