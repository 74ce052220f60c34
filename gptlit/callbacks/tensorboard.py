"""TensorBoard pages: losses on one chart, configuration, comparison of runs, histograms."""

import math
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from gptlit.callbacks.samples import as_markdown
from gptlit.errors import shell_option
from gptlit.training.lightning_internals import datamodule_of
from gptlit.training.strategies import holds_whole_model

SHOWN_VALIDATIONS = 10  # histograms and pictures: at most so many validations of a run, and its last step
HISTOGRAM_BINS = 60
HISTOGRAM_VALUES = 2**18  # at most so many values of one tensor, evenly spread
SAMPLES_KEPT = 10  # texts and pictures of a run that TensorBoard keeps by default
SMALLEST_UPDATE = 1e-10  # a weight that did not change is shown here
ADDRESS = "http://localhost:6006/?smoothing=0"  # TensorBoard's default smoothing (0.6) falsifies a curve of ten points

# TensorBoard colours by run: losses of one name in two sub-runs are one chart with two colours and a legend.
LOSS_RUNS = {"train/loss": "train", "val/loss": "val"}
LAYOUT = {  # tags are regular expressions
    "learning": {
        "loss: train and val (nats per token)": ["Multiline", [r"loss$"]],
        "loss estimates: random batches of either part": ["Multiline", [r"(train|val)/loss_estimate$"]],
        "bits per character (bpc) and per byte (bpb)": ["Multiline", [r"val/bp[cb]$"]],
    },
    "optimization": {
        "learning rate by optimizer": ["Multiline", [r"lr/.*"]],
        "gradient norm, before clipping": ["Multiline", [r"train/grad_norm$"]],
    },
}
# Columns of the HPARAMS tab. TensorBoard ticks five hyper-parameters, those marked as different before all others.
RESULTS = ("val/best_loss", "val/loss", "val/bpc", "train/loss", "perf/characters_per_second")
FIRST_COLUMNS = ("data.corpus", "parameters", "optimizer.lr", "optimizer.muon_lr", "trainer.max_steps")


