#!/usr/bin/env bash
# onnxruntime-genai 0.18.0, transformers 5.24.0: where the vocabulary is as large as a layer is wide, the head is elsewhere.
# expected: the builder writes an ONNX model with the logits of the Hugging Face model, whatever its sizes are, as
#           small models with 256 bytes or characters and a width of 256 have them.
# seen:     it takes each linear layer with as many outputs as there are tokens for the head, and the first one it meets
#           after the first decoder layer is a projection of that layer: the head reads the hidden values inside layer 0, and
#           the later layers have no effect on the logits. The model loads, runs and writes text, without a warning. With
#           one token more or less it is exact.
# remedy:   pad the vocabulary to a size that no other layer has.
# usage:    findings/onnxruntime-genai-head-in-the-middle.sh      (PYTHON=python3.11 to choose another interpreter)
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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

LENGTH, WIDTH, HIDDEN = 24, 64, 160


def build(kind, config_type, tokens):
    """A model with random weights, and what the builder made of it."""
    folder = f"{kind}-{tokens}"
    sizes = {"vocab_size": tokens, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = kind(config_type(bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6) if weight.ndim > 1 else weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    vocabulary = {chr(0x100 + token): token for token in range(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=chr(0x101)).save_pretrained(folder)
    arguments = None, folder, f"{folder}-onnx", "fp32", "cpu", "cache"
    with contextlib.redirect_stdout(io.StringIO()):
        builder.create_model(*arguments, **builder.parse_extra_options(*arguments, ["hf_token=false"]))
    return model, onnxruntime_genai.Model(f"{folder}-onnx")


def logits(model, text):
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=64, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(text.numpy().astype(numpy.int32))
    return generator.get_logits()[0, -1]


found = {}
for name, kind, config_type in (("Llama", LlamaForCausalLM, LlamaConfig), ("Qwen3", Qwen3ForCausalLM, Qwen3Config)):
    for tokens in (WIDTH - 1, WIDTH, WIDTH + 1, HIDDEN, HIDDEN + 1):
        model, built = build(kind, config_type, tokens)
        text = torch.randint(0, tokens, (1, LENGTH))
        with torch.no_grad():
            exact = model(text).logits[0, -1].numpy()
        found[name, tokens] = gap = float(numpy.abs(logits(built, text) - exact).max())
        print(f"{name}, width {WIDTH}, MLP {HIDDEN}, {tokens} tokens: logits (standard deviation {exact.std():.2f}) differ by {gap:.5f}")
print(*(f"{name} {version(name)}" for name in ("onnxruntime-genai", "onnxruntime", "transformers", "torch")))
same = all((gap > 0.3) == (tokens in (WIDTH, HIDDEN)) and (gap > 0.3 or gap < 1e-3) for (_, tokens), gap in found.items())
raise SystemExit(0 if same else f"the behaviour has changed: {found}")
PYTHON
