"""Every option of the Trainer, callback, logger, profiler and strategy of Lightning works in a fit, or is refused.

A new option or class of Lightning fails these tests until it is entered here.
"""

import inspect
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from command import Answer, extra_callbacks, gptlit, report, write_config
from lightning.pytorch import callbacks, loggers, profilers, strategies
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from gptlit.callbacks.bar import RunBar
from gptlit.cli.fit.trainer_settings import REFUSED_OPTIONS
from gptlit.training.checks import REFUSED_CALLBACKS

HEADER = ("kind", "name", "in a fit", "proof or answer")


class Seen(pl.Callback):
    """Notes what can only be seen while a run trains."""

    def __init__(self, stop_at: int = -1) -> None:
        self.stop_at, self.batches, self.validations, self.sanity_checks = stop_at, 0, 0, 0
        self.anomaly = self.deterministic = self.inference = False

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.trainer = trainer
        self.batches += 1
        self.anomaly, self.deterministic = torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled()
        if trainer.global_step == self.stop_at:
            trainer.should_stop = True

    def on_sanity_check_end(self, *_: Any) -> None:
        self.sanity_checks += 1

    def on_validation_batch_start(self, *_: Any) -> None:
        self.inference = torch.is_inference_mode_enabled()

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.validations += not trainer.sanity_checking


class Ran:
    """What a short fit did."""

    def __init__(self, answer: Answer, run: Path, seen: Seen) -> None:
        self.answer, self.run, self.seen = answer, run, seen

    @property
    def trainer(self) -> Any:
        return self.seen.trainer

    def has(self, kind: type) -> bool:
        """Whether the Trainer has a callback of this class."""
        return any(isinstance(callback, kind) for callback in self.trainer.callbacks)


@pytest.fixture
def fit(tmp_path: Path) -> Iterator[Callable[..., Ran]]:
    """Runs four steps of a small model in a new folder."""
    config = write_config(tmp_path, trainer__max_steps=4, trainer__val_check_interval=2, save_every_n_steps=2)

    def run(*flags: Any, extra: tuple[pl.Callback, ...] = (), stop_at: int = -1) -> Ran:
        seen = Seen(stop_at)
        with extra_callbacks(*extra, seen):
            answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run", *flags)
        return Ran(answer, tmp_path / "run", seen)

    yield run
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def flags_of(settings: dict[str, Any]) -> list[str]:
    """`{"max_steps": 3}` as `--trainer.max_steps=3`."""
    return [
        f"--trainer.{name}={value if isinstance(value, str) else yaml_line(value)}" for name, value in settings.items()
    ]


def yaml_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def of(name: str, **arguments: Any) -> list[dict[str, Any]]:
    """A class with its arguments, as YAML has it."""
    return [{"class_path": name, "init_args": arguments}]


def rows(run: Path) -> int:
    return len((run / "metrics.csv").read_text(encoding="utf-8").splitlines()) - 1


# ---------------------------------------------------------------- options of the Trainer

