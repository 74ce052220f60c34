#!/usr/bin/env bash
# tiktoken 0.14.0, tokenizers 0.23.3: characters that pat_str does not match are dropped, although each byte has a token.
# expected: the pattern says where text is split. A vocabulary with all 256 bytes encodes every text, and decode() returns
#           it; in `tokenizers`, where Split takes the same pattern, the text between two matches is a piece too.
# seen:     encode() takes the matches only, so everything else is missing from the ids, without an error or a warning. With
#           r" ?\w+| ?[^\w\s]+" all line ends and double spaces are gone, with words alone all punctuation. Counts of tokens
#           and losses per character are those of a shorter text.
# remedy:   end the pattern with |\s+ or |. and compare decode(encode(text)) with the text.
# usage:    findings/tiktoken-drops-what-the-pattern-misses.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tiktoken==0.14.0 tokenizers==0.23.3
cd "$folder"
venv/bin/python - <<'PYTHON'
from importlib.metadata import version

import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

TEXT = "ROMEO:\nBut soft!  What light\n\nthrough yonder window breaks?\n"
patterns = {
    "words and punctuation": r" ?\w+| ?[^\w\s]+",
    "words": r" ?\w+",
    "the same and white space": r" ?\w+| ?[^\w\s]+|\s+",
}


def by_tiktoken(pattern):
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return encoding.decode(encoding.encode(TEXT))


def by_tokenizers(pattern):
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.decode(tokenizer.encode(TEXT).ids)


print(f"text: {TEXT!r}, {len(TEXT)} characters")
found = {}
for name, pattern in patterns.items():
    first, second = by_tiktoken(pattern), by_tokenizers(pattern)
    found[name] = len(first), second == TEXT
    print(f"{name}, {pattern!r}: tiktoken decodes {first!r}, {len(first)} characters; tokenizers {'the text' if second == TEXT else repr(second)}")
print(*(f"{name} {version(name)}" for name in ("tiktoken", "tokenizers")))
lost = [len(TEXT) - length for length, _ in found.values()]
same = all(exact for _, exact in found.values()) and lost[1] > lost[0] > 0 == lost[2]
raise SystemExit(0 if same else f"the behaviour has changed: {found}")
PYTHON
