#!/usr/bin/env bash
# numpy 2.4.6: a Generator whose state is restored draws the same numbers, but spawns the children of the first call again.
# expected: `bit_generator.state` is the state of the generator. A run that saves it, as JSON next to a checkpoint, and sets
#           it in a generator of the same seed continues as without the interruption: the same numbers, and the same
#           children of spawn(), one for each epoch or worker.
# seen:     the count of children is in the seed sequence, which is no part of `state`. The numbers are the same, and
#           spawn() begins with child 0 again: epoch 3 of a resumed run gets the numbers of epoch 0, epoch 4 those of
#           epoch 1. In a generator that was made without the seed the children are unrelated ones. Pickling keeps it all.
# remedy:   pickle the generator, or SeedSequence(seed, spawn_key=(epoch,)).
# usage:    findings/numpy-spawn-after-restored-state.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
import pickle

import numpy as np

SEED, EPOCHS, SAVED = 1337, 6, 3


def epochs(generator, first, last):
    """A number of the generator itself and one of a child, for each epoch."""
    return [(int(generator.integers(1000)), int(generator.spawn(1)[0].integers(1000))) for _ in range(first, last)]


whole = epochs(np.random.default_rng(SEED), 0, EPOCHS)
interrupted = np.random.default_rng(SEED)
epochs(interrupted, 0, SAVED)
state, pickled = json.dumps(interrupted.bit_generator.state), pickle.dumps(interrupted)

restored = {"the same seed": np.random.default_rng(SEED), "no seed": np.random.default_rng()}
for generator in restored.values():
    generator.bit_generator.state = json.loads(state)
restored["pickle"] = pickle.loads(pickled)
found = {name: epochs(generator, SAVED, EPOCHS) for name, generator in restored.items()}
print(f"numpy {np.__version__}, (number, number of a child) in {EPOCHS} epochs without interruption: {whole}")
for name, values in found.items():
    print(f"resumed before epoch {SAVED}, {name}: {values}")
numbers = all([number for number, _ in values] == [number for number, _ in whole[SAVED:]] for values in found.values())
children = {name: [child for _, child in values] for name, values in found.items()}
again = children["the same seed"] == [child for _, child in whole[: EPOCHS - SAVED]]
same = numbers and again and found["pickle"] == whole[SAVED:] != found["no seed"]
raise SystemExit(0 if same else f"the behaviour has changed: {whole} {found}")
PYTHON
