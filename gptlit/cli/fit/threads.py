"""`--threads`: the number of CPU threads as a part of a run's configuration."""

import os
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
import yaml

from gptlit.cli.fit.plan import Plan
from gptlit.cli.settings import as_yaml
from gptlit.data import TextDataModule
from gptlit.training.module import LitGPT
from gptlit.training.threads import fastest_threads, measuring_pays

PROCESSES = ("trainer.devices", "trainer.num_nodes")


@dataclass(frozen=True)
class Threads:
    """The number of CPU threads of a run; None where torch or Lightning chooses it at each start."""

    number: int | None = None
    measured: bool = False
    left_out: int | None = None
    """The number of the checkpoint, if it is not used because the number of processes is another."""

    def __str__(self) -> str:
        return f"{self.number} (measured)" if self.measured else str(self.number)

    @property
    def note(self) -> str | None:
        """A line about a number that is left out; None if there is none."""
        if self.left_out is None:
            return None
        return (
            f"threads {self.left_out} of the checkpoint is left out: it belongs to another number of processes; "
            "--threads sets the number of each process"
        )


def choose_threads(plan: Plan, model: LitGPT, data: TextDataModule, trainer: pl.Trainer) -> Threads:
    """Choose the number of CPU threads of a run, and store it in its configuration (`model.run_config`).

    Another number may round differently, so a resumed run uses the stored one. A new run in one process on a CPU uses
    all threads, or one if that is measured to be faster. Other new runs use only a number that is given. A run that
    resumes in several processes, and not in as many as before, leaves out the stored number.

    Args:
        plan: of the run.
        model: not yet built.
        data: the text is loaded.
        trainer: not yet running.
    """
    threads = Threads(plan.settings["threads"])
    given = "threads" in plan.flags or "threads" in plan.changes  # as a flag, or in a configuration
    if threads.number is not None and trainer.world_size > 1 and not given:
        if any(key in plan.changes for key in PROCESSES):
            threads = Threads(left_out=threads.number)
    elif threads.number is None and plan.start is None and is_one_cpu(trainer):
        threads = threads_of_a_new_run(model, data, trainer)
    model.run_config = as_yaml(yaml.safe_load(model.run_config or "{}") | {"threads": threads.number})
    return threads


def is_one_cpu(trainer: pl.Trainer) -> bool:
    """Return whether a run is one process on a CPU."""
    return trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"


def threads_of_a_new_run(model: LitGPT, data: TextDataModule, trainer: pl.Trainer) -> Threads:
    """Return all threads, or one if that is measured to be faster; OMP_NUM_THREADS is obeyed."""
    available = torch.get_num_threads()
    if available == 1 or "OMP_NUM_THREADS" in os.environ or not measuring_pays(model, data, trainer.max_steps):
        return Threads(available)
    return Threads(fastest_threads(trainer, model, data), measured=True)