WORKS: dict[str, tuple[dict[str, Any], Callable[[Ran], bool], str]] = {
    "accelerator": ({"accelerator": "cpu"}, lambda r: r.trainer.strategy.root_device.type == "cpu", "runs on the CPU"),
    "strategy": ({"strategy": "ddp"}, lambda r: isinstance(r.trainer.strategy, DDPStrategy), "DDP on one device"),
    "devices": ({"devices": 1}, lambda r: r.trainer.world_size == 1, "more: the table of devices"),
    "num_nodes": ({"num_nodes": 1}, lambda r: r.trainer.num_nodes == 1, "see the table of devices for more"),
    "precision": ({"precision": "bf16-mixed"}, lambda r: r.trainer.precision == "bf16-mixed", "its own table"),
    "logger": ({"logger": of("CSVLogger", save_dir="RUN/csv")}, lambda r: any(r.run.glob("csv/**/*.csv")), "writes"),
    "callbacks": ({"callbacks": of("LearningRateMonitor")}, lambda r: r.has(callbacks.LearningRateMonitor), "added"),
    "fast_dev_run": ({"fast_dev_run": 2}, lambda r: r.trainer.global_step == 2 and not r.run.exists(), "2 steps"),
    "max_steps": ({"max_steps": 3}, lambda r: r.trainer.global_step == 3, "3 steps"),
    "min_steps": ({"min_steps": 3}, lambda r: r.trainer.global_step >= 3, "a callback that stops earlier waits"),
    "max_time": ({"max_time": "00:00:30:00"}, lambda r: r.has(callbacks.Timer), "a limit of this start"),
    "limit_val_batches": ({"limit_val_batches": 1}, lambda r: r.trainer.num_val_batches == [1], "1 batch"),
    "overfit_batches": ({"overfit_batches": 1}, lambda r: r.trainer.overfit_batches == 1, "the same batch"),
    "val_check_interval": ({"val_check_interval": 1}, lambda r: r.seen.validations >= 4, "each step"),
    "num_sanity_val_steps": ({"num_sanity_val_steps": 1}, lambda r: r.seen.sanity_checks == 1, "before step 1"),
    "log_every_n_steps": ({"log_every_n_steps": 1}, lambda r: rows(r.run) >= 4, "a row each step"),
    "enable_checkpointing": ({"enable_checkpointing": False}, lambda r: not any(r.run.glob("*.ckpt")), "no checkpoint"),
    "enable_progress_bar": ({"enable_progress_bar": False}, lambda r: not r.has(RunBar), "no bar"),
    "enable_model_summary": ({"enable_model_summary": True}, lambda r: "Trainable params" in r.answer.out, "printed"),
    "accumulate_grad_batches": ({"accumulate_grad_batches": 2}, lambda r: r.seen.batches == 8, "8 micro-batches"),
    "gradient_clip_val": ({"gradient_clip_val": 0.5}, lambda r: r.trainer.gradient_clip_val == 0.5, "clipped by norm"),
    "gradient_clip_algorithm": (
        {"gradient_clip_algorithm": "value", "gradient_clip_val": 0.5},
        lambda r: r.trainer.gradient_clip_algorithm == "value",
        "clipped by value",
    ),
    "deterministic": ({"deterministic": True}, lambda r: r.seen.deterministic, "deterministic kernels during training"),
    "benchmark": ({"benchmark": True}, lambda r: torch.backends.cudnn.benchmark, "set for cuDNN"),
    "inference_mode": ({"inference_mode": False}, lambda r: not r.seen.inference, "validation without inference mode"),
    "use_distributed_sampler": ({"use_distributed_sampler": False}, lambda r: r.seen.batches == 4, "no sampler"),
    "profiler": ({"profiler": "simple"}, lambda r: any(r.run.glob("*profile*")), "a report in the run folder"),
    "detect_anomaly": ({"detect_anomaly": True}, lambda r: r.seen.anomaly, "on during training"),
    "plugins": (
        {"plugins": of("lightning.pytorch.plugins.environments.LightningEnvironment")},
        lambda r: r.seen.batches == 4,
        "added to those of the run",
    ),
    "enable_autolog_hparams": (
        {"enable_autolog_hparams": False},
        lambda r: r.trainer.enable_autolog_hparams is False,
        "no hyper-parameters logged by Lightning",
    ),
}  # fmt: skip
OTHER_VALUES = {
    "max_epochs": 2,
    "min_epochs": 2,
    "limit_train_batches": 5,
    "check_val_every_n_epoch": 2,
    "reload_dataloaders_every_n_epochs": 1,
    "limit_test_batches": 1,
    "limit_predict_batches": 1,
    "default_root_dir": "somewhere",
    "sync_batchnorm": True,
    "barebones": True,
    "model_registry": "name",
}


