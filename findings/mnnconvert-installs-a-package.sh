#!/usr/bin/env bash
# MNN 3.6.1: `mnnconvert` runs `pip install -U` of a logging service's client, in whatever environment `pip` is.
# expected: a converter reads one file and writes another. What it needs is among its requirements (only NumPy is), and
#           nothing is installed while it runs.
# seen:     where the package aliyun-log-python-sdk is missing, every call of the command asks pip twice for its newest
#           version, without a question or a flag that switches it off. It is the first pip on PATH: with
#           venv/bin/mnnconvert and a venv that is not activated, that of another Python, where the packages that come
#           along (protobuf, typing_extensions, anyio and more) may replace those in use. The environment of the command
#           still lacks the package, so the next call does it again. By its source (MNN/tools/utils/log.py) the command
#           sends the machine's id, its own arguments and the sizes of the models to that service where it has the
#           package; this script leaves it out, so that nothing is sent. mnnquant imports the same module.
# remedy:   import MNN, _tools; _tools.mnnconvert(["mnnconvert", "-f", "ONNX", …]) converts without it.
# usage:    findings/mnnconvert-installs-a-package.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mnn==3.6.1 numpy onnx==1.23.2
cd "$folder"
# A pip that only notes its arguments, in front of all others.
mkdir first
printf '#!/bin/sh\necho "pip $*" >> "%s/calls"\n' "$folder" > first/pip
chmod +x first/pip
cat > graph.py <<'PYTHON'
from onnx import TensorProto, checker, helper, save

values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", values[:1], values[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
checker.check_model(model)
save(model, "model.onnx")
PYTHON
venv/bin/python graph.py
for name in first second; do
    PATH="$folder/first:$PATH" venv/bin/mnnconvert -f ONNX --modelFile model.onnx --MNNModel "$name.mnn" --bizCode x > log 2>&1
    test -s "$name.mnn" || { cat log >&2; exit 1; }
done
by_command=$(cat calls 2> /dev/null || true)
rm -f calls
PATH="$folder/first:$PATH" venv/bin/python > log 2>&1 <<'PYTHON'
import MNN
import _tools

_tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", "model.onnx", "--MNNModel", "direct.mnn", "--bizCode", "x"])
PYTHON
test -s direct.mnn
by_function=$(cat calls 2> /dev/null || true)
version=$(venv/bin/python -c 'from importlib.metadata import version; print(version("mnn"))')
echo "MNN $version: two conversions by mnnconvert called:"
echo "$by_command"
echo "a conversion by _tools.mnnconvert called: ${by_function:-nothing}"
count=$(echo "$by_command" | grep -cx "pip install -U aliyun-log-python-sdk" || true)
test "$count" -ge 2 -a -z "$by_function" || { echo "the behaviour has changed" >&2; exit 1; }
