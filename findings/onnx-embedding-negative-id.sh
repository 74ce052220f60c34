#!/usr/bin/env bash
# torch 2.13.0, onnxruntime 1.32.0: an exported nn.Embedding accepts the id -1 and returns the last row.
# expected: an error, as in torch ("index out of range in self"): -1 is no token, but often a padding value.
# seen:     ONNX's Gather counts negative indices from the end, so that -1 is the last token of the vocabulary, silently;
#           an id beyond the vocabulary is refused.
# usage:    findings/onnx-embedding-negative-id.sh      (PYTHON=python3.11 to choose another interpreter)
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

table = torch.nn.Embedding(5, 3)
torch.onnx.export(table, (torch.zeros(2, dtype=torch.int64),), dynamo=True, verbose=False).save("model.onnx")
session = onnxruntime.InferenceSession("model.onnx")
name = session.get_inputs()[0].name


def rows(ids):
    try:
        return session.run(None, {name: numpy.array(ids)})[0]
    except Exception as error:
        return type(error).__name__


try:
    in_torch = table(torch.tensor([-1, 0]))
except IndexError:
    in_torch = "IndexError"
last = numpy.allclose(rows([-1, 0])[0], table.weight[4].detach().numpy())
print(f"torch: {in_torch}; onnxruntime {onnxruntime.__version__}: the last row is returned: {last}; id 5: {rows([5, 0])}")
raise SystemExit(0 if in_torch == "IndexError" and last and rows([5, 0]) == "InvalidArgument" else "it has changed")
PYTHON
