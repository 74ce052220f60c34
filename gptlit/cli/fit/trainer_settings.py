"""Settings of the Trainer that a run of gptlit cannot obey: refused by name before anything is loaded."""

from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.profilers import PassThroughProfiler

from gptlit.errors import UserError, require, settings_under

MOST_THREADS = 1024  # more than any machine has cores; where the system refuses that many, torch ends the process
ONE_EPOCH = "a run is one epoch of trainer.max_steps optimizer steps"
REFUSED_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    # option: values that change nothing, and what to say about any other
    "max_epochs": ((None, 1, -1), f"{ONE_EPOCH}: set trainer.max_steps"),
    "min_epochs": ((None, 0), f"{ONE_EPOCH}: set trainer.min_steps"),  # 1 lets nothing stop a run before its end
    "limit_train_batches": ((None, 1.0), f"{ONE_EPOCH}: set trainer.max_steps"),
    "check_val_every_n_epoch": ((None, 1), f"{ONE_EPOCH}: set trainer.val_check_interval, in steps"),
    "reload_dataloaders_every_n_epochs": ((0,), ONE_EPOCH),
    "limit_test_batches": ((None, 1.0), "fit does not test: give it to gptlit test"),
    "limit_predict_batches": ((None, 1.0), "fit does not predict: use gptlit predict"),
    "default_root_dir": ((None,), "everything that a run writes is in its folder: set --run_dir"),
    "sync_batchnorm": ((False,), "the model has no batch normalisation"),
    "barebones": ((False,), "it drops checkpoints, metrics and signals: switch off what you do not need by name"),
    "model_registry": ((None,), "checkpoints stay in the run folder: use gptlit export"),
}
ONLY_FIT = {  # options that an evaluation does not have
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches", "limit_predict_batches"),
    *("overfit_batches", "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps"),
    *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "logger", "enable_checkpointing"),
    *("enable_progress_bar", "default_root_dir", "enable_autolog_hparams", "model_registry", "barebones"),
    "enable_model_summary",  # printed when training starts
    *("reload_dataloaders_every_n_epochs", "sync_batchnorm", "use_distributed_sampler", "detect_anomaly"),
}
OTHER_LIMIT = {"validate": "limit_test_batches", "test": "limit_val_batches"}


def options_left_out(verb: str) -> set[str]:
    """Options of the Trainer that `validate` or `test` does not have, since they would change nothing there."""
    return set() if verb == "fit" else ONLY_FIT | {OTHER_LIMIT[verb]}


def check_trainer_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a fit that cannot work.

    Args:
        settings: all settings of the command, nested.

    Raises:
        UserError: names the setting.
    """
    trainer = settings["trainer"]
    check_accelerator(trainer["accelerator"])
    with settings_under("trainer"):
        for name, (harmless, reason) in REFUSED_OPTIONS.items():
            if not any(
                type(trainer[name]) is type(value) and trainer[name] == value for value in harmless
            ):  # 1 is not 1.0
                raise UserError(f"is {trainer[name]}: {reason}", name)
        steps, fast = trainer["max_steps"], trainer["fast_dev_run"]
        require(fast or steps >= 1, "max_steps", steps, "1 or more: the length of a run in optimizer steps")
        least = trainer["min_steps"]
        require(fast or least is None or least <= steps, "min_steps", least, f"trainer.max_steps ({steps}) or less")
        for name in ("accumulate_grad_batches", "log_every_n_steps"):
            require(trainer[name] is None or trainer[name] >= 1, name, trainer[name], "1 or more")
        clip = trainer["gradient_clip_val"]
        require(clip is None or clip >= 0, "gradient_clip_val", clip, "0 (off) or more")
        check_interval(trainer["val_check_interval"])
        check_time("max_time", trainer["max_time"])
    seed = settings["seed_everything"]
    require(-(2**63) <= seed < 2**64, "seed_everything", seed, "a number of at most 64 bits")
    require(settings["save_every_n_steps"] >= 1, "save_every_n_steps", settings["save_every_n_steps"], "1 or more")
    threads = settings["threads"]
    allowed = threads is None or 1 <= threads <= MOST_THREADS
    require(allowed, "threads", threads, f"1 to {MOST_THREADS:,}, or null")
    decay = settings["average"]["decay"]
    require(0 <= decay < 1, "average.decay", decay, "0 (off) or more, and less than 1")
    tokens = settings["sample_text"]["max_new_tokens"]
    require(tokens >= 0, "sample_text.max_new_tokens", tokens, "0 (off) or more")


def check_accelerator(accelerator: Any) -> None:
    """Refuse the name of a GPU that torch does not find on this machine.

    Args:
        accelerator: a name, or a class with its arguments, which is left to Lightning.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    found = {"gpu": cuda or mps, "cuda": cuda, "mps": mps}
    if isinstance(accelerator, str) and not found.get(accelerator, True):
        raise UserError(f"is {accelerator}, but torch finds none here: use cpu or auto", "trainer.accelerator")