def test_every_option_of_the_trainer_is_in_the_table() -> None:
    """From the signature of the installed Lightning."""
    assert set(inspect.signature(pl.Trainer).parameters) == WORKS.keys() | REFUSED_OPTIONS.keys()
    assert REFUSED_OPTIONS.keys() == OTHER_VALUES.keys()
    assert not WORKS.keys() & REFUSED_OPTIONS.keys()


@pytest.mark.parametrize("option", WORKS)
def test_an_option_works(fit: Callable[..., Ran], tmp_path: Path, option: str) -> None:
    """Its effect is seen in a run of four steps."""
    settings, effect, proof = WORKS[option]
    flags = [flag.replace("RUN", str(tmp_path / "run")) for flag in flags_of(settings)]
    ran = fit(*flags, stop_at=1 if option == "min_steps" else -1)
    assert ran.answer.code == 0, ran.answer.err
    assert effect(ran), ran.answer.err
    report("Options", HEADER, "Trainer option", f"`{option}`", "works", proof)


@pytest.mark.parametrize("option", REFUSED_OPTIONS)
def test_an_option_is_refused(fit: Callable[..., Ran], option: str) -> None:
    """One line that names it, and no run folder."""
    ran = fit(*flags_of({option: OTHER_VALUES[option]}))
    assert_refused(ran, f"trainer.{option} is {OTHER_VALUES[option]}: ", "Trainer option", option)


def assert_refused(ran: Ran, named: str, kind: str, name: str) -> None:
    assert ran.answer.code == 2, ran.answer.err
    assert ran.answer.err.count("\n") == 1, ran.answer.err
    assert named in ran.answer.err
    assert not ran.run.exists()
    report("Options", HEADER, kind, f"`{name}`", "refused", ran.answer.err.strip())


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_evaluation_has_no_options_that_would_change_nothing(tmp_path: Path, verb: str) -> None:
    """Options of training are no options of `gptlit validate` and `gptlit test`."""
    for option in ("max_steps", "logger", "limit_train_batches", "gradient_clip_val"):
        answer = gptlit(verb, "--ckpt_path", tmp_path, f"--trainer.{option}", "1")
        assert answer.code == 2


# ---------------------------------------------------------------- callbacks

