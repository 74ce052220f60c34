#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: Bamba gives every token that is read with the cache the position 0.
# expected: a model that gets a `cache` and no position_ids counts on from the length of the cache, as Llama and
#           more than a hundred other models of the library do.
# seen:     the positions are those of the new tokens alone, from 0 on, in the rotary embedding of the attention layers. A
#           loop of one's own over forward (a sampler, or a loss token by token) gets other logits than those of the
#           text at once, without a warning. generate() passes position_ids and is right.
# remedy:   pass position_ids.
# usage:    findings/transformers-bamba-positions-start-again.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
from importlib.metadata import version

import torch
from transformers import BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH, PROMPT = 64, 40, 8
shared = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 2, "mamba_chunk_size": 8}
torch.set_num_threads(1)
torch.manual_seed(0)
llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shared))
bamba = BambaForCausalLM(BambaConfig(num_hidden_layers=3, attn_layer_indices=[1], **mamba, **shared))
texts = torch.randint(3, VOCABULARY, (2, LENGTH))


@torch.no_grad()
def difference(model, with_positions):
    """Greatest difference of the logits at once and token by token with the cache, in standard deviations."""
    whole, cache, start, pieces = model(texts, use_cache=False).logits, None, 0, []
    for end in range(PROMPT, LENGTH + 1):
        positions = {"position_ids": torch.arange(start, end)[None]} if with_positions else {}
        output = model(texts[:, start:end], cache=cache, use_cache=True, **positions)
        cache, start = output.cache, end
        pieces.append(output.logits)
    return ((torch.cat(pieces, 1) - whole).abs().max() / whole.std()).item()


found = {}
for name, model in (("Llama", llama), ("Bamba", bamba)):
    with torch.no_grad():
        for weight in model.eval().parameters():
            weight.mul_(10 if weight.ndim == 2 else 1)  # as large as trained ones
    for with_positions in (False, True):
        found[name, with_positions] = difference(model, with_positions)
        given = "with" if with_positions else "without"
        print(f"{name}, {given} position_ids: logits differ by {found[name, with_positions]:.0e} standard deviations")
print(*(f"{name} {version(name)}" for name in ("transformers", "torch")))
same = found.pop(("Bamba", False)) > 0.05 and all(value < 1e-3 for value in found.values())
raise SystemExit(0 if same else f"the behaviour has changed: {found}")
PYTHON