def check_interval(interval: Any) -> None:
    """Check `val_check_interval`: optimizer steps, a fraction of the run, or a time."""
    if isinstance(interval, int | float):
        fits = 0 < interval <= (1 if isinstance(interval, float) else interval)
        require(fits, "val_check_interval", interval, "a number of steps, a fraction of the run, or DD:HH:MM:SS")
    else:
        check_time("val_check_interval", interval)


def check_time(name: str, value: Any) -> None:
    """Check a time: `DD:HH:MM:SS`, or a mapping as `datetime.timedelta` takes it."""
    if value is None:
        return
    seconds = 0.0
    try:
        if isinstance(value, Mapping):
            seconds = timedelta(**value).total_seconds()
        else:
            days, hours, minutes, rest = (int(part) for part in str(value).strip().split(":"))
            seconds = timedelta(days=days, hours=hours, minutes=minutes, seconds=rest).total_seconds()
    except (ValueError, TypeError):
        pass
    require(seconds > 0, name, value, "more than 0, as DD:HH:MM:SS")


def check_loggers(loggers: list[Any]) -> None:
    """Open MLflow's store before the run, which recent versions refuse for the default folder of files.

    Raises:
        UserError: says what to set.
    """
    for logger in loggers:
        if isinstance(logger, MLFlowLogger):
            try:
                _ = logger.experiment
            except Exception as error:  # of several kinds, by version of MLflow
                reason = " ".join(str(error).split())[:120]
                raise UserError(
                    f"MLFlowLogger cannot be used: set its tracking_uri, such as sqlite:///mlflow.db ({reason})",
                    "trainer.logger",
                ) from error


def check_log_model(loggers: list[Any], callbacks: list[Any], run_dir: Path | None) -> None:
    """Refuse `log_model` of a logger where it would do nothing, or could delete files of the run.

    A logger takes checkpoints from a `ModelCheckpoint`, which a run has only if the user adds one. DVCLive's deletes
    all other files in its folder (`findings/dvclive-deletes-other-files.sh`).

    Args:
        loggers: settings of the loggers.
        callbacks: of the run.
        run_dir: the run folder; None without one.

    Raises:
        UserError: says what to change.
    """
    arguments = [logger.get("init_args") or {} for logger in loggers if isinstance(logger, Mapping)]
    wanted = next((value for value in (given.get("log_model") for given in arguments) if value), None)
    if wanted is None:
        return
    saving = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    if not saving:
        raise UserError(
            f"has log_model {wanted}, but loggers do not see the checkpoints of the run folder: leave it out, or add a "
            "ModelCheckpoint with a dirpath of its own to trainer.callbacks",
            "trainer.logger",
        )
    for callback in saving:
        folder = callback.dirpath
        if run_dir is not None and folder is not None and run_dir.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(
                f"has log_model {wanted}, for which some loggers delete files next to the checkpoints, and dirpath "
                f"{folder} of ModelCheckpoint holds the files of the run: give it a folder of its own",
                "trainer.logger",
            )


def check_files(callbacks: list[Any], run_dir: Path | None) -> None:
    """Refuse callbacks of Lightning that would write over a checkpoint of the run.

    Args:
        callbacks: of the run.
        run_dir: the run folder; None without one.

    Raises:
        UserError: names the callback and the file.
    """
    for callback in callbacks:
        if run_dir is None or not isinstance(callback, ModelCheckpoint | OnExceptionCheckpoint):
            continue
        names: set[str | None] = {callback.filename}
        if isinstance(callback, ModelCheckpoint) and callback.save_last:
            names.add(callback.CHECKPOINT_NAME_LAST)
        taken = [name for name in ("best", "last") if name in names]
        if taken and callback.dirpath is not None and Path(callback.dirpath).resolve() == run_dir.resolve():
            raise UserError(
                f"writes {taken[0]}.ckpt in {run_dir}, which is a file of the run: give it a dirpath of its own",
                type(callback).__name__,
            )


class NoProfiler(PassThroughProfiler):
    """Measures nothing, and makes no context for each of the seventy things in a step that could be measured."""

    nothing: Any = nullcontext()

    def profile(self, action_name: str) -> Any:
        return self.nothing
