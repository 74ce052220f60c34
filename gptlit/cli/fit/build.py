"""From a plan to objects: data, model, run folder and Trainer."""

import dataclasses
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gptlit.checkpoint.files import is_config_of_a_run
from gptlit.checkpoint.io import AtomicCheckpointIO
from gptlit.checkpoint.run_dir import RunDir
from gptlit.cli.fit.devices import check_devices, check_strategy
from gptlit.cli.fit.parser import make_parser
from gptlit.cli.fit.parts import RunParts, as_list, run_parts
from gptlit.cli.fit.plan import Plan
from gptlit.cli.fit.resume import refuse_another_text
from gptlit.cli.fit.trainer_settings import NoProfiler, check_files, check_log_model, check_loggers
from gptlit.cli.fit.unused import refuse_other_architecture
from gptlit.cli.settings import as_yaml
from gptlit.data import TextDataModule
from gptlit.errors import UserError, cause_of, counted, settings_under
from gptlit.model.config import GPTConfig
from gptlit.tokenizer import BPETokenizer, Tokenizer
from gptlit.training.checks import refuse_callbacks
from gptlit.training.distillation import SETTING as TEACHERS
from gptlit.training.distillation import Teachers
from gptlit.training.lightning_internals import set_max_steps
from gptlit.training.module import LitGPT

