"""TensorBoard beyond the curves: config, comparison of runs, layout of charts, histograms, embedding by character."""

import math
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from gptlit.callbacks.projector import write_projector
from gptlit.callbacks.samples import as_markdown
from gptlit.training.lightning_internals import datamodule_of

HISTOGRAM_TIMES = 10  # at most so many validations of a run, and its last step
HISTOGRAM_BINS = 60
HISTOGRAM_VALUES = 2**18  # at most so many values of one tensor, evenly spread
SAMPLES_SHOWN = 10  # texts and pictures of a run that TensorBoard keeps unless it is told otherwise
SMALLEST_UPDATE = 1e-10  # a weight that did not move at all is shown here

# One chart for the lesson: where val leaves train, the model begins to learn by heart. Tags are regular expressions.
LAYOUT = {
    "learning": {
        "loss: train and val (nats per token)": ["Multiline", [r"train/loss$", r"train/loss_estimate$", r"val/loss$"]],
        "loss estimates: random batches of either part": ["Multiline", [r"(train|val)/loss_estimate$"]],
        "bits per character": ["Multiline", [r"val/bpc$"]],
    },
    "optimization": {
        "learning rate by role": ["Multiline", [r"lr/.*"]],
        "gradient norm, before clipping": ["Multiline", [r"train/grad_norm$"]],
    },
}
COMPARED = {  # columns of the HPARAMS tab: tag -> title
    "val/best_loss": "best val loss",
    "val/loss": "last val loss",
    "val/bpc": "bits per character",
    "train/loss": "last train loss",
    "perf/characters_per_second": "characters per second",
}
# TensorBoard ticks five hyper-parameters at first, those that "differ" before the others.
TICKED = ("data.batch_size", "gpt.n_embd", "gpt.n_layer", "optimizer.lr", "trainer.max_steps")


