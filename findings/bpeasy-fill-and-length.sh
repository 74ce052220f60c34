#!/usr/bin/env bash
# bpeasy 0.1.6, tiktoken 0.14.0: fill_to_nearest_multiple_of_eight adds no token, and len() leaves special tokens out.
# expected: with 258 tokens and one special token the option makes 264 tokens, and len(tokenizer) is the number of rows
#           that an embedding needs, as len() of a tokenizer of transformers is.
# seen:     the tokens that fill up are made after the vocabulary was copied, so the encoding has 259, with the option as
#           without it. len() is 258 in both: the id of the special token is 258, one beyond an embedding of that size.
# remedy:   round up 1 + the greatest id of the encoding.
# usage:    findings/bpeasy-fill-and-length.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet bpeasy==0.1.6 tiktoken==0.14.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

from bpeasy.tokenizer import BPEasyTokenizer

TEXT = "First Citizen: Before we proceed any further, hear me speak. " * 20


def sizes(fill: bool) -> tuple[int, int, int]:
    """len() of a tokenizer with a special token, the size of its vocabulary, and the id of that token."""
    tokenizer = BPEasyTokenizer.train(
        iter([TEXT]), vocab_size=258, special_tokens=["<|end|>"], fill_to_nearest_multiple_of_eight=fill
    )
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    (end,) = tokenizer.encode("<|end|>", allowed_special="all")
    return len(tokenizer), tokenizer._encoder.n_vocab, end


print("bpeasy", version("bpeasy"), "tiktoken", version("tiktoken"))
found = {fill: sizes(fill) for fill in (False, True)}
for fill, (length, size, end) in found.items():
    print(f"fill_to_nearest_multiple_of_eight={fill}: len() {length}, tokens {size}, id of <|end|> {end}")
sys.exit(0 if found == {False: (258, 259, 258), True: (258, 259, 258)} else "the behaviour has changed")
PYTHON
