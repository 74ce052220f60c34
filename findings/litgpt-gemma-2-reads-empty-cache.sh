#!/usr/bin/env bash
# litgpt 0.5.13, torch 2.13.0: with the key-value cache Gemma 2 has no causal mask and reads the empty rest of the cache.
# expected: the cache saves time and changes nothing: the logits of a text are those without it, they depend on the tokens
#           up to their position only, and not on the size that the cache has been given (max_seq_length).
# seen:     with softcapping of the attention (Gemma 2) the mask of the cache, which is boolean, is added to the scores: 1
#           for tokens that may be seen and 0 for the others. Every token of a prompt sees the later ones and all empty
#           places of the cache. The logits differ from those without the cache by as much as logits differ, greedy texts
#           differ, and a larger cache gives other logits again. generate() always uses the cache; training and losses do
#           not. The same model without softcapping, Gemma 3 and Llama are right.
# usage:    findings/litgpt-gemma-2-reads-empty-cache.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy litgpt==0.5.13
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
from importlib.metadata import version

import torch
from litgpt import GPT, Config
from litgpt.generate.base import generate

V, LENGTH, NEW = 50, 16, 16
sizes = {"n_layer": 2, "n_head": 4, "n_query_groups": 2, "head_size": 16, "n_embd": 32, "intermediate_size": 64}
sizes |= {"vocab_size": V, "padded_vocab_size": V, "block_size": 128}
kinds = {
    "Llama": ("Llama-3.2-1B", {}),
    "Gemma 3": ("Gemma-3-1b-it", {"sliding_window_indices": [1, 0], "rope_indices": [1, 0]}),
    "Gemma 2": ("Gemma-2-2b", {"sliding_window_indices": [1, 0]}),
    "Gemma 2 without softcapping": ("Gemma-2-2b", {"sliding_window_indices": [1, 0], "attention_logit_softcapping": None}),
}
torch.manual_seed(0)
text = torch.randint(0, V, (LENGTH,))
changed = torch.cat([text[: LENGTH // 2], (text[LENGTH // 2 :] + 1) % V])


@torch.no_grad()
def with_cache(model, tokens, size):
    model.max_seq_length = size
    model.set_kv_cache(batch_size=1)
    logits = model(tokens[None], torch.arange(len(tokens)))[0]
    model.clear_kv_cache()
    return logits


@torch.no_grad()
def greedy(model, size=None):
    """The text of `generate` with a cache of this size, or without a cache."""
    if size is None:
        tokens = text
        for _ in range(NEW):
            tokens = torch.cat([tokens, model(tokens[None])[0, -1].argmax(-1, keepdim=True)])
        return tokens
    model.max_seq_length = size
    model.set_kv_cache(batch_size=1)
    tokens = generate(model, text, LENGTH + NEW, temperature=0.0)
    model.clear_kv_cache()
    return tokens


found = {}
for name, (config, settings) in kinds.items():
    torch.manual_seed(1)
    model = GPT(Config.from_name(config, **sizes, **settings)).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(0.2 if "wte" in key else 4)
        exact = model(text[None])[0]
    cached, later, larger = with_cache(model, text, 64), with_cache(model, changed, 64), with_cache(model, text, 128)
    half = LENGTH // 2
    gaps = (cached - exact).abs().max().item(), (later - cached)[:half].abs().max().item(), (larger - cached).abs().max().item()
    texts = [greedy(model, size)[LENGTH:] for size in (None, 64, 128)]
    equal = [(texts[0] == other).sum().item() for other in texts[1:]]
    found[name] = *gaps, *equal
    print(
        f"{name}: logits (standard deviation {exact.std():.2f}) with and without the cache differ by {gaps[0]:.4f}, of the first half "
        f"with another second half by {gaps[1]:.4f}, with caches of 64 and 128 by {gaps[2]:.4f}; of {NEW} greedy tokens {equal[0]} and {equal[1]} "
        f"are those without the cache"
    )
print(*(f"{name} {version(name)}" for name in ("litgpt", "torch")))
same = True
for name, (*gaps, small, large) in found.items():
    right = max(gaps) < 1e-3 and small == large == NEW
    same = same and (min(gaps) > 0.1 and small < NEW if name == "Gemma 2" else right)
raise SystemExit(0 if same else f"the behaviour has changed: {found}")
PYTHON
