#!/usr/bin/env bash
# A row that holds only spaces vanishes in the CSV round trip of pandas.
#
# Packages: pandas==3.1.1
# Expected (a good engineer's guess): read_csv gives back the three rows that to_csv wrote; only empty lines are blank lines.
# Seen: a line of spaces counts as blank, so the second row is missing, without a warning.
# Exits with a non-zero code when this behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pandas==3.1.1
echo "expected: read_csv gives back the three rows that to_csv wrote; only empty lines are blank lines."
echo "seen: a line of spaces counts as blank, so the second row is missing, without a warning."
venv/bin/python - <<'PROGRAM'
import io
import platform

import pandas

print("python", platform.python_version(), "pandas", pandas.__version__)
texts = ["def f():", "    ", "return 1"]
written = pandas.DataFrame({"text": texts}).to_csv(index=False)
read = pandas.read_csv(io.StringIO(written), dtype=str, keep_default_na=False)["text"].tolist()
print(repr(written), "->", read)
assert read == ["def f():", "return 1"], "the behaviour has changed"
PROGRAM
