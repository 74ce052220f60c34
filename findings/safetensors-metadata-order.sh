#!/usr/bin/env bash
# safetensors 0.8.0, torch 2.13.0: saving the same tensors with the same metadata twice gives two different files.
# expected: equal input gives equal bytes (the tensors are laid out in a fixed order), so that a SHA-256 identifies a model.
# seen:     the entries of `metadata` are written in a random order, which changes with every call, even within a process:
#           with several entries the digests differ. With one entry, which is what transformers writes, or none they are
#           equal. The tensors are equal always.
# remedy:   compare the tensors, or keep several values in one entry, as JSON with sorted keys.
# usage:    findings/safetensors-metadata-order.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 safetensors==0.8.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import hashlib
from importlib.metadata import version

import torch
from safetensors.torch import load, save

tensors = {"wte": torch.arange(6.0).reshape(3, 2), "lm_head": torch.ones(3, 2, dtype=torch.float16)}
entries = {"format": "pt", "license": "mit", "seed": "1337", "steps": "1620", "block_size": "64", "tokenizer": "characters"}
found, equal = [], True
for count in (0, 1, 6):
    metadata = dict(list(entries.items())[:count])
    files = [save(tensors, metadata=metadata) for _ in range(20)]
    found.append(len({hashlib.sha256(file).hexdigest() for file in files}))
    equal &= all(torch.equal(load(file)[name], tensor) for file in files for name, tensor in tensors.items())
    text = f"{count} entries of metadata: 20 calls wrote {found[-1]} different files, tensors equal {equal}"
    print(f"safetensors {version('safetensors')}, {text}")
raise SystemExit(0 if found[:2] == [1, 1] and found[2] > 1 and equal else f"the behaviour has changed: {found}")
PYTHON
