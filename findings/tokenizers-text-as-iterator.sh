#!/usr/bin/env bash
# train_from_iterator of tokenizers takes a text for an iterator of characters and learns nothing.
#
# Packages: tokenizers==0.23.3
# Expected (a good engineer's guess): a text is one sequence, or a TypeError says that a list is needed.
# Seen: every character is a sequence of its own, so no pair is seen: no merge is learned, and there is no warning.
# Exits with a non-zero code when this behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check tokenizers==0.23.3
echo "expected: a text is one sequence, or a TypeError says that a list is needed."
echo "seen: every character is a sequence of its own, so no pair is seen: no merge is learned, and there is no warning."
venv/bin/python - <<'PROGRAM'
import platform

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

print("python", platform.python_version(), "tokenizers", tokenizers.__version__)


def size(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet))
    return tokenizer.get_vocab_size()


text = "the theatre there then " * 30
print("a text:", size(text), "tokens; a list with it:", size([text]), "tokens")
assert size(text) == 256 < size([text]), "the behaviour has changed"
PROGRAM
