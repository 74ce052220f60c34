#!/usr/bin/env bash
# datasets 5.2.0: map() returns the results of the old code after a function in an imported module has been edited.
# expected: the cache of map() depends on what the function computes, so an edited helper gives new results, as it does
#           where the helper is part of the script itself.
# seen:     a function of the script is hashed with its code and with the functions and constants that it uses there.
#           Functions of an imported module are hashed by their names only. After an edit of the module (the tokenizer of a
#           project, say) a new run gets the old columns from the cache, without a warning: the model is trained on the text
#           as it was. Where the function given to map() is itself one of the module, constants of the module are not
#           noticed either.
# remedy:   load_from_cache_file=False, or pass the version of the module as an argument in fn_kwargs.
# usage:    findings/datasets-map-keeps-old-results.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0
cd "$folder"
export HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
venv/bin/python -c 'from datasets import Dataset; Dataset.from_dict({"text": ["to be", "or not"]}).save_to_disk("texts")' 2> errors || { cat errors >&2; exit 1; }
cat > script.py <<'PYTHON'
import datasets
import helper

STEP = SCRIPT


def shift(text):
    return [ord(character) + STEP for character in text]


def by_script(row):
    return {"ids": shift(row["text"])}


def by_module(row):
    return {"ids": helper.shift(row["text"])}


datasets.disable_progress_bars()
texts = datasets.load_from_disk("texts")
functions = {"script": by_script, "script and module": by_module, "module": helper.row}
print(*(texts.map(function)[0]["ids"][0] - ord("t") for function in functions.values()))
print(texts.map(by_module, load_from_cache_file=False)[0]["ids"][0] - ord("t"))
PYTHON
cat > helper.py <<'PYTHON'
STEP = MODULE


def shift(text):
    return [ord(character) + STEP for character in text]


def row(row):
    return {"ids": shift(row["text"])}
PYTHON
cp script.py script.txt && cp helper.py helper.txt
results=()
for step in 1 2; do
    sed "s/SCRIPT/$step/" script.txt > script.py
    sed "s/MODULE/$step/" helper.txt > helper.py
    results+=("$(venv/bin/python script.py 2> errors | tr '\n' ' ')")
done
sed "s/character) + STEP/character) + STEP + 1/" helper.txt | sed "s/MODULE/2/" > helper.py
results+=("$(venv/bin/python script.py 2> errors | tr '\n' ' ')")
venv/bin/python -c 'from importlib.metadata import version; print("datasets", version("datasets"))'
echo "added to each id: by a function of the script, of the script with one of the module, of the module; without the cache"
echo "script and module add 1: ${results[0]}"
echo "constants of both changed to 2: ${results[1]}"
echo "code of the module changed to add 3: ${results[2]}"
if [ "${results[*]}" != "1 1 1 1  2 2 1 2  2 2 1 3 " ]; then
    echo "the behaviour has changed" >&2
    exit 1
fi
