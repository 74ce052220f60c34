"""Ctrl-C, SIGTERM and similar signals: finish the step, write `last.ckpt`, keep the signal for the exit code."""

import os
import signal
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gptlit.checkpoint.run_dir import process_rank
from gptlit.training.lightning_internals import completes_step, stop_after_this_step

# SIGHUP: the terminal was closed; SIGUSR1: SLURM's notice of the time limit.
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
REPEAT_SECONDS = (
    1.0  # a second signal within it is a copy of the first: launchers forward what the terminal has also sent
)


class StopBetweenSteps(pl.Callback):
    """Turns a signal into a stop after the current step, or inside a validation; a second signal stops at once.

    All ranks stop after the same step, whichever received the signal.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._agreed = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers, after Lightning has installed its own."""
        for name in STOPPING:
            number = getattr(signal, name, None)  # Windows lacks some of them
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree with the other ranks; Lightning raises once all callbacks have seen the step."""
        if completes_step(trainer) and self._agree(trainer):
            stop_after_this_step(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Skip the validation of a run that is about to stop; the resumed run repeats it."""
        if self._agreed:
            raise SIGTERMException

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop during a validation."""
        if self._agree(trainer):
            raise SIGTERMException

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
            if process_rank() == 0:
                # No file object: the signal may have interrupted a write to it.
                with suppress(OSError):  # after SIGHUP there is no terminal
                    os.write(
                        2, f"\n{self.received.name}: stopping after this step; send it again to stop at once\n".encode()
                    )
        elif time.monotonic() - self._received_at > REPEAT_SECONDS:
            raise SystemExit(128 + number)

    def _agree(self, trainer: pl.Trainer) -> bool:
        """Return whether any rank has received a signal; the same result on all ranks."""
        if not self._agreed:
            number = int(self.received or 0)
            if trainer.world_size > 1:
                highest = torch.tensor(number, device=trainer.strategy.root_device)
                torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
                number = int(highest)
            if number:
                self.received, self._agreed = self.received or signal.Signals(number), True
        return self._agreed
