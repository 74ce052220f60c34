#!/usr/bin/env bash
# torch 2.13.0: the bounds of torch.export.Dim(min=…, max=…) are lost in the ONNX file.
# expected: a graph exported with length in 2..16 refuses a length of 40, as the exported program in torch does
#           ("Guard failed: ids.size()[1] <= 16"), or at least records the bounds.
# seen:     ONNX Runtime runs it at 40 and at 1 without a word; no property of the file mentions 16.
# remedy:   let the graph look something up at every position, in a table of that many rows.
# usage:    findings/onnx-dynamic-dim-bound.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
venv/bin/python - 2>/dev/null <<'PYTHON'
import numpy
import onnxruntime
import torch

model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Tanh()).eval()
ids = torch.zeros(2, 8, dtype=torch.int64)
shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=16)},)
program = torch.export.export(model, (ids,), dynamic_shapes=shapes)
try:
    program.module()(torch.zeros(1, 40, dtype=torch.int64))
    in_torch = "accepted"
except AssertionError as error:
    in_torch = f"refused ({str(error).splitlines()[0]})"
torch.onnx.export(program, dynamo=True, verbose=False).save("model.onnx")
session = onnxruntime.InferenceSession("model.onnx")
name = session.get_inputs()[0].name
lengths = [session.run(None, {name: numpy.zeros((1, length), numpy.int64)})[0].shape[1] for length in (1, 40)]
named = b"16" in open("model.onnx", "rb").read()
print(f"torch {torch.__version__}: length 40 is {in_torch} by the program; the ONNX file runs at {lengths}")
raise SystemExit(0 if in_torch.startswith("refused") and lengths == [1, 40] else "the behaviour has changed")
PYTHON
