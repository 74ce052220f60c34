#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: generate() ignores `time_step_limit` of Mamba-2, which training and losses obey.
# expected: the limit of the time steps in config.json is a part of the model. A text read token by token with the cache,
#           as generate() does, has the logits of the same text read at once.
# seen:     the limit is applied where a whole text is read (training, loss, the prompt), and not where one token is read
#           with the cache. With the limit (0.001, 0.1) greedy texts with use_cache=True, the default, and False differ,
#           and so do losses. Bamba has the same setting and the same difference, and Zamba2 and Nemotron-H obey their
#           `time_step_min` in whole texts only. With the default of Mamba-2, (0, inf), the logits are equal to 1e-5.
# remedy:   use_cache=False for models with a limit.
# usage:    findings/transformers-mamba2-time-step-limit.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import math
from importlib.metadata import version

import torch
from torch.nn.functional import cross_entropy
from transformers import BambaConfig, BambaForCausalLM, Mamba2Config, Mamba2ForCausalLM

VOCABULARY, LENGTH, PROMPT, NEW = 64, 40, 5, 24
shared = {"vocab_size": VOCABULARY, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
mamba = {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 2, "chunk_size": 8, "num_hidden_layers": 2}
bamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 2, "mamba_chunk_size": 8}
bamba |= {"num_hidden_layers": 3, "attn_layer_indices": [1], "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
torch.set_num_threads(1)
torch.manual_seed(1)
texts = torch.randint(3, VOCABULARY, (2, LENGTH))


def nats(logits):
    return cross_entropy(logits[:, :-1].flatten(0, 1), texts[:, 1:].flatten()).item()


@torch.no_grad()
def compare(model):
    """Greatest difference of logits read at once and token by token, both losses, and greedy tokens that differ."""
    for weight in model.eval().parameters():
        weight.mul_(5 if weight.ndim > 1 else 1)  # as large as trained ones
    whole, cache, start, pieces = model(texts, use_cache=False).logits, None, 0, []
    for end in range(PROMPT, LENGTH + 1):
        positions = {} if isinstance(model, Mamba2ForCausalLM) else {"position_ids": torch.arange(start, end)[None]}
        output = model(texts[:, start:end], cache=cache, use_cache=True, **positions)
        cache, start = output.cache, end
        pieces.append(output.logits)
    steps = torch.cat(pieces, 1)
    greedy = [model.generate(texts, max_new_tokens=NEW, do_sample=False, use_cache=use) for use in (True, False)]
    difference = ((steps - whole).abs().max() / whole.std()).item()
    return difference, nats(whole), nats(steps), (greedy[0] != greedy[1]).sum().item()


found = {}
for limit in ((0.0, math.inf), (0.001, 0.1)):
    for name, config, architecture, sizes in (
        ("Mamba-2", Mamba2Config, Mamba2ForCausalLM, mamba),
        ("Bamba", BambaConfig, BambaForCausalLM, bamba),
    ):
        torch.manual_seed(0)
        found[name, limit] = compare(architecture(config(time_step_limit=limit, **sizes, **shared)))
        difference, whole, steps, tokens = found[name, limit]
        print(
            f"{name}, limit {limit}: logits differ by {difference:.0e} standard deviations, loss at once {whole:.4f} and token by token "
            f"{steps:.4f}, generate() with and without the cache: {tokens} of {2 * NEW} tokens differ"
        )
print(*(f"{name} {version(name)}" for name in ("transformers", "torch")))
exact = [found[name, (0.0, math.inf)] for name in ("Mamba-2", "Bamba")]
limited, other = (found[name, (0.001, 0.1)] for name in ("Mamba-2", "Bamba"))
same = all(result[0] < 1e-3 and result[3] == 0 for result in exact) and limited[0] > 0.1 and limited[3] > 0 and other[0] > 5e-3
raise SystemExit(0 if same else f"the behaviour has changed: {found}")
PYTHON
