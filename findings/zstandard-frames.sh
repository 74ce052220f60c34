#!/usr/bin/env bash
# zstandard.decompress returns the first frame only, where stream_reader of the same package returns all.
#
# Packages: zstandard==0.25.0
# Expected (a good engineer's guess): all frames, as gzip.decompress and bz2.decompress return all members; or an error for the bytes that are left.
# Seen: the first frame only, and no error; stream_reader returns all frames.
# Exits with a non-zero code when this behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check zstandard==0.25.0
echo "expected: all frames, as gzip.decompress and bz2.decompress return all members; or an error for the bytes that are left."
echo "seen: the first frame only, and no error; stream_reader returns all frames."
venv/bin/python - <<'PROGRAM'
import bz2
import gzip
import io
import platform

import zstandard

print("python", platform.python_version(), "zstandard", zstandard.__version__)
data = zstandard.compress(b"one ") + zstandard.compress(b"two")  # as `cat a.zst b.zst` makes it
at_once = zstandard.decompress(data)
streamed = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
others = [module.decompress(module.compress(b"one ") + module.compress(b"two")) for module in (gzip, bz2)]
print("decompress:", at_once, "stream_reader:", streamed, "gzip, bz2:", others)
assert (at_once, streamed, others) == (b"one ", b"one two", [b"one two"] * 2), "the behaviour has changed"
PROGRAM
