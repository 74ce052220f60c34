#!/usr/bin/env bash
# tbparse 0.0.9, tensorboard 2.21.0, torch 2.13.0: a resumed run has the values that TensorBoard purges, twice a step.
# expected: a run that stopped at step 7 and resumed after step 4 writes a second event file, by torch's SummaryWriter
#           with purge_step=5. A reader returns each step once, as TensorBoard shows it.
# seen:     tbparse reads each file alone, so the purge reaches nothing: the steps 5 to 7 come twice, the discarded value
#           first; with pivot=True their cells are lists and the column is not numeric. TensorBoard's
#           EventAccumulator returns each step once.
# usage:    findings/tbparse-keeps-purged-steps.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 tensorboard==2.21.0 tbparse==0.0.9
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import time
from importlib.metadata import version

from tbparse import SummaryReader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

for steps, settings in [(range(8), {}), (range(5, 10), {"purge_step": 5})]:
    writer = SummaryWriter("run", **settings)
    for step in steps:
        writer.add_scalar("loss", step + 100 * bool(settings), step)
    writer.close()
    time.sleep(1.1)  # event files are sorted by the second in their names

accumulator = EventAccumulator("run")
accumulator.Reload()
shown = [(event.step, event.value) for event in accumulator.Scalars("loss")]
read = [(int(step), value) for step, value in SummaryReader("run").scalars[["step", "value"]].to_numpy().tolist()]
cells = SummaryReader("run", pivot=True).scalars.set_index("step")["loss"]
print(f"TensorBoard {version('tensorboard')}: {len(shown)} values, step 6 {[value for step, value in shown if step == 6]}")
print(f"tbparse {version('tbparse')}: {len(read)} values, step 6 {[value for step, value in read if step == 6]}")
print(f"tbparse with pivot=True: step 6 {cells[6]}, column of type {cells.dtype}")
once = [(step, float(step if step < 5 else step + 100)) for step in range(10)]
twice = sorted([(step, float(step)) for step in range(8)] + [(step, step + 100.0) for step in range(5, 10)])
same = shown == once and read == twice and list(cells[6]) == [6.0, 106.0] and cells.dtype == object
raise SystemExit(0 if same else f"the behaviour has changed: {shown} {read} {cells[6]}")
PYTHON
