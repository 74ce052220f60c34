#!/usr/bin/env bash
# openvino 2026.4.1, torch 2.13.0: on some CPUs a float32 model is computed in bfloat16, without a warning.
# expected: weights and inputs are float32, so the matrix multiplications are too, as in torch and ONNX Runtime. Logits
#           agree to 1e-5 on every CPU.
# seen:     on a CPU with bfloat16 instructions (AVX512_BF16, AMX) the compiled model rounds to bfloat16: logits differ
#           by thousandths (of a trained GPT by hundredths), on another CPU by less than 1e-5.
#           INFERENCE_PRECISION_HINT "f32" asks for float32.
# usage:    findings/openvino-rounds-to-bfloat16.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.1 torch==2.13.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
from importlib.metadata import version

import openvino
import torch
from torch import nn

V, C, T = 65, 128, 64
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(V, C), nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, V)).eval()
ids = torch.randint(V, (1, T))
with torch.no_grad():
    logits = model(ids).numpy()

core = openvino.Core()
converted = openvino.convert_model(model, example_input=ids)
has_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
print(f"openvino {version('openvino')}, a CPU {'with' if has_bfloat16 else 'without'} bfloat16 instructions")
seen = {}
for name, options in {"by default": {}, "f32 asked for": {"INFERENCE_PRECISION_HINT": "f32"}}.items():
    compiled = core.compile_model(converted, "CPU", options)
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    difference = abs(compiled(ids.numpy())[0] - logits).max()
    print(f"{name}: {precision}, largest difference of a logit from torch {difference:.1e}")
    seen[name] = (precision, bool(difference > 1e-4))
expected = {
    "by default": ("bf16", True) if has_bfloat16 else ("f32", False),
    "f32 asked for": ("f32", False),
}
raise SystemExit(0 if seen == expected else f"the behaviour has changed: {seen}, not {expected}")
PYTHON
