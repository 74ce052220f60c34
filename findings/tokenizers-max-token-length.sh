#!/usr/bin/env bash
# BpeTrainer(max_token_length=n) of tokenizers learns no token of n characters, except for pairs, which it always learns.
#
# Packages: tokenizers==0.23.3
# Expected (a good engineer's guess): of a text of "abc", the longest token has min(n, 3) characters.
# Seen: "ab" is learned with the limit 1, and "abc" only from the limit 4 on.
# Exits with a non-zero code when this behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check tokenizers==0.23.3
echo "expected: of a text of 'abc', the longest token has min(n, 3) characters."
echo "seen: 'ab' is learned with the limit 1, and 'abc' only from the limit 4 on."
venv/bin/python - <<'PROGRAM'
import platform

import tokenizers
from tokenizers import Tokenizer, models, trainers

print("python", platform.python_version(), "tokenizers", tokenizers.__version__)


def longest(limit):
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, max_token_length=limit)
    tokenizer.train_from_iterator(["abc"] * 50, trainer)
    return max(map(len, tokenizer.get_vocab()))


found = {limit: longest(limit) for limit in (1, 2, 3, 4, None)}
print("longest token of a text of 'abc', by max_token_length:", found)
assert found == {1: 2, 2: 2, 3: 2, 4: 3, None: 3}, "the behaviour has changed"
PROGRAM
