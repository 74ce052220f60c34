#!/usr/bin/env bash
# xllamacpp 2026.10.11549 (llama.cpp's server): a context of 256 refuses a prompt of 256 tokens.
# expected: the prompt fills the context, and the one token that is asked for (n_predict 1) needs no place in it: nothing
#           is computed after it.
# seen:     an error, "exceed_context_size_error"; 255 tokens are accepted and answered. The last position of a model is
#           never used.
# usage:    findings/llama-cpp-context-of-n-takes-n-minus-1.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0 xllamacpp==2026.10.11549 numpy
cd "$folder"
venv/bin/python - 2>/dev/null <<'PYTHON'
import json
import urllib.error
import urllib.request

import gguf
import numpy
import xllamacpp

V, T, C = 3, 256, 32
writer = gguf.GGUFWriter("model.gguf", "gpt2")
writer.add_context_length(T)
writer.add_embedding_length(C)
writer.add_block_count(1)
writer.add_feed_forward_length(C)
writer.add_head_count(1)
writer.add_layer_norm_eps(1e-5)
writer.add_tokenizer_model("rwkv")
writer.add_token_list(["a", "b", "c"])
shapes = {"token_embd.weight": (V, C), "position_embd.weight": (T, C), "output_norm.weight": (C,), "output_norm.bias": (C,)}
for name, shape in {"attn_norm": (C,), "attn_qkv": (3 * C, C), "attn_output": (C, C), "ffn_norm": (C,), "ffn_up": (C, C), "ffn_down": (C, C)}.items():
    shapes |= {f"blk.0.{name}.weight": shape, f"blk.0.{name}.bias": shape[:1]}
random = numpy.random.default_rng(0)
for name, shape in shapes.items():
    writer.add_tensor(name, random.normal(size=shape).astype(numpy.float32) * 0.1)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = "model.gguf", T, 1, False
server = xllamacpp.Server(settings)


def complete(length):
    body = json.dumps({"prompt": [0] * length, "n_predict": 1}).encode()
    request = urllib.request.Request(server.listening_address + "/completion", body, {"Content-Type": "application/json"})
    try:
        return f"{json.load(urllib.request.urlopen(request))['tokens_predicted']} token"
    except urllib.error.HTTPError as error:
        return json.load(error)["error"]["type"]


found = [complete(T - 1), complete(T)]
print(f"context {T}: a prompt of {T - 1} gives {found[0]}; of {T}: {found[1]}")
raise SystemExit(0 if found == ["1 token", "exceed_context_size_error"] else "the behaviour has changed")
PYTHON
