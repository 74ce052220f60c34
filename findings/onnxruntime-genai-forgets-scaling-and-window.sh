#!/usr/bin/env bash
# onnxruntime-genai 0.18.0, transformers 5.24.0: the builder loses linear and YaRN scaling, Mistral's window, OLMo's mean.
# expected: the builder writes an ONNX model with the logits of the Hugging Face model; a setting of config.json that it
#           does not know is refused, or a warning says so.
# seen:     a Llama with linear or YaRN scaling of its positions is built without it, a Mistral with sliding_window attends
#           to all of the text, and the LayerNorm of OLMo becomes an RMSNorm, which does not subtract the mean: the logits
#           differ by as much as logits differ (for the window, from the first position on that is longer than it).
#           Llama 3's scaling, another rope_theta and a window of Gemma 2 are exact.
# usage:    findings/onnxruntime-genai-forgets-scaling-and-window.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0 onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.32.0 onnxruntime-genai==0.18.0
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import contextlib
import io
from importlib.metadata import version

import numpy
import onnxruntime_genai
import torch
from onnxruntime_genai.models import builder
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, OlmoConfig, PreTrainedTokenizerFast

V, LENGTH, WINDOW = 61, 24, 16
sizes = {"vocab_size": V, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
sizes |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}
sizes |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def llama(kind, **settings):
    return LlamaConfig(rope_parameters={"rope_type": kind, "rope_theta": 10000.0} | settings, **sizes)


kinds = {
    "Llama": llama("default"),
    "Llama, rope_theta 500": llama("default", rope_theta=500.0),
    "Llama, llama3 scaling": llama("llama3", **llama3),
    "Gemma 2, window": Gemma2Config(sliding_window=WINDOW, query_pre_attn_scalar=16, **sizes),
    "Mistral": MistralConfig(sliding_window=None, **sizes),
    "Mistral, window": MistralConfig(sliding_window=WINDOW, **sizes),
    "Llama, linear scaling": llama("linear", factor=4.0),
    "Llama, YaRN scaling": llama("yarn", factor=4.0, original_max_position_embeddings=32),
    "OLMo": OlmoConfig(**sizes),
}
LOST = {"OLMo", "Mistral, window", "Llama, linear scaling", "Llama, YaRN scaling"}
torch.manual_seed(0)
text = torch.randint(0, V, (1, LENGTH))


def build(folder, config):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6) if weight.ndim > 1 else weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={chr(0x100 + token): token for token in range(V)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=chr(0x101)).save_pretrained(folder)
    arguments = None, folder, f"{folder}-onnx", "fp32", "cpu", "cache"
    with contextlib.redirect_stdout(io.StringIO()):
        builder.create_model(*arguments, **builder.parse_extra_options(*arguments, ["hf_token=false"]))
    return model, onnxruntime_genai.Model(f"{folder}-onnx")


def logits(model):
    """Logits of all positions, token by token."""
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=64, do_sample=False)
    generator, rows = onnxruntime_genai.Generator(model, parameters), []
    for position in range(LENGTH):
        generator.append_tokens(text[:, position : position + 1].numpy().astype(numpy.int32))
        rows.append(generator.get_logits()[0, -1].copy())
    return numpy.stack(rows)


found = {}
for number, (name, config) in enumerate(kinds.items()):
    model, built = build(str(number), config)
    with torch.no_grad():
        exact = model(text).logits[0].numpy()
    gaps = numpy.abs(logits(built) - exact).max(-1)
    wrong = numpy.flatnonzero(gaps > 1e-3)
    found[name] = float(gaps.max()), int(wrong[0]) if len(wrong) else None
    where = f", from position {wrong[0]} on" if len(wrong) else ""
    print(f"{name}: logits (standard deviation {exact.std():.2f}) differ by {gaps.max():.5f}{where}")
print(*(f"{name} {version(name)}" for name in ("onnxruntime-genai", "onnxruntime", "transformers", "torch")))
same = all((gap > 0.3) == (name in LOST) and (gap > 0.3 or gap < 1e-3) for name, (gap, _) in found.items())
raise SystemExit(0 if same and found["Mistral, window"][1] == WINDOW else f"the behaviour has changed: {found}")
PYTHON
