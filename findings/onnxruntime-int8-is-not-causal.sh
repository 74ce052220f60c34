#!/usr/bin/env bash
# onnxruntime 1.32.0, torch 2.13.0: a GPT quantised by `quantize_dynamic` sees later tokens and the rest of the batch.
# expected: int8 weights and activations cost accuracy, and a causal model stays causal: the logits of a position depend
#           on the tokens up to it, and not on the other texts of the batch, as those of the float32 model.
# seen:     DynamicQuantizeLinear has one scale for the whole tensor, batch and positions included, so one large value of
#           any token changes the rounding of all others. The logits of the first tokens change with the later tokens
#           about as much as by quantisation itself: a loss over whole windows is not that of a text read token by
#           token, and a sample depends on the samples next to it.
# usage:    findings/onnxruntime-int8-is-not-causal.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import numpy
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.first, self.second = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x):
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


class GPT(nn.Module):
    def __init__(self, vocabulary=65, size=64):
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocabulary, size), nn.Linear(size, vocabulary)
        self.blocks = nn.Sequential(Block(size), Block(size), nn.LayerNorm(size))

    def forward(self, tokens):
        return self.head(self.blocks(self.tokens(tokens)))


torch.manual_seed(0)
model, texts = GPT().eval(), torch.randint(65, (4, 32))
dimensions = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
torch.onnx.export(model, (texts,), dynamic_shapes=dimensions, dynamo=True, verbose=False).save("float32.onnx")
quantize_dynamic("float32.onnx", "int8.onnx")
exact = model(texts).detach().numpy()


def rms(difference):
    return float(numpy.sqrt(numpy.square(difference).mean()))


found = {}
for kind in ("float32", "int8"):
    session = onnxruntime.InferenceSession(f"{kind}.onnx")

    def logits(tokens):
        return session.run(None, {session.get_inputs()[0].name: tokens.numpy()})[0]

    whole = logits(texts)
    error, later = rms(whole - exact), rms(logits(texts[:, :16]) - whole[:, :16])
    others = rms(logits(texts[:1]) - whole[:1])
    found[kind] = error, later, others
    print(
        f"onnxruntime {onnxruntime.__version__}, {kind}: RMS difference of the logits to torch {error:.6f}; of 16 tokens, "
        f"with and without 16 later ones: {later:.6f}; of a text, with and without 3 other texts: {others:.6f}"
    )
small = all(value < 1e-5 for value in found["float32"])
error, later, others = found["int8"]
raise SystemExit(0 if small and later > 0.2 * error and others > 0.2 * error else f"the behaviour has changed: {found}")
PYTHON
