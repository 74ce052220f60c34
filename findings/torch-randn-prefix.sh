#!/usr/bin/env bash
# torch 2.13.0 (CPU): a longer torch.randn of the same seed does not begin with the shorter one.
# expected: as with torch.rand, exponential_, bernoulli_ and NumPy's generators, more numbers only add numbers at the end,
#           so the noise of a row depends on its seed and position, not on the size of the batch.
# seen:     up to 15 numbers come from another algorithm than 16 and more, and where the count is no multiple of 16
#           the last 16 numbers are drawn once more. randn(17) shares its first number only with randn(16), randn(20) its
#           first 4 with randn(32), and randn(15) none with randn(16). Multiples of 16 are prefixes of each other.
# usage:    findings/torch-randn-prefix.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import numpy
import torch


def drawn(draw, size):
    torch.manual_seed(1)
    return draw(size)


def equal_at_the_start(draw, short, long):
    """Whether each number of the shorter draw is the number at the same place in the longer one."""
    return (drawn(draw, short) == drawn(draw, long)[:short]).tolist()


pairs = [(15, 16), (16, 17), (20, 32), (16, 32)]
found = {}
for short, long in pairs:
    found[short, long] = sum(equal_at_the_start(torch.randn, short, long))
    uniform = sum(equal_at_the_start(torch.rand, short, long))
    normal = [numpy.random.default_rng(1).standard_normal(size) for size in (short, long)]
    others = f"torch.rand {uniform}, NumPy's standard_normal {(normal[0] == normal[1][:short]).sum()}"
    print(f"torch {torch.__version__}: the first {short} of {long} numbers, equal in torch.randn {found[short, long]}, {others}")
raise SystemExit(0 if list(found.values()) == [0, 1, 4, 16] else f"the behaviour has changed: {found}")
PYTHON
