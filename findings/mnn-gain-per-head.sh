#!/usr/bin/env bash
# MNN 3.6.1, torch 2.13.0: a gain for each head of normalised queries is applied to the channels of the heads.
# expected: the converted ONNX graph gives the logits of torch and ONNX Runtime, as it does for RMSNorm with a weight.
# seen:     the converter joins RMSNorm and the product after it into one operation, with the other factor as the weight
#           of the channels, whatever its shape is. Of queries (batch, heads, length, channels) that are normalised and
#           multiplied by a gain (heads, 1, 1), with as many heads as a head has channels, each channel is multiplied by
#           the gain of a head. Logits are wrong by 1 and more, without an error or a warning. A single token is right,
#           because it attends to nothing else. Without the norm, or with a weight of the channels, all is right.
# remedy:   give the RMSNorm a weight of ones, so that the gain is a product of its own.
# usage:    findings/mnn-gain-per-head.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 mnn==3.6.1
cd "$folder"
# What the command mnnconvert runs, without its wrapper, which installs another package and sends statistics.
cat > convert.py <<'PYTHON'
import sys

import MNN
import _tools

source, target = sys.argv[1:]
_tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", source, "--MNNModel", target, "--bizCode", "x"])
PYTHON
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import subprocess
import sys
from importlib.metadata import version

import MNN
import numpy
import onnxruntime
import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)


class Model(nn.Module):
    """One layer of attention with normalised queries and keys."""

    def __init__(self, kind, tokens=40, size=16, heads=4):
        super().__init__()
        self.kind, self.heads = kind, heads
        self.tokens, self.qkv, self.head = nn.Embedding(tokens, size), nn.Linear(size, 3 * size), nn.Linear(size, tokens)
        self.weight = nn.Parameter(torch.ones(size // heads))
        self.gain = nn.Parameter(torch.arange(1.0, heads + 1).view(heads, 1, 1))
        for layer in (self.qkv, self.head):
            nn.init.normal_(layer.weight)

    def norm(self, x):
        if self.kind == "no norm":
            return x
        return F.rms_norm(x, x.shape[-1:], self.weight if self.kind == "norm with a weight" else None, 1e-6)

    def forward(self, tokens):
        x = self.tokens(tokens)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if self.kind == "gain per head":
            q = self.norm(q) * self.gain
        else:
            q, k = self.norm(q), self.norm(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + y.transpose(1, 2).flatten(2))


found = {}
for kind in ("no norm", "norm with a weight", "gain per head"):
    torch.manual_seed(0)
    model = Model(kind).eval()
    shapes = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    program = torch.onnx.export(
        model, (torch.zeros(2, 8, dtype=torch.int64),), input_names=["tokens"], output_names=["logits"],
        dynamic_shapes=shapes, dynamo=True, verbose=False,
    )
    program.save(f"{kind}.onnx")
    session = onnxruntime.InferenceSession(f"{kind}.onnx")
    command = [sys.executable, "convert.py", f"{kind}.onnx", f"{kind}.mnn"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    module = MNN.nn.load_module_from_file(f"{kind}.mnn", ["tokens"], ["logits"])
    for shape in ((1, 1), (3, 10)):
        tokens = torch.randint(40, shape)
        exact = model(tokens).detach().numpy()
        by_ort = session.run(None, {"tokens": tokens.numpy()})[0]
        given = MNN.expr.const(tokens.flatten().tolist(), list(shape), MNN.expr.NCHW, MNN.expr.int)
        by_mnn = numpy.array(module.forward(given).read()).reshape(exact.shape)
        ort_error, error = (float(abs(y - exact).max()) for y in (by_ort, by_mnn))
        found[kind, shape] = error
        print(
            f"MNN {version('mnn')}, torch {torch.__version__}, {kind}, {shape[0]} × {shape[1]} tokens: largest difference of "
            f"the logits to torch {error:.2g}, of ONNX Runtime {ort_error:.1g}"
        )
        if ort_error > 1e-4:
            raise SystemExit("ONNX Runtime differs from torch")
right = [found[kind, shape] < 1e-3 for kind in ("no norm", "norm with a weight") for shape in ((1, 1), (3, 10))]
raise SystemExit(0 if all(right) and not found["gain per head", (3, 10)] < 0.1 else f"the behaviour has changed: {found}")
PYTHON
