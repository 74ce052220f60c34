#!/usr/bin/env bash
# BpeTrainer(max_token_length=n) of tokenizers learns no token of n characters.
#
# Packages: tokenizers==0.23.3
# Expected (a good engineer's guess): the token of n characters that is learned without a limit is also learned with the limit n.
# Seen: it is learned only from the limit n + 1 on.
# Exits with a non-zero code when this behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check tokenizers==0.23.3
echo "expected: the token of n characters that is learned without a limit is also learned with the limit n."
echo "seen: it is learned only from the limit n + 1 on."
venv/bin/python - <<'PROGRAM'
import platform

import tokenizers
from tokenizers import Tokenizer, models, trainers

print("python", platform.python_version(), "tokenizers", tokenizers.__version__)


def longest(limit):
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, max_token_length=limit)
    tokenizer.train_from_iterator(["ab"] * 50, trainer)
    return max(map(len, tokenizer.get_vocab()))


found = {limit: longest(limit) for limit in (2, 3, None)}
print("longest token of a text of 'ab', by max_token_length:", found)
assert found == {2: 1, 3: 2, None: 2}, "the behaviour has changed"
PROGRAM
