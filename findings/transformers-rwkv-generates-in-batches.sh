#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: with RWKV, generate() of several prompts mixes them; each gets another text.
# expected: prompts of one length need no padding, and greedy texts of a batch are those of each prompt alone, as they are
#           with GPT-2, Mamba and with use_cache=False.
# seen:     where one token is read with the state of the text before it, a state of (batch, channels) meets hidden values
#           of (batch, 1, channels): for a batch of 3 the result has 3 × 3 rows, in which each prompt is mixed with the
#           states of all prompts. forward returns logits of the shape (3, 3, vocabulary) for (3, 1) ids, and
#           generate() takes the last of them without a warning. A batch of one is right.
# remedy:   one prompt at a time, or use_cache=False.
# usage:    findings/transformers-rwkv-generates-in-batches.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
from importlib.metadata import version

import torch
from transformers import GPT2Config, GPT2LMHeadModel, RwkvConfig, RwkvForCausalLM

VOCABULARY, NEW = 64, 12
torch.set_num_threads(1)
torch.manual_seed(0)
shared = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
rwkv = RwkvForCausalLM(RwkvConfig(context_length=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, **shared))
gpt = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2, **shared))
prompts = torch.randint(3, VOCABULARY, (3, 8))


def differing(model, use_cache):
    """Greedy tokens that differ between the three prompts in one batch and one by one."""
    together, *alone = (
        model.generate(ids, max_new_tokens=NEW, do_sample=False, use_cache=use_cache)[:, 8:] for ids in (prompts, *prompts.split(1))
    )
    return (together != torch.cat(alone)).sum().item()


found = {}
with torch.no_grad():
    for name, model in (("GPT-2", gpt), ("RWKV", rwkv)):
        for weight in model.eval().parameters():
            weight.mul_(4 if weight.ndim == 2 else 1)  # clear decisions, so that rounding does not matter
        for use_cache in (True, False):
            found[name, use_cache] = differing(model, use_cache)
            print(f"{name}, use_cache={use_cache}: {found[name, use_cache]} of {3 * NEW} tokens differ from those of each prompt alone")
    shapes = []
    for batch in (1, 2, 3):
        state = rwkv(prompts[:batch, :-1], use_cache=True).state
        shapes.append(tuple(rwkv(prompts[:batch, -1:], state=state, use_cache=True).logits.shape))
        print(f"RWKV, one token with the state, ids of shape {(batch, 1)}: logits of shape {shapes[-1]}")
print(*(f"{name} {version(name)}" for name in ("transformers", "torch")))
same = found["GPT-2", True] == found["GPT-2", False] == found["RWKV", False] == 0 < found["RWKV", True]
same = same and shapes == [(batch, batch, VOCABULARY) for batch in (1, 2, 3)]
raise SystemExit(0 if same else f"the behaviour has changed: {found} {shapes}")
PYTHON