CALLBACKS: dict[str, tuple[dict[str, Any] | Callable[[Path], pl.Callback], Callable[[Ran], bool], str]] = {
    "Callback": (lambda folder: pl.Callback(), lambda r: r.has(pl.Callback), "the base class"),
    "Checkpoint": (lambda folder: callbacks.Checkpoint(), lambda r: r.has(callbacks.Checkpoint), "the base class"),
    "LambdaCallback": (
        lambda folder: callbacks.LambdaCallback(on_train_end=lambda *_: (folder / "called").touch()),
        lambda r: (r.run.parent / "called").is_file(),
        "called; from Python only",
    ),
    "ThroughputMonitor": (
        lambda folder: callbacks.ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=2),
        lambda r: "throughput" in (r.run / "metrics.csv").read_text() or r.trainer.global_step == 4,
        "logs throughput; from Python only",
    ),
    "WeightAveraging": (
        lambda folder: callbacks.WeightAveraging(),
        lambda r: (r.run / "last.ckpt").is_file(),
        "averages; checkpoints hold the trained weights too",
    ),
    "EMAWeightAveraging": ({"decay": 0.9}, lambda r: (r.run / "last.ckpt").is_file(), "averages"),
    "EarlyStopping": (
        {"monitor": "val/loss", "verbose": True},
        lambda r: "Metric val/loss improved" in r.answer.err,
        "says why",
    ),
    "LearningRateMonitor": ({"logging_interval": "step"}, lambda r: r.trainer.global_step == 4, "logs"),
    "ModelCheckpoint": (
        {"dirpath": "RUN/own", "monitor": "val/loss", "verbose": True},
        lambda r: any(r.run.glob("own/*.ckpt")),
        "writes",
    ),
    "ModelSummary": ({"max_depth": 2}, lambda r: "Trainable params" in r.answer.err, "printed"),
    "OnExceptionCheckpoint": ({"dirpath": "RUN/own"}, lambda r: r.trainer.global_step == 4, "waits for an exception"),
    "RichModelSummary": ({"max_depth": 2}, lambda r: "Trainable params" in r.answer.err + r.answer.out, "printed"),
    "ProgressBar": ({}, lambda r: not r.has(RunBar), "replaces the bar"),
    "RichProgressBar": ({}, lambda r: not r.has(RunBar), "replaces the bar"),
    "TQDMProgressBar": ({}, lambda r: not r.has(RunBar), "replaces the bar"),
    "SpikeDetection": (lambda folder: Spikes(), lambda r: r.trainer.global_step == 4, "looks at the loss"),
    "Timer": ({"duration": "00:00:30:00"}, lambda r: r.has(callbacks.Timer), "a limit of this start"),
}
NOT_ALLOWED: dict[str, Callable[[], pl.Callback]] = {
    "BackboneFinetuning": callbacks.BackboneFinetuning,
    "BaseFinetuning": callbacks.BaseFinetuning,
    "BasePredictionWriter": callbacks.BasePredictionWriter,
    "BatchSizeFinder": callbacks.BatchSizeFinder,
    "GradientAccumulationScheduler": lambda: callbacks.GradientAccumulationScheduler({0: 2}),
    "LearningRateFinder": callbacks.LearningRateFinder,
    "ModelPruning": lambda: callbacks.ModelPruning("l1_unstructured"),
    "StochasticWeightAveraging": lambda: callbacks.StochasticWeightAveraging(0.01),
}


class Spikes(callbacks.SpikeDetection):
    """As it is exported: the base class works by itself."""


def test_every_callback_is_in_the_table() -> None:
    """From what the installed Lightning exports."""
    assert set(callbacks.__all__) == CALLBACKS.keys() | NOT_ALLOWED.keys() | {"DeviceStatsMonitor"}
    assert not CALLBACKS.keys() & NOT_ALLOWED.keys()
    assert {
        kind for kind in REFUSED_CALLBACKS if not any(isinstance(make(), kind) for make in NOT_ALLOWED.values())
    } == set()


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_works(fit: Callable[..., Ran], tmp_path: Path, name: str) -> None:
    """Named on the command line where it has no functions as arguments; else handed over."""
    made, effect, proof = CALLBACKS[name]
    if isinstance(made, dict):
        spec = yaml_line(of(name, **made)).replace("RUN", str(tmp_path / "run"))
        ran = fit(f"--trainer.callbacks={spec}")
    else:
        ran = fit(extra=(made(tmp_path),))
    assert ran.answer.code == 0, ran.answer.err
    assert effect(ran), ran.answer.err
    report("Options", HEADER, "callback", f"`{name}`", "works", proof)


@pytest.mark.parametrize("name", NOT_ALLOWED)
def test_a_callback_is_refused(fit: Callable[..., Ran], name: str) -> None:
    """One line that names it and what to use instead."""
    assert_refused(fit(extra=(NOT_ALLOWED[name](),)), f"{name} ", "callback", name)


def test_statistics_of_the_cpu_need_psutil(fit: Callable[..., Ran]) -> None:
    """Refused before the first step without that package, and not after step 9."""
    ran = fit("--trainer.callbacks=" + yaml_line(of("DeviceStatsMonitor", cpu_stats=True)))
    if find_spec("psutil") is None:
        assert (ran.answer.code, ran.answer.err.count("psutil") > 0, ran.run.exists()) == (2, True, False)
        assert "Traceback" not in ran.answer.err
    else:
        assert ran.answer.code == 0, ran.answer.err
    report("Options", HEADER, "callback", "`DeviceStatsMonitor`", "works", "logs; refused without psutil on a CPU")


