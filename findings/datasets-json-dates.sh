#!/usr/bin/env bash
# datasets 5.2.0, pyarrow 26.0.1: texts of a JSON Lines file that all look like dates are changed, even if declared.
# expected: a JSON string is a text; at the latest where `features` declares the column a string.
# seen:     a column of "2026-03-14" is read as timestamp[s], and a row returns a datetime. With `features` the times are
#           turned back into texts, so that "2026-03-14" is "2026-03-14 00:00:00", without a warning. Another text keeps
#           those that are read in the same chunk as they are.
# usage:    findings/datasets-json-dates.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import json
from pathlib import Path

import datasets
import pyarrow

datasets.disable_progress_bars()


def read(name, texts, **settings):
    """Values of the column `text` after a round trip through a JSON Lines file."""
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return list(datasets.load_dataset("json", data_files=name, split="train", cache_dir="cache", **settings)["text"])


dates = ["2026-03-14", "2026-03-14 00:00:00"]
features = datasets.Features({"text": datasets.Value("string")})
found = [read("dates.jsonl", dates), read("mixed.jsonl", [*dates, "spring"]), read("again.jsonl", dates, features=features)]
print(f"datasets {datasets.__version__}, pyarrow {pyarrow.__version__}")
for case, texts in zip(("dates alone", "with another text", "with features"), found):
    print(f"  {case}: {texts}")
same = not isinstance(found[0][0], str) and found[1:] == [[*dates, "spring"], [dates[1], dates[1]]]
raise SystemExit(0 if same else f"the behaviour has changed: {found}")
PYTHON
