#!/usr/bin/env bash
# mnn 3.6.1, onnx 1.23.2, tensorboard 2.21.0: converting a model changes the installed packages of the Python environment.
# expected: `mnnconvert` reads an ONNX file and writes an MNN file. What it needs is installed with it, and a conversion
#           leaves the environment as it is.
# seen:     without a question it runs `pip install -U` for the client of a logging service, which is not among the
#           requirements of the package, and some 20 packages come with it. The client wants an older protobuf, so that
#           pip replaces the one that is installed: onnx then has a protobuf that its requirements exclude, and
#           TensorBoard's event files, whose code was generated for the newer one, cannot be imported.
# remedy:   convert in an environment of its own.
# usage:    findings/mnn-converter-installs-packages.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mnn==3.6.1 onnx==1.23.2 tensorboard==2.21.0 protobuf==7.36.2 numpy
cd "$folder"
PATH="$folder/venv/bin:$PATH"
python - <<'PYTHON'
from onnx import TensorProto, helper, save

row = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", row[:1], row[1:])
save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "relu.onnx")
PYTHON
events="import tensorboard.compat.proto.event_pb2"
python -c "$events"
pip freeze > before
mnnconvert -f ONNX --modelFile relu.onnx --MNNModel relu.mnn --bizCode relu > log 2>&1
pip freeze > after
test -s relu.mnn
echo "mnn 3.6.1: relu.onnx converted to relu.mnn"
echo "packages before: $(wc -l < before), after: $(wc -l < after)"
diff before after | grep '^[<>]' || true
echo "expected: the same packages"
cmp -s before after && { echo "the behaviour has changed" >&2; exit 1; }
if python -c "$events" 2> error; then echo "the behaviour has changed" >&2; exit 1; fi
echo "TensorBoard's event files could be imported before; now: $(tail -1 error | cut -c 1-120)"