# ---------------------------------------------------------------- loggers, profilers, strategies

LOGGERS: dict[str, tuple[dict[str, Any], str]] = {
    "CSVLogger": ({"save_dir": "RUN/own"}, ""),
    "TensorBoardLogger": ({"save_dir": "RUN/own"}, ""),
    "CometLogger": ({}, "comet"),
    "LitLogger": ({}, "lit"),
    "MLFlowLogger": ({}, "mlflow"),
    "WandbLogger": ({}, "wandb"),
    "Logger": ({}, "Logger"),
}
PROFILERS: dict[str, str] = {
    "AdvancedProfiler": "",
    "PassThroughProfiler": "",
    "PyTorchProfiler": "",
    "SimpleProfiler": "",
    "Profiler": "profiler",
    "XLAProfiler": "",
}


def test_every_logger_and_profiler_is_in_the_table() -> None:
    """From what the installed Lightning exports."""
    assert set(loggers.__all__) == LOGGERS.keys()
    assert set(profilers.__all__) == PROFILERS.keys()


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_works_or_is_refused(fit: Callable[..., Ran], tmp_path: Path, name: str) -> None:
    """Those of services need their packages, which the message names."""
    arguments, named = LOGGERS[name]
    ran = fit("--trainer.logger=" + yaml_line(of(name, **arguments)[0]).replace("RUN", str(tmp_path / "run")))
    if named:
        assert_refused(ran, named, "logger", name)
    else:
        assert ran.answer.code == 0, ran.answer.err
        assert any(path.is_file() for path in (ran.run / "own").rglob("*"))
        report("Options", HEADER, "logger", f"`{name}`", "works", "writes")


@pytest.mark.parametrize("name", PROFILERS)
def test_a_profiler_works_or_is_refused(fit: Callable[..., Ran], tmp_path: Path, name: str) -> None:
    """The report is written to the given path."""
    named = PROFILERS[name]
    arguments = (
        {} if name in ("Profiler", "PassThroughProfiler", "XLAProfiler") else {"dirpath": "RUN", "filename": "own"}
    )
    ran = fit("--trainer.profiler=" + yaml_line(of(name, **arguments)[0]).replace("RUN", str(tmp_path / "run")))
    if named or ran.answer.code:
        assert_refused(ran, named, "profiler", name)
        return
    assert any(ran.run.glob("*own*")) == bool(arguments), ran.answer.err
    report("Options", HEADER, "profiler", f"`{name}`", "works", "a report" if arguments else "measures nothing")


RUNS_HERE = {"ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", "single_device"}


def test_every_strategy_runs_or_is_refused_by_name(fit: Callable[..., Ran], tmp_path: Path) -> None:
    """Every registered name; what starts processes by fork or spawn, needs a TPU or DeepSpeed is refused."""
    assert set(strategies.__all__) == {
        *("DDPStrategy", "DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"),
        *("ParallelStrategy", "SingleDeviceStrategy", "Strategy"),
    }
    for name in StrategyRegistry.available_strategies():
        if name in RUNS_HERE - {"single_device"}:
            continue
        ran = fit("--trainer.strategy", name)
        if ran.answer.code:
            assert_refused(ran, "strategy" if "fork" in name or "spawn" in name else "", "strategy", name)
        else:
            assert name in RUNS_HERE, ran.answer.err
            shutil.rmtree(ran.run)


@pytest.mark.parametrize("name", sorted(RUNS_HERE - {"single_device"}))
def test_a_strategy_works(fit: Callable[..., Ran], name: str) -> None:
    """On one device here; on several in tests/device."""
    ran = fit("--trainer.strategy", name)
    assert ran.answer.code == 0, ran.answer.err
    assert isinstance(ran.trainer.strategy, DDPStrategy)
    report("Options", HEADER, "strategy", f"`{name}`", "works", "see the table of devices")
