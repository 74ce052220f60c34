#!/usr/bin/env bash
# torch 2.13.0: the random generator on a CPU reads the last 32 bits of a seed.
# expected: a seed of 64 bits is accepted and returned by initial_seed(), so seeds that differ anywhere give different
#           numbers. Deriving one from two numbers, `epoch << 32 | sample` or `seed + (step << 32)`, keeps them apart.
# seen:     seeds that are equal in their last 32 bits give the same numbers: torch.manual_seed(1337) and
#           torch.manual_seed(1337 + 2**32), as well as `Generator().manual_seed`; initial_seed() returns what was given.
#           With the first form every epoch draws the same numbers. -1 is 2**32 - 1. Generators of NumPy and Python read
#           all bits.
# remedy:   hash the numbers to 32 bits, or draw the numbers with NumPy.
# usage:    findings/torch-seed-of-32-bits.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import random
import sys

import numpy as np
import torch


def by_torch(seed: int) -> list[float]:
    return torch.rand(5, generator=torch.Generator().manual_seed(seed)).tolist()


def permutation_by_torch(seed: int) -> list[int]:
    torch.manual_seed(seed)
    assert torch.initial_seed() == seed % 2**64
    return torch.randperm(1000).tolist()


def by_numpy(seed: int) -> list[float]:
    return np.random.default_rng(seed).random(5).tolist()


def by_python(seed: int) -> list[float]:
    numbers = random.Random(seed)
    return [numbers.random() for _ in range(5)]


print("torch", torch.__version__, "numpy", np.__version__)
pairs = {"1337 + 2**32": (1337, 1337 + 2**32), "epoch << 32 | 1337": (1 << 32 | 1337, 2 << 32 | 1337)}
same = {}
for draw in (by_torch, permutation_by_torch, by_numpy, by_python):
    same[draw.__name__] = {name: draw(one) == draw(other) for name, (one, other) in pairs.items()}
    print(f"{draw.__name__:22} the same numbers: {same[draw.__name__]}")
negative = by_torch(-1) == by_torch(2**32 - 1)
print("torch, -1 and 2**32 - 1 the same:", negative)
torchs = [*same["by_torch"].values(), *same["permutation_by_torch"].values(), negative]
others = [*same["by_numpy"].values(), *same["by_python"].values()]
sys.exit(0 if all(torchs) and not any(others) else "the behaviour has changed")
PYTHON
