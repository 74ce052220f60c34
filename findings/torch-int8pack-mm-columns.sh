#!/usr/bin/env bash
# torch 2.13.0: _weight_int8pack_mm on a CPU is wrong, or crashes, unless the input has a multiple of 16 columns.
# expected: the product, or an error that names the shape.
# seen:     the AVX-512 kernel for bfloat16 reads 16 columns at once with aligned loads and has no code for the rest: with
#           40 columns it adds whatever follows the row, with 31 columns and several rows the process gets SIGSEGV.
# usage:    findings/torch-int8pack-mm-columns.sh      (x86 with AVX-512; PYTHON=python3.11 for another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import multiprocessing

import torch


def product(columns, result):
    x = torch.ones(3, columns, dtype=torch.bfloat16)
    weight, scales = torch.ones(96, columns, dtype=torch.int8), torch.ones(96, dtype=torch.bfloat16)
    result.value = bool((torch._weight_int8pack_mm(x, weight, scales) == columns).all())


def outcome(columns):
    context = multiprocessing.get_context("fork")
    result = context.Value("i", -1)
    process = context.Process(target=product, args=(columns, result))
    process.start()
    process.join()
    return "crash" if process.exitcode else ("wrong", "right")[result.value]


found = {columns: outcome(columns) for columns in (16, 31, 32, 40, 48)}
print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}: {found}")
right = [columns for columns in found if found[columns] == "right"]
raise SystemExit(0 if right == [16, 32, 48] else "it has changed")
PYTHON
