#!/usr/bin/env bash
# gigatoken 0.10.0, tokenizers 0.23.3: a byte-level BPE without a regular expression gets other ids.
# expected: gigatoken.Tokenizer("tokenizer.json") gives the ids of the tokenizers library, or refuses what it does not
#           support, as it does for Whitespace, Digits and NFKC.
# seen:     it reads `ByteLevel(use_regex=False)`, which lets tokens reach over spaces and line ends, as if it were True:
#           the text is split into words first, merges over a space are never used, and the ids are others, and more,
#           without a warning. The decoded text is the same, so a check of the round trip does not notice. With
#           use_regex=True all ids are equal.
# usage:    findings/gigatoken-ignores-use-regex.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gigatoken==0.10.0 tokenizers==0.23.3
cd "$folder"
venv/bin/python - <<'PYTHON'
import sys
from importlib.metadata import version

import gigatoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n" * 20


def ids_of_both(use_regex: bool) -> tuple[list[int], list[int]]:
    """The ids of one text by tokenizers and by gigatoken, from the same file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    file = f"tokenizer-{use_regex}.json"
    tokenizer.save(file)
    other = gigatoken.Tokenizer(file)
    ours, theirs = tokenizer.encode(TEXT).ids, [int(number) for number in other.encode(TEXT)]
    decoded = other.decode(theirs)
    assert tokenizer.decode(ours) == TEXT == (decoded if isinstance(decoded, str) else bytes(decoded).decode())
    return ours, theirs


print("gigatoken", version("gigatoken"), "tokenizers", version("tokenizers"))
same = {}
for use_regex in (True, False):
    ours, theirs = ids_of_both(use_regex)
    same[use_regex] = ours == theirs
    print(f"use_regex={use_regex}: tokenizers {len(ours)} ids, gigatoken {len(theirs)}, equal: {same[use_regex]}")
sys.exit(0 if same == {True: True, False: False} else "the behaviour has changed")
PYTHON
