#!/usr/bin/env bash
# MNN 3.6.1, torch 2.13.0: F.normalize(x, dim=-1) is divided by the norm of the whole batch, logsumexp sums over all of it.
# expected: a converted ONNX graph reduces the axes that it names, as it does for mean, sum, amax and prod, or the
#           converter refuses the operation, as it does with Mish ("These Op Not Support").
# seen:     from opset 18 on, the axes are an input of the reductions. For ReduceL2, ReduceL1 and ReduceLogSumExp the
#           converter does not read it, so all axes are reduced, without an error or a warning. F.normalize keeps its
#           shape, so the vectors only get shorter with every vector in the batch: attention over normalised queries
#           and keys, or a comparison of embeddings by cosine, depends on the other texts. x.norm(dim=-1) and
#           logsumexp(x, -1) return one number.
# remedy:   write x.square().sum(-1, keepdim=True).sqrt(), and x.exp().sum(-1).log() after the maximum is taken off.
# usage:    findings/mnn-normalize-reduces-all-axes.sh      (PYTHON=python3.11 to choose another interpreter)
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
functions = {
    "mean": lambda x: x.mean(-1),
    "amax": lambda x: x.amax(-1),
    "root of the sum of squares": lambda x: x / x.square().sum(-1, keepdim=True).sqrt(),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "norm": lambda x: x.norm(dim=-1),
    "logsumexp": lambda x: x.logsumexp(-1),
}


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


torch.manual_seed(0)
x = torch.randn(3, 5, 8)
found = {}
for kind, function in functions.items():
    source, target = f"{kind}.onnx", f"{kind}.mnn"
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    torch.onnx.export(
        Model(function).eval(), (x,), input_names=["x"], output_names=["y"], dynamic_shapes=shapes, dynamo=True, verbose=False
    ).save(source)
    expected = onnxruntime.InferenceSession(source).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(expected), function(x))
    command = [sys.executable, "convert.py", source, target]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    module = MNN.nn.load_module_from_file(target, ["x"], ["y"])
    given = MNN.expr.const(x.flatten().tolist(), list(x.shape), MNN.expr.NCHW, MNN.expr.float)
    y = numpy.array(module.forward(given).read())
    found[kind] = y.shape == expected.shape and float(abs(y - expected).max()) < 1e-4
    print(
        f"MNN {version('mnn')}, torch {torch.__version__}, {kind}: {'equal' if found[kind] else 'different'}; shape {y.shape} "
        f"for {expected.shape}, first values {y.flatten()[:3]} for {expected.flatten()[:3]}"
    )
changed = list(found.values()) != [True] * 3 + [False] * 3
raise SystemExit(f"the behaviour has changed: {found}" if changed else 0)
PYTHON