PROFILERS: dict[str, Callable[..., Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}
LONGEST_NAME = 40  # characters of a text's name in that of a run


def instantiate(plan: Plan) -> Namespace:
    """Make objects of the settings: data, model, and what the settings of the Trainer name.

    Raises:
        UserError: for a range, a combination, or a package that is not installed.
    """
    config = plan.config.clone()
    if plan.start is not None:
        config.model.tokenizer = plan.start.checkpoint["hyper_parameters"]["tokenizer"]
    try:
        parser = make_parser(plan.verb)
        parser.add_instantiator(make_gpt_config, GPTConfig)
        return parser.instantiate_classes(config)
    except UserError as error:
        if error.setting == TEACHERS:
            error.message += if_moved(plan, TEACHERS)
        raise
    except ValueError as error:
        missing = cause_of(error, ModuleNotFoundError)
        if missing is None:
            raise
        raise UserError(f"the settings name something that is not installed: {missing}") from error


def make_gpt_config(kind: type[GPTConfig], *args: Any, **settings: Any) -> GPTConfig:
    """Make the architecture; its errors name settings of `model.gpt`. Called by jsonargparse."""
    settings.pop("applied_instantiation_links", None)
    with settings_under("model.gpt"):
        return kind(*args, **settings)


def prepare(plan: Plan, model: LitGPT, data: TextDataModule) -> None:
    """Load the text, and check that model, checkpoint and text fit together.

    Raises:
        UserError: when they do not.
    """
    settings = deepcopy(dict(plan.settings))
    source = settings["model"].get("init_from")
    borrowed = source is not None
    if borrowed:
        data.block_size = model.gpt.block_size
    data.tokenizer = model.tokenizer
    if plan.start is None:
        refuse_other_tokenizer(plan, model)
    try:
        with settings_under("data"):
            data.prepare_data()
    except UserError as error:
        if error.setting in ("data.corpus", "data.val_corpus"):
            error.message += if_moved(plan, error.setting)
        raise
    if plan.verb == "fit" and plan.start is not None:
        refuse_another_text(plan.start.checkpoint, data)
    with settings_under("data"):
        data.setup(plan.verb)
    assert data.tokenizer is not None
    gpt = model.gpt_for(data.tokenizer.vocab_size)
    if borrowed:
        refuse_other_architecture(plan.flags, settings["model"]["gpt"], dataclasses.asdict(gpt), source)
    if model.teachers is not None:
        prepare_teachers(plan, model.teachers, gpt, data.tokenizer)
    if borrowed:  # checkpoints of this run hold what it started from
        settings["model"] |= {"gpt": dataclasses.asdict(gpt), "init_from": None}
    model.run_config = as_yaml({key: value for key, value in settings.items() if key != "ckpt_path"})


def refuse_other_tokenizer(plan: Plan, model: LitGPT) -> None:
    """Refuse flags for the tokenizer of the data where the model brings its own (`model.init_from`).

    Raises:
        UserError: names the flag.
    """
    if model.tokenizer is None:
        return
    wanted = plan.settings["data"]["tokenizer"]
    if (
        "data.tokenizer" in plan.flags
        and wanted != model.tokenizer.kind
        and not same_tokenizer(wanted, model.tokenizer)
    ):
        raise UserError(
            f"is {wanted}, but the model that the run starts from has its own tokenizer ({model.tokenizer.kind}): "
            "leave it out",
            "data.tokenizer",
        )
    if "data.vocab_size" in plan.flags and plan.settings["data"]["vocab_size"] != model.tokenizer.vocab_size:
        raise UserError(
            f"is {plan.settings['data']['vocab_size']}, but the model that the run starts from has its own tokenizer "
            f"({counted(model.tokenizer.vocab_size, 'token')}): leave it out",
            "data.vocab_size",
        )


def same_tokenizer(path: str, tokenizer: Tokenizer) -> bool:
    """Whether a path names a file of the same tokenizer."""
    return Path(path).is_file() and BPETokenizer.from_file(path) == tokenizer


def if_moved(plan: Plan, setting: str) -> str:
    """Return what to add to the command if a file that the settings of a checkpoint name is missing; else nothing.

    Of several names, those that are there are repeated.
    """
    group, _, name = setting.partition(".")
    named = as_list(plan.settings[group][name])
    places = [path if Path(path).exists() else "NEW_PLACE" for path in named]
    if plan.start is None or setting in plan.changes or "NEW_PLACE" not in places:
        return ""
    place = places[0] if len(places) == 1 else shlex.quote(f"[{', '.join(places)}]")
    return f" (the name is the checkpoint's, as seen from here; if it has moved, add --{setting} {place})"


def prepare_teachers(plan: Plan, teachers: Teachers, gpt: GPTConfig, tokenizer: Tokenizer) -> None:
    """Load the teachers, and check that a resumed run has those that it had.

    Raises:
        UserError: when they do not fit, have changed, or would change while the run overwrites its own checkpoints.
    """
    start = plan.start
    if start is not None and start.run_dir is not None:
        for source in teachers.sources:
            if Path(source).resolve().is_relative_to(start.run_dir.resolve()):
                raise UserError(f"{source} is the run that resumes, whose weights change: name another run", TEACHERS)
    teachers.load(gpt, tokenizer)
    if start is not None:
        teachers.require_those_of(start.checkpoint)


def open_run_dir(plan: Plan, data: TextDataModule) -> RunDir:
    """Claim the folder of the run that resumes, or a new one."""
    wanted, start = plan.settings["run_dir"], plan.start
    if start is None:
        return RunDir.make(wanted, name_of_run(plan, data))
    same = not wanted or (start.run_dir is not None and Path(wanted).resolve() == start.run_dir.resolve())
    if start.run_dir is not None and same:
        return RunDir.reopen(start.run_dir)
    parent = start.path.parent
    in_a_run = (parent / "config.yaml").is_file()
    return RunDir.make(wanted or (str(parent) if in_a_run else None), start.path.stem)


def name_of_run(plan: Plan, data: TextDataModule) -> str:
    """Name a new run after its last configuration file, and after its text if `--data.corpus` was given: `base-my`.

    A run's `config.yaml` gives the name of its folder.
    """
    file = Path(os.path.abspath(plan.config_files[-1])) if plan.config_files else Path("run")
    of_a_run = is_config_of_a_run(file)
    stem = (of_a_run and file.parent.resolve().name) or file.stem
    if "data.corpus" not in plan.flags or data.corpus is None:
        return stem
    text = re.sub(r"[^\w.-]+", "-", data.corpus.name).strip("-.")
    ending = f"-{text[:LONGEST_NAME]}" if text else ""
    return stem if of_a_run and stem.endswith(ending) else stem + ending


def make_trainer(
    plan: Plan, objects: Namespace, run_dir: Path | None, extra_callbacks: Sequence[pl.Callback], quiet: bool
) -> tuple[pl.Trainer, RunParts | None]:
    """The Trainer of a verb, with the parts of a run where the verb is fit.

    Raises:
        UserError: when Lightning refuses the settings, or the devices cannot share the batch.
    """
    config = vars(objects.trainer)
    check_loggers(as_list(config.get("logger")))
    settings = {**config, **settings_of_ours(plan, config, run_dir)}
    parts = None
    if plan.verb == "fit":
        steps = None if plan.start is None else plan.start.steps
        parts = run_parts(config, objects, run_dir, steps, quiet)
        settings |= parts.settings()
    else:
        settings["callbacks"] = as_list(config["callbacks"])
    settings["callbacks"] = [*settings["callbacks"], *extra_callbacks]
    with settings_under("trainer.callbacks"):
        refuse_callbacks(settings["callbacks"])
        if plan.verb == "fit":
            check_files(settings["callbacks"], run_dir)
    if plan.verb == "fit":
        check_log_model(as_list(plan.settings["trainer"]["logger"]), settings["callbacks"], run_dir)
    try:
        trainer = pl.Trainer(**settings)
        if not hasattr(trainer, "val_check_interval"):  # where it is a time, Lightning leaves it undefined
            trainer.val_check_interval = None  # type: ignore[assignment]
        check_strategy(trainer, config["devices"])
        if plan.verb == "fit":
            if config["fast_dev_run"]:  # counted in optimizer steps; Lightning counts micro-batches
                set_max_steps(trainer, plan.steps_before + trainer.max_steps)
                trainer.limit_train_batches = trainer.max_steps * trainer.accumulate_grad_batches
            elif config["overfit_batches"]:  # Lightning validates on as many batches, whatever limit_val_batches says
                limit = config["limit_val_batches"]
                trainer.limit_val_batches = 1.0 if limit is None else limit
            check_devices(trainer, objects.data.batch_size, objects.model.optimizer_config.name)
    except UserError:
        raise
    except (MisconfigurationException, ModuleNotFoundError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"the Trainer does not take these trainer settings: {error}") from error
    return trainer, parts


def settings_of_ours(plan: Plan, config: Mapping[str, Any], run_dir: Path | None) -> dict[str, Any]:
    """Return the arguments of the Trainer that are not settings of the user."""
    settings: dict[str, Any] = {
        "use_distributed_sampler": False,  # the batches know their rank
        "plugins": [*as_list(config["plugins"]), AtomicCheckpointIO(plan.start)],
        "enable_model_summary": bool(config.get("enable_model_summary")),
        "default_root_dir": str(run_dir or "."),
        "profiler": profiler_of(config["profiler"], run_dir, plan.steps_before),
    }
    if plan.verb != "fit":
        return settings | {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    interval = config["val_check_interval"]
    if isinstance(interval, float):
        interval = max(1, int(config["max_steps"] * interval))
    if isinstance(interval, int):  # Lightning counts micro-batches; the user counts optimizer steps
        interval *= config["accumulate_grad_batches"]
    return settings | {
        "num_sanity_val_steps": config["num_sanity_val_steps"] or 0,
        "check_val_every_n_epoch": None,  # the interval counts steps of the one epoch
        "val_check_interval": interval,
    }


def profiler_of(wanted: Any, run_dir: Path | None, step: int) -> Any:
    """The profiler that the user named, its report in the run folder if there is one, under the first step."""
    if isinstance(wanted, str) and run_dir is not None and wanted in PROFILERS:
        return PROFILERS[wanted](dirpath=run_dir, filename=f"profile-{step}" if step else "profile")
    return wanted or NoProfiler()
