#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: packed sequences are kept apart only with use_cache=False, which is not the default.
# expected: several texts in one row, with position_ids that begin again at 0 for each, get the logits that they have
#           alone: the mask keeps them apart (eager, sdpa and flex attention). Whether keys and values are returned in a
#           cache changes memory, not logits.
# seen:     the mask is made only where there is no cache, and a forward pass makes one by default, in training mode too.
#           The logits of the second text then depend on the first, by as much as logits differ; with use_cache=False
#           they are those of the text alone. An attention_mask of ones joins the texts too, and OPT joins them always.
#           transformers.Trainer sets use_cache to False; a loop of one's own does not.
# remedy:   model(…, use_cache=False) without an attention_mask, or one text a row.
# usage:    findings/transformers-cache-joins-packed-sequences.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - 2> errors <<'PYTHON' || { cat errors >&2; exit 1; }
import sys

import torch
import transformers

TOKENS, FIRST, SECOND = 64, 10, 12
SIZES = {
    "hidden_size": 32,
    "n_embd": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
}
APART = ("llama", "gpt2", "qwen3", "nanochat")  # opt is tried last
torch.set_num_threads(1)
print(f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}")


def tiny(kind: str, attention: str) -> torch.nn.Module:
    """Return a model of that kind with two layers and random weights."""
    torch.manual_seed(0)
    default = transformers.AutoConfig.for_model(kind).to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in default}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 4  # initial weights are so small that logits hardly differ
    return model


first, second = torch.randint(3, TOKENS, (1, FIRST)), torch.randint(3, TOKENS, (1, SECOND))
packed = {
    "input_ids": torch.cat([first, second], 1),
    "position_ids": torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None],
}
as_stated = True
for kind in (*APART, "opt"):
    for attention in ("eager", "sdpa"):
        model = tiny(kind, attention)
        with torch.no_grad():
            alone = model(input_ids=second).logits

            def change(**settings: object) -> float:
                return (model(**packed, **settings).logits[:, FIRST:] - alone).abs().max().item()

            default = change()
            without = change(use_cache=False)
            ones = change(use_cache=False, attention_mask=torch.ones_like(packed["input_ids"]))
        print(
            f"{kind:8} {attention:5} largest change of the second text's logits (of {alone.std():.1f}): by default "
            f"{default:.1e}, use_cache=False {without:.1e}, and a mask of ones {ones:.1e}"
        )
        as_stated &= min(default, ones) > 0.05 and (without < 1e-5) == (kind in APART)
sys.exit(0 if as_stated else "the behaviour has changed")
PYTHON
