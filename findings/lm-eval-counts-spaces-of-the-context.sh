#!/usr/bin/env bash
# lm-eval 0.4.13, transformers 5.24.0, torch 2.13.0: a continuation is charged for spaces and line ends of its context.
# expected: loglikelihood((context, continuation)) is log P(continuation | context), and its flag says whether greedy
#           decoding after the context writes the continuation. With a character-level tokenizer both are exact: the
#           tokens of the context do not depend on what follows.
# seen:     white space at the end of the context is moved to the continuation before it is encoded, for the sake of
#           tokens such as " the", whatever the tokenizer. After "KING:\n" the likelihood of "No" includes that of the
#           line end, and the flag is False where the model would not have written the line end, although it writes the
#           continuation after it. Answers with different contexts (Winogrande's form) and exact matches (LAMBADA's)
#           change; answers to one context keep their order. Contexts without white space at their end are exact.
# usage:    findings/lm-eval-counts-spaces-of-the-context.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0 lm-eval==0.4.13
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
from importlib.metadata import version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

CHARACTERS = [*"\n :GIKNo", "<end>"]
torch.set_num_threads(1)
torch.manual_seed(1)
backend = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(CHARACTERS)}, merges=[]))
backend.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
model = GPT2LMHeadModel(GPT2Config(vocab_size=len(CHARACTERS), n_positions=32, n_embd=32, n_layer=2, n_head=2)).eval()
with torch.no_grad():
    for weight in model.parameters():
        weight.mul_(8 if weight.ndim == 2 else 1)  # clear decisions
harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=32)


@torch.no_grad()
def log_probabilities(text):
    return model(torch.tensor([tokenizer.encode(text)])).logits[0].log_softmax(-1)


def exact(context, continuation):
    """The sum of log P(character | characters before it), and whether each is the most likely one."""
    start, ids = len(context), tokenizer.encode(context + continuation)
    rows = log_probabilities(context + continuation)[start - 1 : len(ids) - 1]
    return rows.gather(1, torch.tensor(ids[start:])[:, None]).sum().item(), rows.argmax(-1).tolist() == ids[start:]


def theirs(context, continuation):
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    return harness.loglikelihood([request], disable_tqdm=True)[0]


found = {}
for context in ("KING:", "KING:\n", "KING: \n\n"):
    greedy = CHARACTERS[log_probabilities(context)[-1].argmax()]
    for continuation in ("No", greedy):
        found[context, continuation] = (*theirs(context, continuation), *exact(context, continuation))
        value, flag, right, right_flag = found[context, continuation]
        print(f"{context!r}, {continuation!r}: lm-eval {value:.3f}, greedy {flag}; exact {right:.3f}, greedy {right_flag}")
print(*(f"{name} {version(name)}" for name in ("lm_eval", "transformers", "torch")))
same = all((abs(value - right) < 1e-3) == (context == "KING:") for (context, _), (value, _, right, _) in found.items())
same = same and any(right_flag and not flag for _, flag, _, right_flag in found.values())
raise SystemExit(0 if same else f"the behaviour has changed: {found}")
PYTHON
