#!/usr/bin/env bash
# orbax-checkpoint 0.12.8, jax 0.10.2: after a return to an earlier checkpoint, CheckpointManager.save saves nothing.
# expected: a run that diverges after step 10 is continued from its checkpoint of step 10, with another rate say. Its
#           checkpoints of steps 15 and 25 are saved; that of step 20, which the diverged run has saved too, replaces
#           it or raises the ValueError that the docstring announces "if the checkpoint already exists".
# seen:     every step up to the greatest one in the folder is skipped, the new 15 and 25 as well as 20: save returns
#           False, which training loops do not look at, and logs nothing. A crash before step 35 loses all of it, and
#           latest_step() is then that of the diverged run. force=True saves 15 and 25.
# remedy:   delete the later steps first (manager.delete), or a new folder.
# usage:    findings/orbax-saves-nothing-after-a-rollback.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
import logging
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp

DIVERGED, CONTINUED = -1.0, 1.0
records = []
logging.getLogger().addHandler(type("Note", (logging.Handler,), {"emit": lambda self, record: records.append(record.getMessage())})())
for name in ("absl", None):
    logging.getLogger(name).setLevel(logging.INFO)


def state(value):
    return {"weight": jnp.full(2, value)}


def restore(manager, step):
    return float(manager.restore(step, args=ocp.args.StandardRestore(state(0.0)))["weight"][0])


first = ocp.CheckpointManager(Path("run").resolve())
for step in (10, 20, 30):
    first.save(step, args=ocp.args.StandardSave(state(DIVERGED)))
first.close()

second = ocp.CheckpointManager(Path("run").resolve())
restore(second, 10)
saved, messages = {}, {}
for step in (15, 20, 25, 35):
    records.clear()
    saved[step] = second.save(step, args=ocp.args.StandardSave(state(CONTINUED)))
    messages[step] = len(records)
    second.wait_until_finished()
    print(f"continued from step 10, save({step}) returns {saved[step]}, log records of level INFO and above: {messages[step]}")
    if step == 25:
        latest = ocp.CheckpointManager(Path("run").resolve()).latest_step()
        owner = "diverged" if restore(second, latest) == DIVERGED else "continued"
        print(f"a run that is started again now finds step {latest}, which is one of the {owner} run")
forced = second.save(25, args=ocp.args.StandardSave(state(CONTINUED)), force=True)
second.wait_until_finished()
print(f"save(25, force=True) returns {forced}; steps in the folder: {sorted(second.all_steps())}")
print(*(f"{name} {version(name)}" for name in ("orbax-checkpoint", "jax")))
same = list(saved.values()) == [False, False, False, True] and (latest, owner) == (30, "diverged") and forced
same = same and messages[15] == messages[20] == messages[25] == 0 < messages[35]
raise SystemExit(0 if same else f"the behaviour has changed: {saved} {latest} {owner} {messages}")
PYTHON
