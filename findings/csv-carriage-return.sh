#!/usr/bin/env bash
# A text with a carriage return does not survive the CSV round trip of pandas: its row becomes two.
#
# Packages: pandas==3.1.1
# Expected (a good engineer's guess): to_csv quotes the field, and read_csv gives the same two rows back.
# Seen: to_csv writes the carriage return without quotes, and read_csv ends the row there: three rows, no warning.
# Exits with a non-zero code when this behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pandas==3.1.1
echo "expected: to_csv quotes the field, and read_csv gives the same two rows back."
echo "seen: to_csv writes the carriage return without quotes, and read_csv ends the row there: three rows, no warning."
venv/bin/python - <<'PROGRAM'
import io
import platform

import pandas

print("python", platform.python_version(), "pandas", pandas.__version__)
texts = ["one\rtwo", "three"]
written = pandas.DataFrame({"text": texts}).to_csv(index=False)
read = pandas.read_csv(io.StringIO(written), dtype=str, keep_default_na=False)["text"].tolist()
print(repr(written), "->", read)
assert read == ["one", "two", "three"], "the behaviour has changed"
PROGRAM
