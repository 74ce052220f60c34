#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: a Llama read with gguf_file= has no rope scaling and no biases of the attention.
# expected: a GGUF file describes the model: `rope.scaling.*` and the tensor rope_freqs (Llama 3.1 to 3.3) change the
#           frequencies of the positions, and attn_q.bias and its like are weights. What a reader does not support is
#           refused, or a warning says so.
# seen:     all of them are left out, and the log says so at the level INFO only. The logits are those of another model, in
#           files with linear scaling, with rope_freqs and with biases; llama.cpp, which reads the same files, agrees with
#           the saved model. The loading report is empty, and save_pretrained() writes the other model. A plain Llama, a
#           tied one and another rope_theta are read exactly.
# remedy:   pass the original config: from_pretrained(..., gguf_file=..., config=config).
# usage:    findings/transformers-gguf-forgets-rope-scaling.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0 xllamacpp==2026.10.11549
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import json
import urllib.request
from importlib.metadata import version

import gguf
import numpy
import torch
import xllamacpp
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

V, T, C, HEADS, BLOCKS, THETA = 40, 256, 32, 2, 2, 10000.0
sizes = {"vocab_size": V, "hidden_size": C, "intermediate_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": THETA}
llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": THETA}
settings = {
    "plain": {},
    "tied head": {"tie_word_embeddings": True},
    "linear scaling": {"rope_parameters": linear},
    "llama3 scaling": {"rope_parameters": llama3 | {"original_max_position_embeddings": 64}},
    "biases": {"attention_bias": True},
}
torch.manual_seed(0)
text = torch.randint(0, V, (1, 128))


def write(path, model, config):
    """As convert_hf_to_gguf.py of llama.cpp: rows of Q and K in another order, factors of Llama 3 as a tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(V)
    writer.add_context_length(T)
    writer.add_embedding_length(C)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(C // HEADS)
    writer.add_rope_freq_base(THETA)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{token}" for token in range(V)])
    writer.add_token_scores([0.0] * V)
    writer.add_token_types([gguf.TokenType.NORMAL] * V)
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    elif config.rope_parameters["rope_type"] == "llama3":
        plain = THETA ** -(numpy.arange(0, C // HEADS, 2) / (C // HEADS))
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq.numpy()).astype(numpy.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, BLOCKS)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = array.reshape(HEADS, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        layer, kind = name.rsplit(".", 1)
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(f"{names.get_name(layer)}.{kind}", numpy.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(path):
    """Log-probabilities of the token after the text."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.warmup = path, T, 1, False
    server = xllamacpp.Server(parameters)
    body = json.dumps({"prompt": text[0].tolist(), "n_predict": 1, "n_probs": V, "temperature": 0}).encode()
    request = urllib.request.Request(server.listening_address + "/completion", body, {"Content-Type": "application/json"})
    answer = json.load(urllib.request.urlopen(request))["completion_probabilities"][0]["top_logprobs"]
    return torch.tensor([entry["logprob"] for entry in sorted(answer, key=lambda entry: entry["id"])])


@torch.no_grad()
def log_probabilities(model):
    return model.eval()(text).logits[0, -1].log_softmax(-1)


found = {}
for number, (name, setting) in enumerate(settings.items()):
    config = LlamaConfig(max_position_embeddings=T, **sizes, **setting)
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8) if weight.ndim == 2 else weight.add_(0.3 * torch.randn_like(weight))
    file = f"{number}.gguf"
    write(file, model, config)
    read, report = AutoModelForCausalLM.from_pretrained(".", gguf_file=file, output_loading_info=True)
    given = AutoModelForCausalLM.from_pretrained(".", gguf_file=file, config=config)
    exact = log_probabilities(model)
    gaps = [(other - exact).abs().max().item() for other in (log_probabilities(read), log_probabilities(given), llama_cpp(file))]
    found[name] = *gaps, any(report.values())
    print(
        f"{name}: log-probabilities of the next token differ from those of the saved model by {gaps[0]:.3f} in transformers, "
        f"{gaps[1]:.3f} with config=, {gaps[2]:.3f} in llama.cpp; loading report {'not ' if any(report.values()) else ''}empty"
    )
print(*(f"{name} {version(name)}" for name in ("transformers", "torch", "gguf", "xllamacpp")))
same = all(given < 0.01 and other < 0.01 and not reported for _, given, other, reported in found.values())
for name, (gap, *_) in found.items():
    same = same and (gap < 0.01 if name in ("plain", "tied head") else gap > 0.1)
raise SystemExit(0 if same else f"the behaviour has changed: {found}")
PYTHON
