#!/usr/bin/env bash
# Two rows of a tab-separated file become one where texts begin with a quote.
#
# Packages: pandas==3.1.1 pyarrow==26.0.1
# Expected (a good engineer's guess): TSV (IANA text/tab-separated-values) has no quoting, so three lines are three rows; at least a warning.
# Seen: a quote at the beginning of a field opens a quoted field up to the next one: two rows, and no warning.
# Exits with a non-zero code when this behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pandas==3.1.1 pyarrow==26.0.1
echo "expected: TSV (IANA text/tab-separated-values) has no quoting, so three lines are three rows; at least a warning."
echo "seen: a quote at the beginning of a field opens a quoted field up to the next one: two rows, and no warning."
venv/bin/python - <<'PROGRAM'
import io
import platform

import pandas
import pyarrow
import pyarrow.csv

print("python", platform.python_version(), "pandas", pandas.__version__, "pyarrow", pyarrow.__version__)
content = 'id\ttext\n1\t"Hello\n2\t"Bye\n3\tx\n'
by_pandas = pandas.read_csv(io.StringIO(content), sep="\t")["text"].tolist()
options = pyarrow.csv.ParseOptions(delimiter="\t")
by_pyarrow = pyarrow.csv.read_csv(io.BytesIO(content.encode()), parse_options=options)["text"].to_pylist()
print(repr(content), "->", by_pandas, by_pyarrow)
assert by_pandas == by_pyarrow == ["Hello\n2\tBye", "x"], "the behaviour has changed"
PROGRAM
