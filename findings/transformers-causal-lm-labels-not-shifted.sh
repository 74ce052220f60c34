#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: `labels` of ten classes named …ForCausalLM are the same token, not the next one.
# expected: every class of AutoModelForCausalLM takes labels=input_ids and shifts them inside, as GPT2LMHeadModel does and
#           as DataCollatorForLanguageModeling(mlm=False) prepares them: the loss is that of the next token.
# seen:     BartForCausalLM, its relatives (mBART, PLBart, MVP, Marian, Pegasus, BigBird-Pegasus, Blenderbot) and the
#           decoders of TrOCR and Whisper compare the logits of a position with the label of that position, which the
#           model can see. On random tokens, which cannot be predicted, the loss of BART falls to 0 within 150 steps, while
#           the loss of the next token rises above that of guessing. Decoders of BERT and RoBERTa shift.
# remedy:   compute the loss from the logits, or hand over labels that are shifted already.
# usage:    findings/transformers-causal-lm-labels-not-shifted.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - 2> errors <<'PYTHON' || { cat errors >&2; exit 1; }
import math
import sys

import torch
import transformers
from torch.nn.functional import cross_entropy

TOKENS, CONTEXT = 64, 32
SAME = "bart mbart plbart mvp marian pegasus bigbird_pegasus blenderbot trocr whisper".split()
NEXT = "gpt2 opt bert-generation roberta llama".split()
SIZES = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "ffn_dim": 64,
    "intermediate_size": 64,
    "decoder_ffn_dim": 64,
    "num_hidden_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 4,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
}


def tiny(kind: str) -> torch.nn.Module:
    """Return a decoder of that kind with two layers and random weights."""
    torch.manual_seed(0)
    default = transformers.AutoConfig.for_model(kind).to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in default}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
    )
    config.is_decoder = True
    return transformers.AutoModelForCausalLM.from_config(config)


def losses(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, float, float]:
    """Return the loss of the library, that of the next token, and that of the same token."""
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    after = cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    same = cross_entropy(out.logits.flatten(0, 1), ids.flatten())
    return out.loss.item(), after.item(), same.item()


torch.set_num_threads(1)
print(f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}")
torch.manual_seed(1)
ids = torch.randint(3, TOKENS, (4, CONTEXT))
seen = {}
for kind in SAME + NEXT:
    model = tiny(kind).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 4  # initial weights are so small that all losses are about equal
    loss, after, same = losses(model, ids)
    seen[kind] = "next" if abs(loss - after) < 1e-4 else "same" if abs(loss - same) < 1e-4 else "neither"
    print(f"{type(model).__name__:24} loss {loss:.4f}; next token {after:.4f}, same token {same:.4f}: {seen[kind]}")

end = {}
for kind in ("gpt2", "bart"):
    model = tiny(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        batch = torch.randint(3, TOKENS, (16, CONTEXT))
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    loss, after, _ = losses(model.eval(), ids)
    end[kind] = loss, after
    print(f"{kind} after 150 steps of random tokens: loss {loss:.3f}, of the next token {after:.3f}")
guess = math.log(TOKENS - 3)
print(f"guessing one of {TOKENS - 3} tokens: {guess:.3f}")

expected = dict.fromkeys(SAME, "same") | dict.fromkeys(NEXT, "next")
as_stated = seen == expected and end["bart"][0] < 0.1 and end["bart"][1] > guess and end["gpt2"][0] > 0.95 * guess
sys.exit(0 if as_stated else "the behaviour has changed")
PYTHON
