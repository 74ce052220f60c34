#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch.rand in bfloat16 is 0 in one of 512 draws, so `rand < 0.001` is true three times too often.
# expected: uniform numbers in [0, 1), rounded to the type: 0 about as often as in float32 (bfloat16 is as fine near 0),
#           and `torch.rand_like(x) < p` is true with probability p, as torch.bernoulli and dropout are in bfloat16.
# seen:     numbers are drawn in float32 and rounded. What is rounded up to 1, which is outside of the interval, becomes 0:
#           1 of 512 numbers in bfloat16, 1 of 4,096 in float16. `rand < p` has the probability p + 0.00195, and
#           -log(rand), the usual noise of Gumbel and exponential sampling, is infinite that often. `uniform_` does the
#           same with other bounds: numbers that are rounded to the upper bound become the lower one.
# remedy:   draw in float32, or use bernoulli_ and exponential_, which are right in bfloat16.
# usage:    findings/torch-rand-bfloat16-zeros.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch

COUNT, RATE = 8_000_000, 0.001
zeros, below = {}, {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    torch.manual_seed(0)
    numbers = torch.rand(COUNT, dtype=dtype)
    zeros[dtype], below[dtype] = (numbers == 0).sum().item() / COUNT, (numbers < RATE).sum().item() / COUNT
    drawn = torch.empty(COUNT, dtype=dtype).bernoulli_(RATE).float().sum().item() / COUNT
    infinite = numbers.log().neg().isinf().sum().item() / COUNT
    print(f"{dtype}: zeros {zeros[dtype]:.6f}, rand < {RATE} {below[dtype]:.5f}, bernoulli {drawn:.5f}, -log infinite {infinite:.6f}")

torch.manual_seed(0)
exact = torch.rand(COUNT)
torch.manual_seed(0)
rounded = torch.rand(COUNT, dtype=torch.bfloat16)
far = (rounded.float() - exact).abs() > 0.5
print(f"numbers that are 0 instead of 1: {far.sum().item() / COUNT:.6f}, the least of them in float32 {exact[far].min():.6f}")
torch.manual_seed(0)
lowest = (torch.empty(COUNT, dtype=torch.bfloat16).uniform_(-1, 1) == -1).sum().item() / COUNT
print(f"uniform_(-1, 1) in bfloat16: exactly -1 in {lowest:.6f} of the draws; torch {torch.__version__}")
shares = [zeros[torch.bfloat16] * 512, zeros[torch.float16] * 4096, (below[torch.bfloat16] - RATE) * 512]
same = all(0.9 < share < 1.1 for share in shares) and zeros[torch.float32] < 1e-6 and exact[far].min() > 0.998
raise SystemExit(0 if same else f"the behaviour has changed: {zeros} {below}")
PYTHON
