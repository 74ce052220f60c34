#!/usr/bin/env bash
# torch 2.13.0: on a CPU without AVX-512, a matmul in bfloat16 takes many times as long as in float32.
# expected: without instructions for it, the numbers are converted to float32 and back: half the memory traffic, and
#           about the speed of float32. torch.autocast("cpu"), whose type is bfloat16, does no harm.
# seen:     one thread of an EPYC with AVX2 (Zen 3): a linear layer of 768 × 128 by 128 × 512 takes 15 times as long in
#           bfloat16 and 12 times in float16, the batched product of attention (48 × 64 × 32) 27 times, without a
#           warning. Converting to float32, multiplying and converting back by hand takes about as long as float32, and
#           scaled_dot_product_attention 1.2 times as long. The script keeps oneDNN from newer instructions.
# usage:    findings/half-precision-on-avx2.sh      (PYTHON=python3.11 to choose another interpreter; an idle core)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=AVX2 venv/bin/python - <<'PYTHON'
import sys
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

torch.set_num_threads(1)
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())


def least_time(call: Callable[[], object]) -> float:
    """The least CPU time of a call, in s."""
    call()
    times = []
    for _ in range(15):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)


def slowdown(call: Callable[[torch.dtype], object], dtype: torch.dtype) -> float:
    """Time in this type over time in float32."""
    return least_time(lambda: call(dtype)) / least_time(lambda: call(torch.float32))


x, weight = torch.randn(768, 128), torch.randn(512, 128)
queries = torch.randn(12, 4, 64, 32)
inputs = {dtype: x.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
weights = {dtype: weight.to(dtype) for dtype in inputs}
heads = {dtype: queries.to(dtype) for dtype in inputs}


def layer(dtype: torch.dtype) -> torch.Tensor:
    return linear(inputs[dtype], weights[dtype])


def layer_by_hand(dtype: torch.dtype) -> torch.Tensor:
    return linear(inputs[dtype].float(), weights[dtype].float()).to(dtype)


def batched(dtype: torch.dtype) -> torch.Tensor:
    rows = heads[dtype].flatten(0, 1)
    return torch.bmm(rows, rows.mT)


def attention(dtype: torch.dtype) -> torch.Tensor:
    return scaled_dot_product_attention(heads[dtype], heads[dtype], heads[dtype], is_causal=True)


half = slowdown(layer, torch.bfloat16), slowdown(layer, torch.float16), slowdown(batched, torch.bfloat16)
others = slowdown(layer_by_hand, torch.bfloat16), slowdown(attention, torch.bfloat16)
print("linear layer in bfloat16 {:.1f}, in float16 {:.1f}, torch.bmm in bfloat16 {:.1f} times as long".format(*half))
print("linear layer converted by hand {:.1f}, attention in bfloat16 {:.1f} times as long".format(*others))
sys.exit(0 if min(half) > 4 and max(others) < 3 else "the behaviour has changed")
PYTHON