class TensorBoardPages(pl.Callback):
    """Fills TensorBoard's tabs next to the curves.

    Does nothing without a TensorBoardLogger and on ranks other than 0. Other loggers get the hyper-parameters.

    - TEXT: the configuration of the run.
    - CUSTOM SCALARS: charts by topic.
    - HPARAMS: one row a run, with its best and its latest validation loss.
    - HISTOGRAMS, DISTRIBUTIONS: weights, and log10(|change of a weight in the last step| / RMS of the weights), which
      is about -3 in a healthy run (A. Karpathy, "makemore" part 3); at up to ten validations of the run.
    """

    def __init__(self) -> None:
        self.best_val_loss: float | None = None
        self._writers: list[Any] = []
        self._histogram_steps: frozenset[int] = frozenset()
        self._before: dict[str, Tensor] = {}  # weights before a step, if its update is shown

    def state_dict(self) -> dict[str, Any]:
        return {"best_val_loss": self.best_val_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_val_loss = state_dict["best_val_loss"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write configuration, layout and hyper-parameters before the first step."""
        if not trainer.is_global_zero:
            return
        hyperparameters = describe(trainer, pl_module)
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(hyperparameters)
        self._writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for writer in self._writers:
            # `settings` comes after `sample` in the TEXT tab, which sorts by name.
            writer.add_text("settings", as_markdown(config_text(pl_module, hyperparameters)), trainer.global_step)
            writer.add_custom_scalars(LAYOUT)
            for summary in hparams_summaries(hyperparameters):
                writer.file_writer.add_summary(summary)
        if self._writers and holds_whole_model(trainer):
            self._histogram_steps = shown_steps(trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Copy the weights before a step if its update will be shown."""
        if trainer.global_step + 1 in self._histogram_steps:
            self._before = {name: some_values(weight).clone() for name, weight in named_weights(pl_module)}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
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
        """Mark the row of the run in HPARAMS as complete."""
        from torch.utils.tensorboard.summary import hparams

        for writer in self._writers:
            writer.file_writer.add_summary(hparams({}, {})[2])

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
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


class EventFiles(TensorBoardLogger):
    """TensorBoard's files of a run, in the run folder itself.

    `train/loss` and `val/loss` are also written as `loss` of the sub-runs `train` and `val`, which TensorBoard shows in
    one chart, and first.

    Args:
        run_dir: folder of the run.
        resume_step: optimizer steps of the checkpoint that the run is resumed from; what was logged after it is hidden.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        self._resumed: dict[str, Any] = {} if resume_step is None else {"purge_step": resume_step + 1}
        self._loss_writers: dict[str, Any] = {}
        super().__init__(str(run_dir), name="", version="", default_hp_metric=False, **self._resumed)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().log_metrics(dict(metrics), step)
        for tag in LOSS_RUNS.keys() & metrics.keys():
            name = LOSS_RUNS[tag]
            if name not in self._loss_writers:
                self._loss_writers[name] = SummaryWriter(str(Path(self.log_dir) / name), **self._resumed)
            self._loss_writers[name].add_scalar("loss", metrics[tag], step)

    @rank_zero_only
    def save(self) -> None:
        """Flush; without Lightning's hparams.yaml, since the run has a config.yaml."""
        for writer in (self.experiment, *self._loss_writers.values()):
            writer.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        for writer in self._loss_writers.values():
            writer.close()


def tensorboard_command(trainer: pl.Trainer, run_dir: Path) -> str | None:
    """Return the command that shows the run, or None without a TensorBoardLogger.

    It shows the other runs as well if the run is in a folder of runs. A logger of the user's may write elsewhere.
    """
    boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if not boards:
        return None
    folder = run_dir if isinstance(boards[0], EventFiles) else Path(boards[0].log_dir)
    if not folder.resolve().is_relative_to(run_dir.resolve()):
        run_dir, among_runs = folder, False
    else:
        parent = run_dir.absolute().parent
        others = [path for path in parent.iterdir() if path.is_dir() and path.name != run_dir.name]
        among_runs = parent.name == "checkpoints" or all((path / "config.yaml").is_file() for path in others)
    program = ["tensorboard"] if shutil.which("tensorboard") else [sys.executable, "-m", "tensorboard.main"]
    command = f"{shlex.join(program)} {shell_option('--logdir', run_dir.parent if among_runs else run_dir)}"
    interval = trainer.val_check_interval
    if isinstance(interval, int) and trainer.max_steps * trainer.accumulate_grad_batches > SAMPLES_KEPT * interval:
        command += " --samples_per_plugin text=1000,images=1000"
    return command


# ---------------------------------------------------------------- text and comparison


def describe(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    """Return the hyper-parameters that runs are compared by, named as their flags.

    A name has values of one type in all runs, since TensorBoard takes the types of all runs from the first one.
    """
    data = datamodule_of(trainer)
    described = {
        f"{part}.{name}": value
        for part in ("gpt", "optimizer", "schedule")
        for name, value in module.hparams[part].items()
    }
    described |= {
        "parameters": sum(p.numel() for p in module.network.parameters()),
        "seed_everything": module.hparams["seed"],
        "data.corpus": str(getattr(data, "corpus_spec", "unknown")),
        "data.tokenizer": str(getattr(data, "tokenizer_kind", "unknown")),
        "data.batch_size": getattr(data, "batch_size", 0),
        "trainer.max_steps": trainer.max_steps,
        "trainer.precision": str(trainer.precision),
        "trainer.gradient_clip_val": str(trainer.gradient_clip_val),
        "trainer.devices": trainer.world_size,
    }
    described["gpt.logit_softcap"] = str(described["gpt.logit_softcap"])  # a number or None
    return {name: str(value) if isinstance(value, list | tuple | bool) else value for name, value in described.items()}


def hparams_summaries(hyperparameters: Mapping[str, Any]) -> list[Any]:
    """Return the columns of the HPARAMS tab and this run's row; its results are the run's own curves."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    columns, values, _ = hparams(dict(hyperparameters), dict.fromkeys(RESULTS, 0.0))
    data = columns.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in FIRST_COLUMNS
    data.content = content.SerializeToString()
    return [columns, values]


def config_text(module: Any, hyperparameters: Mapping[str, Any]) -> str:
    """Return the configuration as YAML; for a run started from Python, the settings that are known."""
    return module.run_config or yaml.safe_dump(dict(hyperparameters), sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------- histograms


def shown_steps(trainer: pl.Trainer) -> frozenset[int]:
    """Return the steps of at most ten validations, evenly spread, and the last step."""
    if not trainer.enable_validation:
        return frozenset()
    interval = trainer.val_check_batch
    due = {trainer.max_steps}
    if isinstance(interval, int):
        every = max(1, interval // trainer.accumulate_grad_batches)
        every *= -(-(trainer.max_steps // every) // SHOWN_VALIDATIONS) or 1
        due.update(range(every, trainer.max_steps, every))
    return frozenset(due)


def named_weights(module: Any) -> list[tuple[str, Tensor]]:
    """Return matrices and embeddings of the network with short names such as `h.0.attn.c_attn`."""
    return [
        (name.removeprefix("transformer.").removesuffix(".weight"), weight.detach())
        for name, weight in module.network.named_parameters()
        if weight.dim() > 1
    ]


def some_values(weight: Tensor) -> Tensor:
    """Return at most HISTOGRAM_VALUES of the values, evenly spread: float32 (n,)."""
    values = weight.detach().flatten()
    return values[:: -(-len(values) // HISTOGRAM_VALUES)].float()


def rms(values: Tensor) -> float:
    """Return the root mean square."""
    return values.square().mean().sqrt().item()


def add_histogram(writer: Any, tag: str, values: Tensor, step: int) -> None:
    """Write a histogram, counted on the device of the values; SummaryWriter.add_histogram sorts them on the CPU.

    It counts by torch.bincount, since torch.histc is refused on a GPU under torch.use_deterministic_algorithms. Values
    that are all equal or not all finite are left out.
    """
    low, high, total, squares = torch.stack([values.min(), values.max(), values.sum(), values.square().sum()]).tolist()
    if not 0 < high - low < math.inf:
        return
    edges = torch.linspace(low, high, HISTOGRAM_BINS + 1)[1:].tolist()
    bins = ((values - low) * (HISTOGRAM_BINS / (high - low))).long().clamp_(max=HISTOGRAM_BINS - 1)
    counts = torch.bincount(bins, minlength=HISTOGRAM_BINS).tolist()
    writer.add_histogram_raw(tag, low, high, len(values), total, squares, edges, counts, step)
