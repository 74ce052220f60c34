#!/usr/bin/env bash
# ctranslate2 4.8.5, transformers 5.24.0: the converter of GPT-2 ignores three settings of config.json that change results.
# expected: a setting is converted, as `n_inner` and `activation_function` are, or refused.
# seen:     layer_norm_epsilon is always 1e-5, and scale_attn_weights: false and scale_attn_by_inverse_layer_idx: true are
#           dropped without a warning. Log-probabilities of the converted model (initial weights times 4) differ by up to
#           0.03, 0.7 and 0.13 nats; with the default values by 10⁻⁶.
# usage:    findings/ctranslate2-gpt2-settings.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 ctranslate2==4.8.5
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import ctranslate2
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

TOKENS = [f"t{number}" for number in range(40)]
CASES = [
    {},
    {"n_inner": 96},
    {"activation_function": "relu"},
    {"layer_norm_epsilon": 1e-3},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
]


def difference(settings):
    """Largest difference of the log-probabilities of 20 tokens, in nats."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 64, "n_embd": 64, "n_layer": 3, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **settings)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    model.save_pretrained("model")
    words = Tokenizer(WordLevel({token: number for number, token in enumerate(TOKENS)}, unk_token="t0"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "t0")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained("model")
    ctranslate2.converters.TransformersConverter("model").convert("converted", force=True)
    ids = torch.randint(0, 40, (1, 20))
    converted = ctranslate2.Generator("converted", device="cpu").score_batch([[TOKENS[i] for i in ids[0]]])[0].log_probs
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    return (torch.tensor(converted) - expected).abs().max().item()


found = [difference(settings) for settings in CASES]
print(f"ctranslate2 {ctranslate2.__version__}, transformers {transformers.__version__}, largest difference in nats:")
for settings, nats in zip(CASES, found):
    print(f"  {settings or 'default values'}: {nats:.6f}")
same = all(nats < 1e-4 for nats in found[:3]) and all(nats > 1e-2 for nats in found[3:])
raise SystemExit(0 if same else f"the behaviour has changed: {found}")
PYTHON
