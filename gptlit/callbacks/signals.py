"""Ctrl-C and SIGTERM: the step is finished, `last.ckpt` written, and the exit code says which it was."""

import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl


class StopBetweenSteps(pl.Callback):
    """Turns SIGINT and SIGTERM into a stop after the current step; a second one stops at once.

    Lightning's own SIGTERM flag is used, since it is agreed upon by all processes.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Installs the handlers, after Lightning has installed its own."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.received is not None:
                signal.signal(number, signal.SIG_DFL)
                raise KeyboardInterrupt
            self.received = signal.Signals(number)
            trainer._signal_connector.received_sigterm = True

        for name in (signal.SIGINT, signal.SIGTERM):
            self._before[name] = signal.signal(name, note)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Puts the handlers back that were there before."""
        self.restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Likewise, and remembers a Ctrl-C that came before training began."""
        if isinstance(exception, KeyboardInterrupt) and self.received is None:
            self.received = signal.SIGINT
        self.restore()

    def restore(self) -> None:
        while self._before:
            name, handler = self._before.popitem()
            signal.signal(name, handler)
