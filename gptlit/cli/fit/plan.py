"""From arguments to a plan: what `fit`, `validate` and `test` will do, before anything is loaded or written."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from gptlit.checkpoint.files import (
    ResumePoint,
    find_checkpoint,
    find_resume_point,
    is_config_of_a_run,
    read_checkpoint,
)
from gptlit.cli.fit.parser import FitParser, make_parser
from gptlit.cli.fit.precision import fastest_precision
from gptlit.cli.fit.resume import (
    OF_ONE_START,
    is_finished,
    readable,
    refuse_what_is_fixed,
    settings_to_take_over,
)
from gptlit.cli.fit.trainer_settings import REFUSED_OPTIONS
from gptlit.cli.fit.unused import refuse_flags_of_a_new_run, refuse_options_of_fit, refuse_regularisation, unused
from gptlit.cli.parser import option_names, parse
from gptlit.cli.settings import (
    as_yaml,
    check_config,
    find_config,
    flat,
    leaves_of,
    name_split_seed,
    option,
    stored_config,
    take_configs,
    without_option,
)
from gptlit.errors import UserError, shell_option
from gptlit.training.distillation import SETTING as TEACHERS
from gptlit.training.distillation import TEACHER_WEIGHT, WEIGHT_SETTING


@dataclass(frozen=True)
class Plan:
    """What a verb will do. `parse_fit` and `parse_evaluation` make it; nothing but a checkpoint has been read yet."""

    verb: str
    """fit, validate or test."""
    config: Namespace
    """The settings as parsed; `make_parser(verb).instantiate_classes` makes objects of them."""
    settings: Mapping[str, Any]
    """The settings as plain nested types, as they are written to config.yaml."""
    config_files: tuple[Path, ...] = ()
    """Configuration files that were read, in order."""
    start: ResumePoint | None = None
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Settings that differ from those of the checkpoint: (then, now)."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Settings of the checkpoint that were not taken over, and why."""
    flags: Collection[str] = ()
    """Names of the settings that were given as flags."""
    precision_chosen: bool = False
    """Whether `trainer.precision` was auto; the settings hold what it means on this machine."""
    finished: bool = False
    """Whether the run of the checkpoint has nothing left to do."""

    @property
    def steps_before(self) -> int:
        """Optimizer steps that were made before this start."""
        return 0 if self.start is None else self.start.steps


def parse_fit(arguments: Sequence[str], allow_unused: bool = False) -> Plan:
    """The plan of `gptlit fit ARGUMENTS`.

    Args:
        arguments: flags, without the verb.
        allow_unused: accept flags that change nothing with the other settings, for flags of several runs.

    Raises:
        UserError: naming the flag, file or setting that is wrong.
    """
    flags, files = read_config_options("fit", arguments)
    given = option(flags, "--ckpt_path")
    if given == "":
        raise UserError("is empty: give a run folder or a checkpoint file", "--ckpt_path")
    plan = make_plan("fit", flags, files, None if given is None else find_resume_point(given))
    if not allow_unused:
        refuse_unused(plan)
    return plan


def parse_evaluation(verb: str, arguments: Sequence[str]) -> Plan:
    """The plan of `gptlit validate ARGUMENTS` or `gptlit test ARGUMENTS`.

    Raises:
        UserError: naming the flag, file or setting that is wrong.
    """
    flags, files = read_config_options(verb, arguments)
    given = option(flags, "--ckpt_path")
    start = None
    if given:
        path = find_checkpoint(given, "best")
        start = ResumePoint(path, read_checkpoint(path), run_dir=None)
    plan = make_plan(verb, flags, files, start)  # --help exits here
    if start is None:
        raise UserError(f"gptlit {verb} needs a --ckpt_path: a run folder or a checkpoint file")
    refuse_regularisation(verb, plan.flags)
    refuse_unused(plan)
    return plan


def refuse_unused(plan: Plan) -> None:
    """Refuse flags that change nothing.

    Raises:
        UserError: for the first one.
    """
    if plan.start is not None:
        refuse_flags_of_a_new_run(plan.flags)
    for error in unused(plan.flags, flat(plan.settings, stop_at=leaves_of(option_names(make_parser(plan.verb))))):
        raise error


