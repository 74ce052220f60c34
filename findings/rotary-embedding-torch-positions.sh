#!/usr/bin/env bash
# rotary-embedding-torch 0.9.1, torch 2.13.0: with bfloat16 queries, most positions after 256 share a rotation.
# expected: angles are computed in float32 (the table of frequencies is), and the rotated queries are rounded at the end.
#           Every position has a rotation of its own.
# seen:     positions are counted in the type of the queries, which linear layers return in bfloat16 under autocast: it
#           has no odd integers above 256 and only every fourth from 512 on. Of 1,024 positions 513 are left. Queries in
#           float32 and float16 are right.
# usage:    findings/rotary-embedding-torch-positions.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rotary-embedding-torch==0.9.1 torch==2.13.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
from importlib.metadata import version

import torch
from rotary_embedding_torch import RotaryEmbedding

POSITIONS, D = 1024, 64


def rotations(dtype):
    """Rows of ones, rotated: equal rows are equal rotations."""
    return RotaryEmbedding(dim=D).rotate_queries_or_keys(torch.ones(1, 1, POSITIONS, D, dtype=dtype))[0, 0].float()


exact = rotations(torch.float32)
counts = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    rows = rotations(dtype)
    counts[dtype] = rows.unique(dim=0).size(0)
    error = (rows - exact).abs().max()
    print(f"rotary-embedding-torch {version('rotary-embedding-torch')}, {dtype}: {counts[dtype]:,} rotations of {POSITIONS:,} positions, largest error {error:.3f}")
rounded = exact.bfloat16().float().unique(dim=0).size(0)
print(f"float32 rotations, rounded to bfloat16 afterwards: {rounded:,}")
changed = (counts[torch.float32], counts[torch.float16], counts[torch.bfloat16], rounded) != (1024, 1024, 513, 1024)
raise SystemExit("the behaviour has changed" if changed else 0)
PYTHON
