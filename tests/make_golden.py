"""Write the golden checkpoint of a version: `python tests/make_golden.py`, once before a release.

It holds a run of 12 steps that was stopped after 8, its text, and its validation loss. `test_checkpoint_files.py`
requires every later version to load, validate and resume it.
"""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import yaml
from command import PLAY, At, extra_callbacks, gptlit, load, write_config

from gptlit.version import __version__

MAX_STEPS = 12


def main() -> int:
    """Refuse to replace an existing file."""
    folder = Path(__file__).parent / "checkpoint" / "golden" / __version__
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text(PLAY.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)  # relative names: the file must hold no path of this machine
        shutil.copy(folder / "text.txt", "text.txt")
        run, end = Path("run"), Path("end")
        config = write_config(
            Path(),
            model__gpt__n_embd=8,
            model__gpt__block_size=8,
            trainer__max_steps=MAX_STEPS,
            trainer__log_every_n_steps=5,
            data__corpus="text.txt",
        )
        with extra_callbacks(At("on_before_zero_grad", 7, lambda: os.kill(os.getpid(), signal.SIGTERM))):
            assert gptlit("fit", "--config", config, "--run_dir", run).code == 143
        for name in ("last.ckpt", "config.yaml"):
            shutil.copy(run / name, folder)
        validated = gptlit("validate", "--ckpt_path", run / "last.ckpt")
        run.rename(end)
        assert gptlit("fit", "--ckpt_path", end).code == 0
        then = {
            "val_loss": float(validated.out.split("val/loss ")[1].split()[0]),
            "max_steps": MAX_STEPS,
            "final_val_loss": load(end / "last.ckpt")["callbacks"]["RunCheckpoints"]["best_score"],
        }
    (folder / "then.yaml").write_text(yaml.safe_dump(then), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
