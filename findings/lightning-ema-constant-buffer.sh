#!/usr/bin/env bash
# lightning 2.6.6, torch 2.13.0: EMAWeightAveraging changes a constant buffer, and a resumed run validates with another.
# expected: a table that never changes (rotary angles, say) is its own average. Validations of the averaged model use
#           the same table before and after a resume.
# seen:     `use_buffers` is True by default, and decay · a + (1 − decay) · a is not a in float32: the table moves by
#           rounding at every step. A buffer with `persistent=False` is in no checkpoint, so a resumed run begins with the
#           exact table again, and its validation losses differ in the last digits. Integer tables are copied.
# usage:    findings/lightning-ema-constant-buffer.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy lightning==2.6.6
cd "$folder"
venv/bin/python - 2>/dev/null <<'PYTHON'
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

ANGLES = torch.arange(1, 65, dtype=torch.float32).cos()


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 1)
        self.register_buffer("angles", ANGLES.clone(), persistent=False)
        self.errors = {}

    def training_step(self, batch, index):
        return self.layer(batch * self.angles).square().mean()

    def validation_step(self, batch, index):
        self.errors[self.global_step] = (self.angles - ANGLES).abs().max().item()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(steps, resume=None, use_buffers=True):
    model, data = Model(), DataLoader(torch.ones(400, 64), batch_size=4)
    callback = EMAWeightAveraging(decay=0.99, use_buffers=use_buffers)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=callback, val_check_interval=2, num_sanity_val_steps=0,
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir="runs",
    )  # fmt: skip
    trainer.fit(model, data, DataLoader(torch.ones(4, 64)), ckpt_path=resume)
    trainer.save_checkpoint(f"{steps}.ckpt")
    return model.errors


whole = train(22)
train(20)
resumed = train(22, resume="20.ckpt")
without = train(22, use_buffers=False)
print(f"distance of the table from itself, by step: {whole}; resumed after 20: {resumed}; use_buffers=False: {without}")
drifts = whole[22] > 0 and whole[22] != resumed[22]
raise SystemExit(0 if drifts and not any(without.values()) else "it has changed")
PYTHON
