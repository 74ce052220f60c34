"""`gptlit fit`, `validate` and `test`: the LightningCLI, with run folders, trusted checkpoints and one-line errors."""

import math
import os
import shlex
import signal
import sys
from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gptlit import __version__
from gptlit.callbacks.bar import RunBar
from gptlit.callbacks.checkpoints import AtomicCheckpointIO, RunCheckpoints, ValidateAtEnd
from gptlit.callbacks.curves import Curves, MetricsFile
from gptlit.callbacks.samples import SampleText
from gptlit.callbacks.signals import StopBetweenSteps
from gptlit.callbacks.tensorboard import EventFiles, TensorBoardPages, tensorboard_command
from gptlit.cli.messages import duration, parser_error_line, say, table
from gptlit.cli.runs import claim_run_dir, find_checkpoint, find_config, read_checkpoint, stored_config
from gptlit.data import TextDataModule
from gptlit.errors import UserError
from gptlit.module import LitGPT

FIXED_BY_CHECKPOINT = ("model.gpt", "model.optimizer.name", "data.tokenizer", "data.corpus", "data.val_corpus")


def train(verb: str, arguments: list[str]) -> int:
    """Runs fit, validate or test; returns the exit code."""
    return GptlitCLI(verb, arguments).exit_code


class GptlitCLI(LightningCLI):
    """LightningCLI for one verb: only its parser is built, since each costs a second."""

    def __init__(self, verb: str, arguments: list[str]) -> None:
        self.verb = verb
        self.arguments = arguments
        self.config_names: list[str] = []
        self.checkpoint: dict[str, Any] | None = None
        self.checkpoint_path: Path | None = None
        self.run_dir: Path | None = None
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Packaged configs by name; the configuration of a checkpoint under everything that is given here."""
        arguments = self._find_configs(self.arguments)
        given = option(arguments, "--ckpt_path")
        before: list[str] = []
        if given:
            self.checkpoint_path = find_checkpoint(given, "last" if self.verb == "fit" else "best")
            self.checkpoint = read_checkpoint(self.checkpoint_path)
            before = ["--config", yaml.safe_dump(self._config_under_flags(stored_config(self.checkpoint)))]
            arguments = without_option(arguments, "--ckpt_path")
            arguments += ["--ckpt_path", str(self.checkpoint_path)]
        elif self.verb != "fit":
            raise UserError(f"gptlit {self.verb} needs --ckpt_path: a run folder or a checkpoint file")
        try:
            self.config = parser.parse_args([self.verb, *before, *arguments])
        except (ArgumentError, TypeError, ValueError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            known = [action.dest for action in self._subcommand_parsers[self.verb]._actions]
            raise UserError(parser_error_line(error, known)) from error
        if self.checkpoint is not None:
            self._compare_with_checkpoint()

    def _parse_ckpt_path(self) -> None:
        """Lightning would put the checkpoint's settings over the flags; here they already lie under them."""

    def _find_configs(self, arguments: list[str]) -> list[str]:
        found: list[str] = []
        expect = False
        for argument in arguments:
            name, equals, value = argument.partition("=")
            if expect or (name in ("--config", "-c") and equals):
                text = argument if expect else value
                path = find_config(text)
                self.config_names.append(text)
                found.append(path if expect else f"{name}={path}")
                expect = False
            else:
                found.append(argument)
                expect = argument in ("--config", "-c")
        return found

    def _config_under_flags(self, stored: dict[str, Any]) -> dict[str, Any]:
        """What of a stored configuration belongs to this verb."""
        if self.verb == "fit":
            stored.pop("run_dir", None)
            return stored
        kept = {key: stored[key] for key in ("seed_everything", "model", "data") if key in stored}
        precision = stored.get("trainer", {}).get("precision")
        return {**kept, "trainer": {"precision": precision}} if precision else kept

    def _compare_with_checkpoint(self) -> None:
        """Refuses by name what a checkpoint fixes; says what is different otherwise."""
        assert self.checkpoint is not None
        now = flat(yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.verb])
        then = flat(stored_config(self.checkpoint))
        then.update(flat({"model": {"gpt": self.checkpoint["hyper_parameters"]["gpt"]}}))
        if now.get("model.gpt.vocab_size") == 0:
            then.pop("model.gpt.vocab_size", None)
        changes = {key: (then[key], now[key]) for key in then.keys() & now.keys() if then[key] != now[key]}
        for key in sorted(changes):
            fixed = key.startswith(FIXED_BY_CHECKPOINT) and not (self.verb != "fit" and key.startswith("data."))
            if fixed and key != "model.gpt.dropout":
                raise UserError(
                    f"{key} is {changes[key][1]!r}, but the checkpoint was trained with {changes[key][0]!r}: "
                    "drop the flag to go on with it, or start a new run without --ckpt_path"
                )
        if self.verb == "fit" and rank_zero_only.rank == 0:
            for key, (old, new) in sorted(changes.items()):
                if key not in ("ckpt_path", "run_dir"):
                    say(f"changed: {key} {old} -> {new}", style="yellow")

    # ---------------------------------------------------------------- building

    def _set_seed(self) -> None:
        """Nothing draws from the global generator: weights, batches and dropout are seeded where they are drawn."""

    def instantiate_classes(self) -> None:
        """Builds data and model, checks the text, claims the run folder, and only then makes the Trainer."""
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        self.model_config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.subcommand]
        if self.checkpoint is not None:
            config.model.tokenizer = self.checkpoint["hyper_parameters"]["tokenizer"]
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self.datamodule.tokenizer = self.model.tokenizer
        self.datamodule.prepare_data()
        self.datamodule.setup(self.subcommand)
        if self.datamodule.corpus.notice and rank_zero_only.rank == 0:
            say(self.datamodule.corpus.notice, style="bold red")
        self.model.run_config = yaml.safe_dump(self.model_config, sort_keys=False, allow_unicode=True)
        trainer_config = self._get(self.config_init, "trainer")
        if self.subcommand == "fit" and not trainer_config.fast_dev_run:
            if self.checkpoint_path is not None:
                self.run_dir = self.checkpoint_path.parent
            else:
                self.run_dir = claim_run_dir(config.run_dir, self.config_names)
        try:
            self.trainer = self.instantiate_trainer(**self._trainer_settings(trainer_config))
        except Exception:
            self._give_back_run_dir()
            raise

    def _trainer_settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the Trainer must be told beyond the user's settings."""
        interval = config["val_check_interval"]
        settings: dict[str, Any] = {
            "use_distributed_sampler": False,  # the batches know their rank
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,  # the interval counts steps of the one epoch
            # Lightning counts micro-batches; the user counts optimizer steps.
            "val_check_interval": interval * config["accumulate_grad_batches"]
            if isinstance(interval, int)
            else interval,
            "plugins": [*as_list(config["plugins"]), AtomicCheckpointIO()],
            "enable_model_summary": False,
            "default_root_dir": str(self.run_dir or "."),
            "logger": False,
        }
        if self.subcommand != "fit":
            return settings | {"callbacks": [*as_list(config["callbacks"])], "enable_progress_bar": False}
        self.curves = Curves()
        self.signals = StopBetweenSteps()
        callbacks: list[pl.Callback] = [self.curves, ValidateAtEnd(), self.signals, TensorBoardPages()]
        if config["enable_progress_bar"] is not False:
            callbacks.append(RunBar(self.curves))
        self.checkpoints: RunCheckpoints | None = None
        if self.run_dir is not None:
            arguments = self.config_init["fit"]["sample_text"]
            callbacks.append(SampleText(run_dir=self.run_dir, **vars(arguments)))
            if config["enable_checkpointing"] is not False:
                self.checkpoints = RunCheckpoints(self.run_dir, self.config_init["fit"]["save_every_n_steps"])
                callbacks.append(self.checkpoints)
            if config["logger"] in (None, True):
                settings["logger"] = self._loggers()
            elif config["logger"]:
                settings["logger"] = config["logger"]
        settings["enable_checkpointing"] = self.checkpoints is not None
        return settings | {"callbacks": [*callbacks, *as_list(config["callbacks"])]}

    def _loggers(self) -> list[Any]:
        """TensorBoard and CSV, straight into the run folder."""
        assert self.run_dir is not None
        done = None if self.checkpoint is None else self.checkpoint["global_step"]
        return [EventFiles(self.run_dir, done), MetricsFile(self.run_dir, done)]

    # ---------------------------------------------------------------- running

    def fit(self, model: LitGPT, datamodule: TextDataModule, ckpt_path: str | None = None) -> None:
        """Trains; whatever ends it, the last line says how to go on."""
        try:
            if self.run_dir is not None and rank_zero_only.rank == 0:
                (self.run_dir / "config.yaml").write_text(model.run_config or "", encoding="utf-8")
            self._say_start()
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        except SIGTERMException:
            pass
        except SystemExit:
            if self.signals.received is None:
                raise
        except BaseException as error:
            if self.checkpoints is None or not self.checkpoints.last_path.is_file():
                self._give_back_run_dir()
            elif not isinstance(error, UserError):
                self._say_how_to_go_on()
            raise
        if self.signals.received is not None:
            say(f"stopped by {self.signals.received.name} after step {self.trainer.global_step}", style="yellow")
            self._say_how_to_go_on()
            self.exit_code = 128 + int(self.signals.received)
        elif rank_zero_only.rank == 0:
            self._say_end()

    def validate(self, model: LitGPT, datamodule: TextDataModule, ckpt_path: str | None = None) -> None:
        """Prints the exact metrics on stdout, one a line."""
        self._evaluate(self.trainer.validate, model, datamodule, ckpt_path)

    def test(self, model: LitGPT, datamodule: TextDataModule, ckpt_path: str | None = None) -> None:
        """As validate."""
        self._evaluate(self.trainer.test, model, datamodule, ckpt_path)

    def _evaluate(self, run: Any, model: LitGPT, datamodule: TextDataModule, ckpt_path: str | None) -> None:
        metrics = run(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)[0]
        if rank_zero_only.rank == 0:
            for name, value in metrics.items():
                print(f"{name} {value:.6f}")

    def _give_back_run_dir(self) -> None:
        """Removes a folder that this process made and nothing was saved in."""
        if self.run_dir is None or self.checkpoint_path is not None or rank_zero_only.rank != 0:
            return
        if any(self.run_dir.glob("*.ckpt")):
            return
        for path in sorted(self.run_dir.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        self.run_dir.rmdir()

    # ---------------------------------------------------------------- saying

    def _say_start(self) -> None:
        if rank_zero_only.rank != 0:
            return
        data, trainer = self.datamodule, self.trainer
        say(f"gptlit {__version__} · {data.corpus.source} · {data.tokenizer.vocab_size} symbols")
        say(batch_line(data.batch_size, data.block_size, trainer.accumulate_grad_batches, trainer.world_size))
        if self.run_dir is not None:
            say(f"run folder {self.run_dir}")
            if command := tensorboard_command(trainer, self.run_dir):
                say(f"curves: {command}")

    def _say_how_to_go_on(self) -> None:
        if self.checkpoints is not None and self.checkpoints.last_path.is_file() and rank_zero_only.rank == 0:
            say(f"go on with: gptlit fit --ckpt_path {shlex.quote(str(self.run_dir))}")

    def _say_end(self) -> None:
        rows: list[tuple[str, str]] = []
        metrics = self.trainer.callback_metrics
        if self.checkpoints is not None and self.checkpoints.best_score is not None:
            best = self.checkpoints.best_score
            bits = float(metrics["val/bpc"]) / float(metrics["val/loss"]) if "val/bpc" in metrics else 1 / math.log(2)
            rows.append(("best val loss", f"{best:.4f} nats per token, {best * bits:.4f} bits per character"))
            rows.append(("at step", f"{self.checkpoints.best_step:,} of {self.trainer.max_steps:,}"))
        seconds = self.curves.training_seconds
        characters = self.curves.steps_timed * self.datamodule.batch_size * self.datamodule.block_size
        characters *= self.datamodule.chars_per_train_token
        rows.append(("training time", f"{duration(seconds)} ({characters / max(seconds, 1e-9):,.0f} characters/s)"))
        if self.run_dir is not None:
            rows.append(("run folder", str(self.run_dir)))
            if self.checkpoints is not None:
                rows.append(("sample", f'gptlit predict --ckpt_path {self.run_dir} --prompt "ROMEO:"'))
            if command := tensorboard_command(self.trainer, self.run_dir):
                rows.append(("curves", command))
        table("done", rows)


def batch_line(batch_size: int, block_size: int, accumulate: int, devices: int) -> str:
    """Spells out what one optimizer step reads."""
    micro = batch_size // (accumulate * devices)
    return (
        f"{micro} sequences × {accumulate} accumulation × {devices} devices × {block_size} tokens "
        f"= {batch_size * block_size:,} tokens per step"
    )


def option(arguments: list[str], name: str) -> str | None:
    """The last value given for an option, as `--name value` or `--name=value`."""
    value = None
    for index, argument in enumerate(arguments):
        if argument == name and index + 1 < len(arguments):
            value = arguments[index + 1]
        elif argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
    return value


def without_option(arguments: list[str], name: str) -> list[str]:
    """The arguments without an option and its value."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == name:
            skip = True
        elif not argument.startswith(f"{name}="):
            kept.append(argument)
    return kept


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    if isinstance(tree, Namespace):
        tree = tree.as_dict()
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return leaves


def as_list(value: Any) -> list[Any]:
    """None as nothing, one thing as a list of it."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
