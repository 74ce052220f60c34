#!/usr/bin/env bash
# jsonargparse 4.53.0, Python 3.11: "1" for `int | float | None` is 1 or 1.0, by what another library declared before.
# expected: the declared order decides: `Optional[Union[int, float]]` makes the int 1 of "1".
# seen:     `typing` keeps one object for `Optional[…]` of equal unions, and unions are equal in any order. If some module
#           has declared `Optional[Union[float, int]]` a short time before (the cache has 128 entries), that order is
#           used, and "1" becomes 1.0. Lightning's Trainer means one batch by `limit_val_batches: 1` and all of them by
#           1.0, and its Fabric declares a parameter the other way round: the order of imports decides.
# usage:    findings/jsonargparse-one-or-all-batches.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jsonargparse==4.53.0 PyYAML
cd "$folder"
cat > other.py <<'PYTHON'
from typing import Optional, Union


def another_function(clip: Optional[Union[float, int]] = None): ...
PYTHON
cat > ours.py <<'PYTHON'
from typing import Optional, Union


def run(limit: Optional[Union[int, float]] = None): ...
PYTHON
for first in "import ours" "import other, ours"; do
    venv/bin/python - <<PYTHON >> seen.txt
$first
from jsonargparse import ArgumentParser

parser = ArgumentParser()
parser.add_function_arguments(ours.run)
print("$first:", repr(parser.parse_args(["--limit", "1"]).limit))
PYTHON
done
"$folder/venv/bin/python" --version
cat seen.txt
printf 'import ours: 1\nimport other, ours: 1.0\n' | cmp - seen.txt || { echo "it has changed"; exit 1; }
