"""`gptlit fit`, `validate` and `test`: the LightningCLI, with run folders, trusted checkpoints and one-line errors."""

import dataclasses
import json
import shlex
import signal
from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gptlit.callbacks.averaging import AverageWeights
from gptlit.callbacks.pictures import Pictures
from gptlit.callbacks.samples import SampleText
from gptlit.callbacks.tensorboard import tensorboard_command
from gptlit.checkpoint.files import find_checkpoint, find_start, home_of, read_checkpoint
from gptlit.checkpoint.io import AtomicCheckpointIO
from gptlit.checkpoint.run_dir import RunDir, process_rank, started_by_first_process
from gptlit.cli.fit.messages import Ending, closing_rows, ending_of, opening_line, way_on
from gptlit.cli.fit.parts import as_list, run_parts
from gptlit.cli.fit.resume import (
    OF_ONE_START,
    is_finished,
    refuse_another_text,
    refuse_what_is_fixed,
    settings_to_take_over,
)
from gptlit.cli.fit.trainer_settings import NoProfiler, check_devices, check_trainer_settings
from gptlit.cli.messages import cause_of, parser_error_line, say, table
from gptlit.cli.settings import (
    as_yaml,
    check_config,
    find_config,
    flat,
    leaves_of,
    option,
    stored_config,
    without_option,
)
from gptlit.data import TextDataModule
from gptlit.device.memory import keep_freed_memory
from gptlit.device.processes import leave_process_group
from gptlit.errors import UserError
from gptlit.training.module import LitGPT, check_vocabulary
from gptlit.version import __version__


def train(verb: str, arguments: list[str]) -> int:
    """Runs fit, validate or test; returns the exit code."""
    keep_freed_memory()
    command = GptlitCLI(verb, arguments)
    if command.ending is None or command.ending.collective:
        leave_process_group()
    return command.exit_code


