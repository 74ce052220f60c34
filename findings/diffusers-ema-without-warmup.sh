#!/usr/bin/env bash
# diffusers 0.42.1, torch 2.13.0: EMAModel(decay=0.999, use_ema_warmup=False) warms up for 9,000 steps.
# expected: without warm-up, which is the default, each step keeps 0.999 of the average, as the averages of torch with
#           get_ema_multi_avg_fn(0.999) do; `min_decay` and the warm-up have options of their own.
# seen:     the option chooses between two warm-ups. With False the decay is (1 + n) / (10 + n) up to the limit: 0.92
#           after 100 steps, 0.991 after 1,000; 0.9999 would be reached after 90,000. In a short run the average reaches
#           back over the last tenth of the steps, whatever the decay. The first step copies the weights in any case.
# remedy:   min_decay=0.999 as well, which fixes the decay, the first step apart.
# usage:    findings/diffusers-ema-without-warmup.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy diffusers==0.42.1
cd "$folder"
venv/bin/python - <<'PYTHON' 2> errors || { cat errors >&2; exit 1; }
from importlib.metadata import version

import torch
from diffusers.training_utils import EMAModel
from torch.optim.swa_utils import get_ema_multi_avg_fn

DECAY, STEPS = 0.999, 1000


def follow(**options):
    """Decays of the steps, and by how many steps the average is behind a weight that grows by 1 a step."""
    weight = torch.nn.Parameter(torch.zeros(1))
    ema, decays = EMAModel([weight], decay=DECAY, **options), []
    for step in range(STEPS):
        weight.data.fill_(step)
        ema.step([weight])
        decays.append(ema.cur_decay_value)
    return decays, weight.item() - ema.shadow_params[0].item()


averaged = [torch.zeros(1)]
for step in range(STEPS):
    get_ema_multi_avg_fn(DECAY)(averaged, [torch.tensor([float(step)])], 0)
settings = {
    "use_ema_warmup=False": {"use_ema_warmup": False},
    "use_ema_warmup=True": {"use_ema_warmup": True},
    "use_ema_warmup=False, min_decay=0.999": {"use_ema_warmup": False, "min_decay": DECAY},
}
found = {name: follow(**options) for name, options in settings.items()}
for name, (decays, behind) in found.items():
    values = f"{decays[10]:.3f} at step 10, {decays[100]:.3f} at 100, {decays[999]:.3f} at 999"
    print(f"{name}: decay {values}; average {behind:.0f} steps behind")
exact = STEPS - 1 - averaged[0].item()
print(f"torch's average with the decay {DECAY} after {STEPS} steps: {exact:.0f} steps behind")
print(*(f"{name} {version(name)}" for name in ("diffusers", "torch")))
plain, behind = found["use_ema_warmup=False"]
fixed, fixed_behind = found["use_ema_warmup=False, min_decay=0.999"]
same = 0.5 < plain[10] < 0.6 and 0.91 < plain[100] < 0.93 and plain[999] < 0.992 and behind < 0.25 * exact
same = same and fixed[10] == DECAY and abs(fixed_behind - exact) < 2
raise SystemExit(0 if same else f"the behaviour has changed: {behind} {exact} {fixed_behind}")
PYTHON
