"""How a training run ended, in words, as an exit code, and with the command that goes on."""

import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from gptlit.cli.runs import find_start
from gptlit.errors import UserError
from gptlit.module import LitGPT


@dataclass(frozen=True)
class Ending:
    """What the command says and returns when training ended early, for a reason that is no fault of the program."""

    line: str
    exit_code: int
    together: bool = True
    """Whether all processes of the run know of it and end by themselves."""
    slower: bool = False
    """Whether to go on with smaller steps."""


def ending_of(error: BaseException, received: signal.Signals | None, step: int, run_dir: Path | None) -> Ending | None:
    """What an exception that ended training means; None for those that must keep their traceback, or end otherwise.

    Args:
        error: raised by `Trainer.fit`.
        received: the signal that asked the run to stop, if any.
        step: optimizer steps made.
        run_dir: folder of the run.

    Raises:
        UserError: when it was the settings.
    """
    if received is not None and isinstance(error, SIGTERMException | SystemExit):
        line = f"stopped by {received.name} after step {step:,}"
        return Ending(line, 128 + int(received), together=isinstance(error, SIGTERMException))
    if isinstance(error, MisconfigurationException) and step == 0:
        raise UserError(f"the Trainer does not take these trainer settings: {error}") from error
    if isinstance(error, FloatingPointError):
        return Ending(str(error), exit_code=1, slower=True)
    if isinstance(error, OSError) and error.strerror:
        return Ending(f"{error.filename or run_dir}: {error.strerror} (after step {step:,})", 1, together=False)
    return None


def way_on(run_dir: Path | None, model: LitGPT, slower: bool) -> str:
    """The line that says how to go on from the newest checkpoint of a run, read once more to be sure of it."""
    if run_dir is None:
        return "nothing was saved: start again"
    try:
        start, checkpoint = find_start(str(run_dir))
    except UserError:
        return f"nothing was saved yet, so there is nothing to go on from in {run_dir}: start again"
    command = ["gptlit", "fit", "--ckpt_path", str(run_dir)]
    if slower:
        command += ["--model.optimizer.lr", f"{model.optimizer_config.lr / 2:g}"]
        if model.optimizer_config.name == "muon":
            command += ["--model.optimizer.muon_lr", f"{model.optimizer_config.muon_lr / 2:g}"]
    return f"{start.name} of step {checkpoint['global_step']:,} is whole; go on with: {shlex.join(command)}"