class GptlitCLI(LightningCLI):
    """LightningCLI for one verb: only its parser is built, since each costs a second."""

    def __init__(self, verb: str, arguments: list[str]) -> None:
        self.verb = verb
        self.arguments = arguments
        self.config_names: list[str] = []
        self.checkpoint: dict[str, Any] | None = None
        self.checkpoint_path: Path | None = None
        self.folder: RunDir | None = None
        self.run_dir: Path | None = None
        self.changes: dict[str, tuple[Any, Any]] = {}  # settings that differ from the checkpoint's: (then, now)
        self.finished = False  # the run of the checkpoint has nothing left to do
        self.ending: Ending | None = None
        self.exit_code = 0
        super().__init__(
            LitGPT,
            TextDataModule,
            save_config_callback=None,
            seed_everything_default=1337,
            parser_kwargs={"exit_on_error": False, verb: {"exit_on_error": False}},
            args=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    # ---------------------------------------------------------------- parsing

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one verb."""
        skip = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "weights_only", "verbose"}
        return {self.verb: skip}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed: one number behind weights, batches and dropout."""
        parser.add_argument("--seed_everything", type=int, default=1337, help="Fixes weights, batches and dropout.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what must agree, and adds what only a run needs."""
        parser.link_arguments("model.gpt.block_size", "data.block_size")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        if self.verb == "fit":
            parser.add_argument("--run_dir", type=str | None, default=None, help="Folder of the run.")
            parser.add_argument(
                "--save_every_n_steps", type=int, default=100, help="Optimizer steps between writes of last.ckpt."
            )
            parser.add_class_arguments(SampleText, "sample_text", skip={"run_dir"}, instantiate=False)
            parser.add_class_arguments(AverageWeights, "average", instantiate=False)
            parser.add_class_arguments(Pictures, "pictures", instantiate=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Packaged configs by name; the configuration of a checkpoint under everything that is given here."""
        known = [action.dest for action in self._subcommand_parsers[self.verb]._actions]  # noqa: SLF001
        arguments = self._find_configs(self.arguments, known)
        given = option(arguments, "--ckpt_path")
        before: list[str] = []
        if given:
            if self.verb == "fit":
                self.checkpoint_path, self.checkpoint = find_start(given)
            else:
                self.checkpoint_path = find_checkpoint(given, "best")
                self.checkpoint = read_checkpoint(self.checkpoint_path)
            settings, left_out = settings_to_take_over(stored_config(self.checkpoint), self.verb, known)
            before = ["--config", as_yaml(settings)]
            arguments = [*without_option(arguments, "--ckpt_path"), "--ckpt_path", str(self.checkpoint_path)]
            for key, reason in left_out.items():
                self._say(f"{key} of the checkpoint is left out: {reason}", style="yellow")
        elif given == "" or self.verb != "fit":
            raise UserError(f"gptlit {self.verb} needs a --ckpt_path: a run folder or a checkpoint file")
        try:
            self.config = parser.parse_args([self.verb, *before, *arguments])
        except (ArgumentError, TypeError, ValueError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(parser_error_line(error, known)) from error
        if given is None and self.config[self.verb].ckpt_path:
            raise UserError("ckpt_path stands in a configuration: give it as --ckpt_path")
        self.settings = json.loads(self.parser.dump(self.config, skip_none=False, format="json"))[self.verb]
        if self.checkpoint is not None:
            if self.settings["model"]["init_from"] is not None:
                raise UserError("--model.init_from begins a run and --ckpt_path goes on with one: give one of them")
            self._compare_with_checkpoint()

    def _parse_ckpt_path(self) -> None:
        """Lightning would put the checkpoint's settings over the flags; here they already lie under them."""

    def _find_configs(self, arguments: list[str], known: list[str]) -> list[str]:
        found: list[str] = []
        expect = False
        for argument in arguments:
            name, equals, value = argument.partition("=")
            if expect or (name in ("--config", "-c") and equals):
                text = argument if expect else value
                path = find_config(text)
                check_config(path, known)
                self.config_names.append(text)
                found.append(path if expect else f"{name}={path}")
                expect = False
            else:
                found.append(argument)
                expect = argument in ("--config", "-c")
        return found

    def _compare_with_checkpoint(self) -> None:
        """Refuses by name what a checkpoint fixes; says what is different otherwise, and whether anything is left."""
        assert self.checkpoint is not None
        whole = leaves_of([action.dest for action in self._subcommand_parsers[self.verb]._actions])  # noqa: SLF001
        now, then = flat(self.settings, stop_at=whole), flat(stored_config(self.checkpoint), stop_at=whole)
        then.update(flat({"model": {"gpt": self.checkpoint["hyper_parameters"]["gpt"]}}))
        if now.get("model.gpt.vocab_size") == 0:
            then.pop("model.gpt.vocab_size", None)
        changes = refuse_what_is_fixed(now, then)
        if self.verb != "fit":
            return
        max_steps, steps = now["trainer.max_steps"], self.checkpoint["global_step"]
        assert self.checkpoint_path is not None
        finished = is_finished(self.checkpoint, self.checkpoint_path, max_steps)
        self.finished = finished and not now["trainer.fast_dev_run"]
        if self.finished:
            command = f"gptlit fit --ckpt_path {shlex.quote(str(self.checkpoint_path))}"
            self._say(
                f"this run has made {steps:,} steps and trainer.max_steps is {max_steps:,}: nothing is left to do"
            )
            self._say(f"to train on: {command} --trainer.max_steps {2 * steps}")
            return
        self.changes = {key: change for key, change in changes.items() if key not in OF_ONE_START}

    # ---------------------------------------------------------------- building

    def _set_seed(self) -> None:
        """Nothing draws from the global generator: weights, batches and dropout are seeded where they are drawn."""

    def instantiate_classes(self) -> None:  # noqa: C901
        """Builds data and model, checks the text, claims the run folder, and only then makes the Trainer."""
        if self.finished:
            return
        assert self.subcommand is not None
        fit = self.subcommand == "fit"
        config = self.config[self.subcommand]
        check_trainer_settings(self.settings, fit)
        if self.checkpoint is not None:
            config.model.tokenizer = self.checkpoint["hyper_parameters"]["tokenizer"]
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
        except ValueError as error:
            missing = cause_of(error, ModuleNotFoundError)
            if missing is None or isinstance(error, UserError):
                raise
            raise UserError(f"the settings name something that is not installed: {missing}") from error
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        borrowed = self.settings["model"]["init_from"] is not None
        if borrowed:
            # What the run starts from is in its checkpoints from the first on.
            self.settings["model"] |= {"gpt": dataclasses.asdict(self.model.gpt), "init_from": None}
            self.datamodule.block_size = self.model.gpt.block_size
        self.datamodule.tokenizer = self.model.tokenizer
        try:
            self.datamodule.prepare_data()
        except UserError as error:  # a message of the tokenizer does not know where the text came from
            if self.checkpoint is None:
                raise
            place = "" if "data." in str(error) else "data.corpus: "
            if not place and option(self.arguments, "--data.corpus") is None:
                raise UserError(f"{error} (the name is the checkpoint's: give --data.corpus another)") from error
            raise UserError(f"{place}{error}") from error
        if fit and self.checkpoint is not None:
            refuse_another_text(self.checkpoint, self.datamodule)
        self.datamodule.setup(self.subcommand)
        if not borrowed:  # else the borrowed table is cut to the tokenizer
            check_vocabulary(self.model.gpt, self.datamodule.tokenizer.vocab_size)
        if self.datamodule.corpus.notice:
            self._say(self.datamodule.corpus.notice, style="bold red")
        self.model.run_config = as_yaml({key: value for key, value in self.settings.items() if key != "ckpt_path"})
        trainer_config = self._get(self.config_init, "trainer")
        if fit and not trainer_config.fast_dev_run:
            self._open_run_dir(config.run_dir)
        try:
            self.trainer = self.instantiate_trainer(**self._trainer_settings(trainer_config))
            if fit:
                check_devices(self.trainer, self.datamodule.batch_size, self.model.optimizer_config.name)
        except (MisconfigurationException, ModuleNotFoundError, ValueError, TypeError, RuntimeError) as error:
            self._close_run_dir(keep=False)
            if isinstance(error, UserError):
                raise
            raise UserError(f"the Trainer does not take these trainer settings: {error}") from error
        except BaseException:
            self._close_run_dir(keep=False)
            raise
        if self.checkpoint is not None:  # Lightning reads the file anew; let go of it, it will be replaced
            for part in ("state_dict", "optimizer_states"):
                self.checkpoint.pop(part, None)

    def _open_run_dir(self, wanted: str | None) -> None:
        """The folder of the run that goes on, or a new one."""
        path = self.checkpoint_path
        home = None if path is None or self.checkpoint is None else home_of(path, self.checkpoint["global_step"])
        if wanted and home is not None and Path(wanted).resolve() != home.resolve():
            home = None
        if home is not None:
            self.folder = RunDir.reopen(home)
        elif path is None:
            stem = Path(self.config_names[-1]).with_suffix("").name if self.config_names else "run"
            self.folder = RunDir.make(wanted, stem)
        else:
            in_a_run = (path.parent / "config.yaml").is_file()
            self.folder = RunDir.make(wanted or (str(path.parent) if in_a_run else None), path.stem)
            self._say(f"{path.parent} stays as it is: the run goes on in {self.folder.path}", style="yellow")
        self.run_dir = self.folder.path

    def _close_run_dir(self, keep: bool) -> None:
        if self.folder is not None:
            if not keep:
                self.folder.give_back()
            self.folder.close()

    def _trainer_settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the Trainer must be told beyond the user's settings."""
        interval = config["val_check_interval"]
        if isinstance(interval, float) and self.verb == "fit":
            interval = max(1, int(config["max_steps"] * interval))
        if isinstance(interval, int):  # Lightning counts micro-batches; the user counts optimizer steps
            interval *= config["accumulate_grad_batches"]
        settings: dict[str, Any] = {
            "use_distributed_sampler": False,  # the batches know their rank
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,  # the interval counts steps of the one epoch
            "val_check_interval": interval,
            "plugins": [*as_list(config["plugins"]), AtomicCheckpointIO()],
            "enable_model_summary": False,
            "default_root_dir": str(self.run_dir or "."),
            "logger": False,
            "profiler": config["profiler"] or NoProfiler(),
        }
        if self.subcommand != "fit":
            return settings | {"callbacks": [*as_list(config["callbacks"])], "enable_progress_bar": False}
        parts = run_parts(config, self.config_init["fit"], self.run_dir, self._steps_done())
        self.curves, self.signals, self.checkpoints = parts.curves, parts.signals, parts.checkpoints
        return settings | parts.settings()

    def _steps_done(self) -> int | None:
        return None if self.checkpoint is None else self.checkpoint["global_step"]

    # ---------------------------------------------------------------- running

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.finished:
            super()._run_subcommand(subcommand)

    def fit(self, model: LitGPT, datamodule: TextDataModule, ckpt_path: str | None = None) -> None:
        """Trains; whatever ends it, the last lines say what happened and how to go on, and the exit code is true."""
        try:
            self._say_start()
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
            self._say_end()
            received = self.signals.received
            if received is not None and not started_by_first_process():  # too late for this run, not for what follows
                self.exit_code = 128 + received
        except BaseException as error:
            ending = ending_of(error, self.signals.received, self.trainer.global_step, self.run_dir)
            self._end_other_processes(ending)
            if ending is None:
                if self.trainer.global_step and not isinstance(error, UserError):
                    self._say_how_to_go_on()
                raise
            self._say_ending(ending)
        finally:
            self._close_run_dir(keep=self.trainer.global_step > 0)

    def _end_other_processes(self, ending: Ending | None) -> None:
        """Processes that this one started would wait for it for ever, unless they end by themselves."""
        launcher: Any = self.trainer.strategy.launcher
        if launcher is not None and not (ending is not None and ending.collective):
            launcher.kill(signal.SIGKILL)

    def validate(self, model: LitGPT, datamodule: TextDataModule, ckpt_path: str | None = None) -> None:
        """Prints the exact metrics on stdout, one a line."""
        self._evaluate(self.trainer.validate, model, datamodule, ckpt_path)

    def test(self, model: LitGPT, datamodule: TextDataModule, ckpt_path: str | None = None) -> None:
        """As validate."""
        self._evaluate(self.trainer.test, model, datamodule, ckpt_path)

    def _evaluate(self, run: Any, model: LitGPT, datamodule: TextDataModule, ckpt_path: str | None) -> None:
        found = run(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
        if not found:
            limit = "val" if self.verb == "validate" else "test"
            raise UserError(f"trainer.limit_{limit}_batches is 0: nothing is left to {self.verb} on")
        metrics = found[0]
        if process_rank() == 0:
            for name, value in metrics.items():
                print(f"{name} {value:.6f}")

    # ---------------------------------------------------------------- saying

    def _say(self, text: str, style: str | None = None) -> None:
        """A line on stderr, once for all processes."""
        if process_rank() == 0:
            say(text, style=style)

    def _say_start(self) -> None:
        data, trainer = self.datamodule, self.trainer
        self._say(f"gptlit {__version__} · {data.corpus.source} · {data.tokenizer.vocab_size} symbols")
        self._say(opening_line(self.model, data, trainer))
        if self.checkpoint is not None:
            self._say(f"goes on after step {self.checkpoint['global_step']:,} of {self.checkpoint_path}")
        for key, (old, new) in self.changes.items():
            self._say(f"changed: {key} {old} -> {new}", style="yellow")
        if self.run_dir is not None:
            self._say(f"run folder {self.run_dir}")
            if command := tensorboard_command(trainer, self.run_dir):
                self._say(f"curves: {command}")

    def _say_ending(self, ending: Ending) -> None:
        self.ending = ending
        # Where all processes end by themselves, the first one answers; Lightning would kill it for a failure elsewhere.
        self.exit_code = 0 if ending.collective and started_by_first_process() else ending.exit_code
        self._say(f"gptlit: {ending.line}", style="yellow")
        problem = None if self.checkpoints is None else self.checkpoints.problem
        if problem is not None and ending.collective:
            self._say(f"gptlit: last.ckpt could not be written: {problem}", style="yellow")
        self._say_how_to_go_on()

    def _say_how_to_go_on(self) -> None:
        if self.checkpoints is not None:
            self._say(way_on(self.run_dir, self.model, slower=self.ending is not None and self.ending.slower))

    def _say_end(self) -> None:
        if process_rank() != 0:
            return
        rows = closing_rows(self.trainer, self.curves, self.checkpoints, self.run_dir)
        done, wanted = self.trainer.global_step, self.trainer.max_steps
        if done >= wanted:
            table("done", rows)
        else:  # trainer.max_time, or a callback such as EarlyStopping
            table(f"stopped after step {done:,} of {wanted:,}: time was up, or a callback asked for it", rows)
            self._say_how_to_go_on()
