"""`gptlit validate` and `test`: the exact metrics of a checkpoint, and what they are the mean of."""

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gptlit.checkpoint.run_dir import process_rank
from gptlit.cli.fit.build import instantiate, make_trainer, prepare
from gptlit.cli.fit.other_runs import leak
from gptlit.cli.fit.plan import Plan
from gptlit.cli.fit.precision import slow_precision
from gptlit.cli.fit.trainer_settings import check_accelerator
from gptlit.cli.messages import say_once
from gptlit.cli.report import check_report, report_on
from gptlit.data import TextDataModule
from gptlit.device.processes import leave_process_group, restored_environment
from gptlit.errors import UserError
from gptlit.training.evaluation import batches_evaluated
from gptlit.training.module import LitGPT


def run_evaluation(plan: Plan, extra_callbacks: Sequence[pl.Callback] = ()) -> None:
    """Print the exact metrics of a checkpoint on stdout, one a line.

    Raises:
        UserError: when the settings do not fit, or leave nothing to evaluate on.
    """
    check_accelerator(plan.settings["trainer"]["accelerator"])
    if line := slow_precision(plan.settings["trainer"]):
        say_once(line, style="yellow")
    objects = instantiate(plan)
    prepare(plan, objects.model, objects.data)
    trainer, _ = make_trainer(plan, objects, None, extra_callbacks, quiet=False)
    assert plan.start is not None
    if line := leak(str(plan.start.path), plan.start.checkpoint, objects.data):
        say_once(line, style="bold red")
    report = plan.settings.get("report") == "full"
    if report:
        check_report(trainer, objects.model, plan.settings["report_stride"])
    with restored_environment(lambda: trainer.world_size == 1):
        found = evaluate(plan, trainer, objects.model, objects.data)
    if note := part_note(plan, trainer):
        say_once(note, style="yellow")
    if process_rank() == 0:
        for name, value in found.items():
            print(f"{name} {value:.6f}")
    if report:
        print(f"\n{report_on(trainer, objects.model, objects.data, plan.settings['report_stride'])}")
    leave_process_group()


def evaluate(plan: Plan, trainer: pl.Trainer, model: LitGPT, data: TextDataModule) -> Mapping[str, float]:
    """Return the metrics of a checkpoint by name.

    Raises:
        UserError: when Lightning refuses the settings, or they leave nothing to evaluate on.
    """
    assert plan.start is not None
    run, limit = (trainer.validate, "val") if plan.verb == "validate" else (trainer.test, "test")
    setting = f"limit_{limit}_batches"
    try:
        found = run(model, datamodule=data, ckpt_path=plan.start.path, verbose=False)
    except MisconfigurationException as error:
        if setting not in str(error):
            raise UserError(f"the Trainer does not take these trainer settings: {error}") from error
        raise UserError(
            f"is {plan.settings['trainer'][setting]}: less than one batch of the validation part: "
            "a smaller --data.eval_batch_size makes more batches",
            f"trainer.{setting}",
        ) from error
    if not found:
        raise UserError(f"trainer.{setting} is 0: nothing is left to {plan.verb} on")
    return found[0]


def part_note(plan: Plan, trainer: pl.Trainer) -> str | None:
    """Return a line that says that only a part was evaluated, after any verb; None after the whole part or nothing."""
    name = "test" if plan.verb == "test" else "val"
    parts = []
    for loader, subject in enumerate(("the metrics", "the loss estimates")):
        done, whole = batches_evaluated(trainer, name, loader) or (0, 0)
        if done not in (0, whole):
            of = "of the validation part" if loader == 0 else "of data.estimate_batches"
            parts.append(f"{subject} are those of {done:,} of {whole:,} batches {of}")
    setting = "fast_dev_run" if plan.settings["trainer"]["fast_dev_run"] else f"limit_{name}_batches"
    return f"{'; '.join(parts)}: trainer.{setting} is set" if parts else None
