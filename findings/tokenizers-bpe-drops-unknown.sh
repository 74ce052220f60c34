#!/usr/bin/env bash
# tokenizers 0.23.3: a BPE without an unknown token drops unknown characters; with a wrong one it raises.
# expected: a model that has no token for a character and no unknown token raises an exception, as WordLevel and Unigram
#           do in the same situation.
# seen:     encode("café") returns c, a, f: the text is shortened without a word. An unk_token that is not in the
#           vocabulary, which looks like the mistake, makes it raise.
# usage:    findings/tokenizers-bpe-drops-unknown.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3
cd "$folder"
venv/bin/python - <<'PYTHON'
import tokenizers
from tokenizers import Tokenizer, models

letters = {"a": 0, "c": 1, "f": 2}


def tokens(model):
    try:
        return Tokenizer(model).encode("café").tokens
    except Exception as error:
        return f"raises: {error}"


found = {
    "BPE": tokens(models.BPE(letters, [])),
    "BPE, unk_token not in the vocabulary": tokens(models.BPE(letters, [], unk_token="")),
    "Unigram": tokens(models.Unigram([(letter, -1.0) for letter in letters], unk_id=None)),
}
for name, answer in found.items():
    print(f"tokenizers {tokenizers.__version__}, {name}: {answer}")
dropped, *raised = found.values()
same = dropped == ["c", "a", "f"] and all(str(answer).startswith("raises") for answer in raised)
raise SystemExit(0 if same else "the behaviour has changed")
PYTHON