class TensorBoardPages(pl.Callback):
    """Fills TensorBoard's tabs beside the curves; does nothing without a TensorBoardLogger, or off the first process.

    - TEXT: the configuration of the run.
    - CUSTOM SCALARS: train and val on one chart.
    - HPARAMS: one row a run, with its best and its last validation loss.
    - HISTOGRAMS, DISTRIBUTIONS: weights, and log10(|change of a weight in the last step| / RMS of the weights), which
      is about -3 in a healthy run (A. Karpathy, "makemore" part 3); at up to ten validations of the run.
    - PROJECTOR: the token embedding, labelled by character; before the first step and when training ends. A
      TensorBoard that runs already shows the new one after a restart.

    Other loggers, such as Weights & Biases, get the hyper-parameters.
    """

    def __init__(self) -> None:
        self.best_val_loss: float | None = None
        self._writers: list[Any] = []
        self._histogram_steps: frozenset[int] = frozenset()
        self._before: dict[str, Tensor] = {}  # weights before the step whose update is shown

    def state_dict(self) -> dict[str, Any]:
        """The best loss so far."""
        return {"best_val_loss": self.best_val_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.best_val_loss = state_dict["best_val_loss"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Everything that is known before the first step."""
        if not trainer.is_global_zero:
            return
        hyperparameters = describe(trainer, pl_module)
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams({name: value for name, value in hyperparameters.items() if value is not None})
        self._writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for writer in self._writers:
            writer.add_text("config", as_markdown(config_text(pl_module, hyperparameters)), trainer.global_step)
            writer.add_custom_scalars(LAYOUT)
            for summary in hparams_summaries(hyperparameters):
                writer.file_writer.add_summary(summary)
        if self._writers and has_whole_weights(trainer):
            self._histogram_steps = histogram_steps(trainer)
        self._project(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Keeps the weights when the step that comes is one whose update is shown."""
        if trainer.global_step + 1 in self._histogram_steps:
            self._before = {name: some_values(weight).clone() for name, weight in named_weights(pl_module)}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Best loss, and histograms when their turn has come."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self._writers:
            return
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None:
            self.best_val_loss = float(loss) if self.best_val_loss is None else min(self.best_val_loss, float(loss))
            for writer in self._writers:
                writer.add_scalar("val/best_loss", self.best_val_loss, trainer.global_step)
        if trainer.global_step in self._histogram_steps:
            self._histograms(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The embedding as learned; the row of the run counts as complete."""
        self._project(trainer, pl_module)
        for writer in self._writers:
            writer.file_writer.add_summary(hparams_end_summary())

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """The embedding as far as learned; whatever goes wrong here must not hide the exception."""
        with suppress(OSError, RuntimeError):
            self._project(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Lets go of the files, which Lightning closes."""
        self._writers, self._histogram_steps, self._before = [], frozenset(), {}

    def _histograms(self, trainer: pl.Trainer, module: Any) -> None:
        before, self._before = self._before, {}
        for name, weight in named_weights(module):
            values = some_values(weight)
            distributions = {f"weights/{name}": values}
            if name in before and (size := rms(before[name])) > 0:
                update = (values - before[name]).abs() / size
                distributions[f"updates_log10/{name}"] = update.clamp(min=SMALLEST_UPDATE).log10()
            for writer in self._writers:
                for tag, distribution in distributions.items():
                    add_histogram(writer, tag, distribution, trainer.global_step)

    def _project(self, trainer: pl.Trainer, module: Any) -> None:
        for writer in self._writers:
            if has_whole_weights(trainer) and "://" not in writer.log_dir:
                table = module.network.transformer["wte"].weight
                write_projector(Path(writer.log_dir), table, module.tokenizer, trainer.global_step)


class EventFiles(TensorBoardLogger):
    """The TensorBoard files of a run, straight in its folder, without Lightning's hparams.yaml beside its config.yaml.

    Args:
        run_dir: folder of the run.
        resume_step: optimizer steps of the checkpoint that the run goes on from; what was logged behind it is hidden.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        resumed: dict[str, Any] = {} if resume_step is None else {"purge_step": resume_step + 1}
        super().__init__(str(run_dir), name="", version="", default_hp_metric=False, **resumed)

    @rank_zero_only
    def save(self) -> None:
        """Writes what waits in memory."""
        self.experiment.flush()


def tensorboard_command(trainer: pl.Trainer, run_dir: Path) -> str | None:
    """What to type to see the run, beside the other runs when it lies in a folder of runs; None without TensorBoard."""
    if not any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        return None
    parent = run_dir.absolute().parent
    others = [path for path in parent.iterdir() if path.is_dir() and path.name != run_dir.name]
    among_runs = parent.name == "checkpoints" or all((path / "config.yaml").is_file() for path in others)
    program = ["tensorboard"] if shutil.which("tensorboard") else [sys.executable, "-m", "tensorboard.main"]
    command = [*program, "--logdir", str(run_dir.parent if among_runs else run_dir)]
    interval = trainer.val_check_interval
    if isinstance(interval, int) and trainer.max_steps * trainer.accumulate_grad_batches > SAMPLES_SHOWN * interval:
        command += ["--samples_per_plugin", "text=1000,images=1000"]
    return shlex.join(command)


# ---------------------------------------------------------------- text and comparison


def describe(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    """The hyper-parameters that runs are compared by, named as their flags are; the same names in every run."""
    data = datamodule_of(trainer)
    described = {
        f"{part}.{name}": value
        for part in ("gpt", "optimizer", "schedule")
        for name, value in module.hparams[part].items()
    }
    described |= {
        "parameters": sum(p.numel() for p in module.network.parameters()),
        "seed_everything": module.hparams["seed"],
        "data.corpus": getattr(data, "corpus_spec", None),
        "data.tokenizer": getattr(data, "tokenizer_kind", None),
        "data.batch_size": getattr(data, "batch_size", None),
        "trainer.max_steps": trainer.max_steps,
        "trainer.precision": trainer.precision,
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
        "trainer.devices": trainer.world_size,
    }
    return {name: str(value) if isinstance(value, list | bool) else value for name, value in described.items()}


def config_text(module: Any, hyperparameters: Mapping[str, Any]) -> str:
    """YAML of the whole run, or of what is known when the run was not started by the command."""
    return module.run_config or yaml.safe_dump(dict(hyperparameters), sort_keys=False, allow_unicode=True)


def hparams_summaries(hyperparameters: Mapping[str, Any]) -> list[Any]:
    """What the HPARAMS tab reads: which columns there are, and this run's values.

    The metrics are the run's own curves, so that the row is up to date at every moment. SummaryWriter.add_hparams
    would make a second run in a sub-folder instead.
    """
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    columns = []
    for name, value in hyperparameters.items():
        text = isinstance(value, str)
        kind = api_pb2.DATA_TYPE_STRING if text else api_pb2.DATA_TYPE_FLOAT64
        columns.append(api_pb2.HParamInfo(name=name, type=kind, differs=name in TICKED))
        if text:
            start.hparams[name].string_value = value
        elif value is not None:
            start.hparams[name].number_value = value
    metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=title) for tag, title in COMPARED.items()
    ]
    experiment = api_pb2.Experiment(hparam_infos=columns, metric_infos=metrics)
    return [
        hparams_summary("EXPERIMENT_TAG", experiment=experiment),
        hparams_summary("SESSION_START_INFO_TAG", session_start_info=start),
    ]


def hparams_end_summary() -> Any:
    """Marks the row of a run as complete."""
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return hparams_summary("SESSION_END_INFO_TAG", session_end_info=end)


def hparams_summary(tag: str, **data: Any) -> Any:
    """One message for the HPARAMS tab; `tag` names a constant of its plugin."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**data))
    return Summary(value=[Summary.Value(tag=getattr(metadata, tag), metadata=about, tensor=metadata.NULL_TENSOR)])


# ---------------------------------------------------------------- histograms


def histogram_steps(trainer: pl.Trainer) -> frozenset[int]:
    """The steps of at most ten validations, evenly spread, and the last step; a function of the settings alone."""
    if not trainer.enable_validation:
        return frozenset()
    interval = trainer.val_check_batch
    due = {trainer.max_steps}
    if isinstance(interval, int):
        every = max(1, interval // trainer.accumulate_grad_batches)
        every *= -(-(trainer.max_steps // every) // HISTOGRAM_TIMES) or 1
        due.update(range(every, trainer.max_steps, every))
    return frozenset(due)


def has_whole_weights(trainer: pl.Trainer) -> bool:
    """Whether the first process holds every weight whole, and not a shard of it."""
    return isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)


def named_weights(module: Any) -> list[tuple[str, Tensor]]:
    """Matrices and tables of the network, by short names such as `h.0.attn.c_attn`."""
    return [
        (name.removeprefix("transformer.").removesuffix(".weight"), weight.detach())
        for name, weight in module.network.named_parameters()
        if weight.dim() > 1
    ]


def some_values(weight: Tensor) -> Tensor:
    """At most HISTOGRAM_VALUES of the values, evenly spread, float32 (n,)."""
    values = weight.detach().flatten()
    return values[:: -(-len(values) // HISTOGRAM_VALUES)].float()


def rms(values: Tensor) -> float:
    """Root mean square."""
    return values.square().mean().sqrt().item()


def add_histogram(writer: Any, tag: str, values: Tensor, step: int) -> None:
    """Counts on the device where the values lie; SummaryWriter.add_histogram sorts all of them on the CPU.

    By torch.bincount: on a GPU, torch.histc is refused under torch.use_deterministic_algorithms.
    """
    low, high, total, squares = torch.stack([values.min(), values.max(), values.sum(), values.square().sum()]).tolist()
    if not 0 < high - low < math.inf:  # all the same, or not all of them numbers
        return
    edges = torch.linspace(low, high, HISTOGRAM_BINS + 1)[1:].tolist()
    bins = ((values - low) * (HISTOGRAM_BINS / (high - low))).long().clamp_(max=HISTOGRAM_BINS - 1)
    counts = torch.bincount(bins, minlength=HISTOGRAM_BINS).tolist()
    writer.add_histogram_raw(tag, low, high, len(values), total, squares, edges, counts, step)