def read_config_options(verb: str, arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Split the arguments into flags and checked configuration files: flags win over files wherever they stand."""
    known = option_names(make_parser(verb))
    names, flags = take_configs(arguments)
    files = [find_config(name) for name in names]
    given = names_in_flags(flags)
    of_fit = only_of_fit(known) if verb != "fit" and (files or not given <= {*known}) else set()
    for file in files:
        check_config(str(file), {*known, *of_fit})
    refuse_options_of_fit(verb, given, of_fit)
    for file in files:
        refuse_options_of_fit(verb, names_in_file(file), of_fit, prefix=f"--config {file}: ")
    return flags, files


def only_of_fit(known: Collection[str]) -> set[str]:
    """Return the names of the options and groups that `fit` has and an evaluation with these options lacks."""
    refused = {f"trainer.{name}" for name in REFUSED_OPTIONS}  # by fit too
    return {*option_names(make_parser("fit"))} - {*known} - refused


def make_plan(verb: str, flags: list[str], files: Sequence[Path], start: ResumePoint | None) -> Plan:
    """Parse the settings: those of the checkpoint first, then the files, then the flags."""
    parser = make_parser(verb)
    layers: list[str] = []
    left_out: dict[str, str] = {}
    if start is not None:
        if verb == "fit":
            prepare_to_resume(start)
        taken, left_out = settings_to_take_over(stored_config(start.checkpoint), verb, option_names(parser))
        layers += ["--config", as_yaml(taken)]
        flags = [*without_option(flags, "--ckpt_path"), f"--ckpt_path={start.path}"]
    for file in files:
        layers += [*without_fallback(names_in_file(file)), *split_seed_in(file), "--config", str(file)]
    given = names_in_flags(flags)
    config = parse(parser, [*layers, *without_fallback(given), *flags])
    if verb == "fit" and not config.model.teachers and not weight_is_given(given, files):
        config.model.teacher_weight = TEACHER_WEIGHT
    if start is None and config.ckpt_path:
        raise UserError("ckpt_path is in a configuration file: give it as a flag, --ckpt_path")
    precision_chosen = config.trainer.precision == "auto"
    if precision_chosen:
        config.trainer.precision = fastest_precision(vars(config.trainer))
        precision_chosen = config.trainer.precision is not None
    settings = json.loads(parser.dump(config, skip_unset=False, format="json"))
    left_out = not_given_again(left_out, settings)
    changes: dict[str, tuple[Any, Any]] = {}
    if start is not None:
        if verb == "fit" and settings["model"]["init_from"] is not None:
            raise UserError("--model.init_from starts a new run and --ckpt_path resumes one: give one of them")
        changes = changes_since(start, settings, parser)
        dropped = {key.partition(" ")[0] for key in left_out}
        if verb == "fit" and not settings["model"]["teachers"]:
            dropped.add(WEIGHT_SETTING)
        changes = {key: change for key, change in changes.items() if key not in {*OF_ONE_START, *dropped}}
    finished = (
        verb == "fit"
        and start is not None
        and not settings["trainer"]["fast_dev_run"]
        and is_finished(start, settings["trainer"]["max_steps"])
    )
    return Plan(
        verb=verb,
        config=config,
        settings=settings,
        config_files=tuple(files),
        start=start,
        changes=changes,
        left_out=left_out,
        flags=frozenset(given),
        precision_chosen=precision_chosen,
        finished=finished,
    )


def without_fallback(names: Collection[str]) -> list[str]:
    """Return the arguments that drop `data.fallback` before a file or flags that name a text.

    A fallback replaces only the texts that are named together with it, in one file or on one command line.

    Args:
        names: of the settings in the file, or of the flags.
    """
    named = not {"data", "data.corpus", "data.val_corpus"}.isdisjoint(names)
    return ["--config", as_yaml({"data": {"fallback": None}})] if named else []


def split_seed_in(file: Path) -> list[str]:
    """Return the arguments that keep the split of a run where its `config.yaml` lacks `data.split_seed`."""
    settings = yaml.safe_load(file.read_text(encoding="utf-8-sig")) or {}
    if not is_config_of_a_run(file.absolute()):
        return []
    name_split_seed(settings)
    seed = (settings.get("data") or {}).get("split_seed")
    return [] if seed is None else ["--config", as_yaml({"data": {"split_seed": seed}})]


def names_in_file(file: Path) -> set[str]:
    """Return the names of the settings in a configuration file."""
    return set(flat(yaml.safe_load(file.read_text(encoding="utf-8-sig"))))


def names_in_flags(flags: Sequence[str]) -> set[str]:
    """Return the names of the options among flags: `data.corpus` for `--data.corpus X` and `--data.corpus+=X`.

    `--data '{corpus: X}'` gives `data` and `data.corpus`.
    """
    names = set()
    for word, following in pairwise([*flags, ""]):
        if not word.startswith("--"):
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        names.add(name.removesuffix("+"))
        value = value if equals else following
        if value.startswith("{"):
            with suppress(yaml.YAMLError):  # the parser says what is wrong
                names |= flat(yaml.safe_load(value), name).keys()
    return names


def weight_is_given(flags: Collection[str], files: Iterable[Path]) -> bool:
    """Whether a flag gives `model.teacher_weight`, or a file that names no teachers.

    The weight of a file or checkpoint with teachers belongs to them, and is dropped with them.
    """
    in_files = (flat(yaml.safe_load(file.read_text(encoding="utf-8-sig"))) for file in files)
    return WEIGHT_SETTING in flags or any(WEIGHT_SETTING in found and not found.get(TEACHERS) for found in in_files)


def not_given_again(left_out: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a checkpoint that are left out, without those that the command or a file gives again."""
    trainer = {f"trainer.{name}": value for name, value in settings["trainer"].items()}
    items = ((key, item) for key, value in trainer.items() for item in (value if isinstance(value, list) else [value]))
    given = {f"{key} {readable(item)}" for key, item in items}
    return {key: reason for key, reason in left_out.items() if key not in given}


def prepare_to_resume(start: ResumePoint) -> None:
    """Check that a checkpoint holds the state of a run.

    Raises:
        UserError: when it holds weights only.
    """
    if not start.checkpoint.get("optimizer_states"):
        raise UserError(
            f"{start.path} holds weights only, without the state of the optimizer: start a new run from it with "
            f"{shell_option('--model.init_from', start.path)}",
            "--ckpt_path",
        )


def changes_since(start: ResumePoint, settings: Mapping[str, Any], parser: FitParser) -> dict[str, tuple[Any, Any]]:
    """The settings that differ from those of a checkpoint, as (then, now).

    Raises:
        UserError: for a setting that a checkpoint fixes.
    """
    leaves = leaves_of(option_names(parser))
    now, then = flat(settings, stop_at=leaves), flat(stored_config(start.checkpoint), stop_at=leaves)
    then.update(flat({"model": {"gpt": start.checkpoint["hyper_parameters"]["gpt"]}}))
    if now.get("model.gpt.vocab_size") == 0:
        then.pop("model.gpt.vocab_size", None)
    return refuse_what_is_fixed(now, then)
