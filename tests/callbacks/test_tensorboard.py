"""Event files of a run, read with TensorBoard's own reader: losses, text, comparison, histograms."""

import csv
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from command import gptlit, load, write_config
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor, nn

from gptlit.callbacks.tensorboard import (
    FIRST_COLUMNS,
    HISTOGRAM_BINS,
    HISTOGRAM_VALUES,
    RESULTS,
    EventFiles,
    TensorBoardPages,
    add_histogram,
    describe,
    shown_steps,
    some_values,
    tensorboard_command,
)

STEPS, VALIDATE = 14, 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a small run."""
    return write_config(
        tmp_path_factory.mktemp("board"),
        trainer__max_steps=STEPS,
        trainer__log_every_n_steps=4,
        trainer__val_check_interval=VALIDATE,
        data__estimate_batches=2,
        sample_text__max_new_tokens=20,
    )


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """Folder of a run."""
    folder = config.parent / "checkpoints" / "run"
    assert gptlit("fit", "--config", config, "--run_dir", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def events(run: Path) -> EventAccumulator:
    """Return what TensorBoard reads from it."""
    events = EventAccumulator(str(run), tensor_size_guidance={"histograms": 0, "scalars": 0, "text": 0})
    events.Reload()
    return events


def tags(events: EventAccumulator, plugin: str) -> set[str]:
    return set(events.PluginTagToContent(plugin))


def plugin_data(events: EventAccumulator, tag: str) -> bytes:
    return events.PluginTagToContent("hparams")[tag]


# ---------------------------------------------------------------- losses, text and layout


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """The curve of a tag in a folder of event files, by step."""
    events = EventAccumulator(str(folder), tensor_size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: float(make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)}


def test_train_and_val_loss_have_one_name_in_two_sub_runs_and_so_one_chart(run: Path) -> None:
    """TensorBoard draws curves of one name into one chart and colours them by run. Steps and values are correct."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for part in ("train", "val"):
        expected = {int(row["step"]): float(row[f"{part}/loss"]) for row in rows if row[f"{part}/loss"]}
        assert scalars(run / part, "loss") == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_the_first_group_of_the_first_tab(run: Path) -> None:
    """TensorBoard opens with TIME SERIES and sorts groups of tags by name, those of pictures and histograms too."""
    groups = set()
    for folder in (run, run / "train", run / "val"):
        events = EventAccumulator(str(folder))
        events.Reload()
        for plugin in ("scalars", "images", "histograms"):
            if plugin in events.ActivePlugins():
                groups |= {tag.split("/")[0] for tag in tags(events, plugin)}
    assert min(groups) == "loss"


def test_samples_come_before_the_configuration_in_the_text_tab(events: EventAccumulator) -> None:
    """TensorBoard sorts the tags by name."""
    assert sorted(tags(events, "text")) == ["sample/text_summary", "settings/text_summary"]


def test_the_configuration_reads_as_in_the_run_folder(run: Path, events: EventAccumulator) -> None:
    """Guards against Markdown that swallows indentation, and against the configuration before flags are applied."""
    (event,) = events.Tensors("settings/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert all(line.startswith("    ") for line in lines)
    assert yaml.safe_load("\n".join(line[4:] for line in lines)) == yaml.safe_load((run / "config.yaml").read_text())
    assert event.step == 0


def test_every_validation_after_the_first_step_has_a_sample(run: Path, events: EventAccumulator) -> None:
    validated = [step for step in sorted(scalars(run, "val/loss")) if step]  # not before the first step
    assert [event.step for event in events.Tensors("sample/text_summary")] == validated


def test_no_chart_of_the_layout_is_empty(run: Path, events: EventAccumulator) -> None:
    """Tags are matched from their beginning."""
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    curves = tags(events, "scalars") | {"loss"}
    charts = [
        {tag for tag in curves for pattern in chart.multiline.tag if re.match(pattern, tag)}
        for category in layout.category
        for chart in category.chart
    ]
    assert charts[0] == {"loss"}
    assert all(charts)


# ---------------------------------------------------------------- comparison of runs


def test_a_run_is_one_row_with_its_settings_and_its_own_curves_as_results(run: Path, events: EventAccumulator) -> None:
    """Guards against hp_metric -1, a row for a sub-run, and results that are never logged."""
    assert {path.parent for path in run.rglob("events.*")} == {run, run / "train", run / "val"}
    assert tags(events, "hparams") == {
        metadata.EXPERIMENT_TAG,
        metadata.SESSION_START_INFO_TAG,
        metadata.SESSION_END_INFO_TAG,
    }
    for part in ("train", "val"):
        sub_run = EventAccumulator(str(run / part))
        sub_run.Reload()
        assert "hparams" not in sub_run.ActivePlugins()
    assert "hp_metric" not in tags(events, "scalars")
    experiment = metadata.parse_experiment_plugin_data(plugin_data(events, metadata.EXPERIMENT_TAG))
    assert [info.name.tag for info in experiment.metric_infos] == list(RESULTS)
    assert set(RESULTS) <= tags(events, "scalars")
    ticked = {info.name for info in experiment.hparam_infos if info.differs}
    assert ticked == set(FIRST_COLUMNS)
    assert len(ticked) == 5, "as many as TensorBoard ticks"

    start = metadata.parse_session_start_info_plugin_data(plugin_data(events, metadata.SESSION_START_INFO_TAG))
    assert start.hparams["gpt.n_embd"].number_value == 16
    assert start.hparams["optimizer.name"].string_value == "muon"
    assert start.hparams["optimizer.muon_lr"].number_value == 0.02
    assert start.hparams["data.corpus"].string_value.endswith("text.txt")
    assert start.hparams["trainer.max_steps"].number_value == STEPS
    weights = load(run / "last.ckpt")["state_dict"]
    count = sum(weight.numel() for name, weight in weights.items() if name.startswith("net."))
    assert start.hparams["parameters"].number_value == count
    assert set(start.hparams) == {info.name for info in experiment.hparam_infos}


def test_runs_have_columns_of_the_same_types_whatever_they_leave_out() -> None:
    """TensorBoard takes names and types of all columns from the first run that it finds."""

    def types(softcap: float | None, clip: float | None, corpus: str | list[str]) -> dict[str, type]:
        module = SimpleNamespace(
            hparams={
                "gpt": {"n_layer": 2, "bias": False, "logit_softcap": softcap},
                "optimizer": {"name": "muon", "lr": 1e-3, "muon_lr": 0.02, "betas": [0.9, 0.95]},
                "schedule": {"shape": "linear"},
                "seed": 1,
            },
            network=nn.Linear(2, 2),
        )
        data = SimpleNamespace(corpus_spec=corpus, tokenizer_kind="char", batch_size=4)
        trainer: Any = SimpleNamespace(
            datamodule=data, max_steps=5, precision="32-true", gradient_clip_val=clip, world_size=1
        )
        return {name: type(value) for name, value in describe(trainer, module).items()}

    assert types(None, None, "a.txt") == types(15.0, 1.0, ["a.txt", "b.txt"])


def test_the_best_loss_is_the_lowest_so_far_also_after_a_resume() -> None:
    """A resumed run keeps the best loss of its earlier part."""
    pages, writer = TensorBoardPages(), mock.Mock()
    pages.load_state_dict({"best_val_loss": 2.0})
    pages._writers = [writer]
    for step, loss in enumerate((3.0, 1.5, 1.75)):
        pages.on_validation_end(trainer_at(step, loss), None)
    assert [call.args[1] for call in writer.add_scalar.call_args_list] == [2.0, 1.5, 1.5]
    assert pages.state_dict() == {"best_val_loss": 1.5}


def trainer_at(step: int, loss: float) -> Any:
    return SimpleNamespace(
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
        callback_metrics={"val/loss": torch.tensor(loss)},
        global_step=step,
    )


# ---------------------------------------------------------------- histograms


def test_validations_have_histograms_of_every_matrix_and_of_its_update(events: EventAccumulator) -> None:
    """Guards against histograms at every step, and against updates that are zero because the snapshot is late."""
    names = ["wte", "lm_head", "h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    expected = {f"{group}/{name}" for group in ("weights", "updates_log10") for name in names}
    assert tags(events, "histograms") == expected
    for tag in expected:
        assert [event.step for event in events.Tensors(tag)] == [6, 12, 14]


def test_weights_of_the_last_histogram_are_those_of_the_last_checkpoint(run: Path, events: EventAccumulator) -> None:
    """Guards against counts that do not belong to the edges of their bins."""
    weights = load(run / "last.ckpt")["state_dict"]["net.transformer.h.0.mlp.c_fc.weight"].flatten().numpy()
    bins = make_ndarray(events.Tensors("weights/h.0.mlp.c_fc")[-1].tensor_proto)  # (bins, left edge, right edge, count)
    assert bins[:, 2].sum() == weights.size
    for left, right, count in bins[:: HISTOGRAM_BINS // 6]:
        assert abs(((weights > left) & (weights <= right)).sum() - count) <= 2  # a value on an edge may go either way


class Recorder:
    """A SummaryWriter that keeps histograms."""

    def __init__(self) -> None:
        self.histograms: dict[str, dict[str, Any]] = {}

    def add_histogram_raw(self, tag: str, low: float, high: float, *others: Any) -> None:
        self.histograms[tag] = {"low": low, "high": high, "others": others}


def test_an_update_is_that_of_one_step_relative_to_the_size_of_the_weights() -> None:
    """Guards against the change since the last histogram, and against a wrong denominator."""
    network = nn.Linear(8, 8, bias=False)
    module = SimpleNamespace(network=network)
    pages, recorder = TensorBoardPages(), Recorder()
    pages._writers, pages._histogram_steps = [recorder], frozenset({10})
    with torch.no_grad():
        network.weight.copy_(torch.tensor([3.0, -3.0] * 32).view(8, 8))  # root mean square 3
        for step in range(10):
            pages.on_before_optimizer_step(SimpleNamespace(global_step=step), module, None)
            assert bool(pages._before) == (step == 9)
            if step < 9:
                network.weight.neg_()
        network.weight.add_(torch.tensor([0.003, 0.03] * 32).view(8, 8))
    pages._histograms(SimpleNamespace(global_step=10), module)
    update = recorder.histograms["updates_log10/weight"]
    assert (update["low"], update["high"]) == pytest.approx((-3.0, -2.0), abs=1e-3)
    assert not pages._before


@given(max_steps=st.integers(1, 5000), interval=st.integers(1, 6000), accumulate=st.integers(1, 4))
def test_histograms_are_few_at_validations_and_at_the_end(max_steps: int, interval: int, accumulate: int) -> None:
    """The cost does not grow with the number of validations."""
    steps = shown_steps(
        SimpleNamespace(
            enable_validation=True,
            val_check_batch=interval * accumulate,
            accumulate_grad_batches=accumulate,
            max_steps=max_steps,
        )
    )
    assert len(steps) <= 11
    assert max_steps in steps
    assert all(step % interval == 0 for step in steps - {max_steps})
    assert len(steps) >= min(5, max_steps // interval)


@pytest.mark.parametrize(
    "values",
    [torch.full((8,), 2.0), torch.tensor([1.0, float("nan")]), torch.tensor([0.0, float("inf")])],
    ids=["all equal", "not a number", "infinite"],
)
def test_values_without_a_finite_range_are_left_out(values: Tensor) -> None:
    """A histogram never stops a run."""
    recorder = Recorder()
    add_histogram(recorder, "weights/x", values, 1)
    assert not recorder.histograms


def test_a_histogram_of_a_large_matrix_uses_a_part_of_it() -> None:
    """Counting all values of a large model would take seconds at every validation."""
    large = torch.arange(3 * HISTOGRAM_VALUES + 1).view(1, -1)
    values = some_values(large)
    assert HISTOGRAM_VALUES // 2 < len(values) <= HISTOGRAM_VALUES
    assert values.max() > 2.9 * HISTOGRAM_VALUES


# ---------------------------------------------------------------- loggers, and none


def test_without_a_logger_nothing_is_written_or_announced(config: Path) -> None:
    """No crash, and no command that would show an empty page."""
    folder = config.parent / "silent"
    answer = gptlit("fit", "--config", config, "--run_dir", folder, "--trainer.logger", "false")
    assert answer.code == 0
    assert "tensorboard" not in answer.err
    assert not list(folder.glob("events.*"))
    assert not (folder / "metrics.csv").exists()


def test_other_loggers_get_metrics_and_hyper_parameters(config: Path) -> None:
    """Lightning's own loggers get metrics, hyper-parameters and pages, and no hp_metric."""
    folder = config.parent / "several"
    loggers = config.parent / "loggers.yaml"
    place = {"save_dir": str(folder), "name": "", "version": ""}
    several = [
        {"class_path": "CSVLogger", "init_args": {**place, "version": "table"}},
        {"class_path": "TensorBoardLogger", "init_args": {**place, "version": "board"}},
    ]
    loggers.write_text(yaml.safe_dump({"trainer": {"logger": several}}), encoding="utf-8")
    assert gptlit("fit", "--config", config, "--config", loggers, "--run_dir", folder).code == 0
    assert "val/loss" in (folder / "table" / "metrics.csv").read_text().splitlines()[0]
    assert yaml.safe_load((folder / "table" / "hparams.yaml").read_text())["gpt.n_embd"] == 16
    events = EventAccumulator(str(folder / "board"))
    events.Reload()
    assert "hp_metric" not in tags(events, "scalars")
    assert "weights/wte" in tags(events, "histograms")


def test_other_ranks_than_0_write_nothing() -> None:
    """Two ranks never write to the same file."""
    pages = TensorBoardPages()
    pages.on_train_start(SimpleNamespace(is_global_zero=False), None)
    pages.on_before_optimizer_step(SimpleNamespace(global_step=0), None, None)
    pages.on_validation_end(trainer_at(1, 2.0), None)
    pages.on_train_end(None, None)
    assert not pages._before


# ---------------------------------------------------------------- the command that is printed


def make_trainer(validations: int = 8, board: bool = True) -> Any:
    return SimpleNamespace(
        loggers=[mock.Mock(spec=EventFiles)] if board else [],
        val_check_interval=250,
        max_steps=250 * validations,
        accumulate_grad_batches=1,
    )


def test_fit_prints_the_command_at_the_start_and_at_the_end(config: Path) -> None:
    folder = config.parent / "checkpoints" / "printed"
    said = gptlit("fit", "--config", config, "--run_dir", folder).err
    command = tensorboard_command(make_trainer(), folder)
    assert command is not None
    assert said.count(f"{command}\n") == 2
    assert len(re.findall(rf"^curves +{re.escape(command)}\n +http://localhost:6006/", said, flags=re.MULTILINE)) == 2


def test_the_command_shows_the_run_next_to_others_and_never_reads_a_home_folder(tmp_path: Path) -> None:
    """Guards against `--logdir .`, where TensorBoard would read every file below it."""
    runs, home = tmp_path / "all my runs", tmp_path / "home"
    for run in (runs / "a", runs / "b"):
        run.mkdir(parents=True)
        (run / "config.yaml").touch()
    for folder in (home / "photos", home / "run"):
        folder.mkdir(parents=True)
    with mock.patch("shutil.which", return_value="/bin/tensorboard"):
        assert tensorboard_command(make_trainer(), runs / "b") == f"tensorboard --logdir {shlex.quote(str(runs))}"
        assert tensorboard_command(make_trainer(), home / "run") == f"tensorboard --logdir {home / 'run'}"
    assert tensorboard_command(make_trainer(board=False), runs / "a") is None


def test_the_command_shows_where_a_logger_of_the_users_writes(config: Path, tmp_path: Path) -> None:
    logger = ("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", tmp_path / "elsewhere")
    said = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run", *logger).err
    (folder,) = {path.parent for path in (tmp_path / "elsewhere").rglob("events.*")}
    assert said.count(f"--logdir {folder}\n") == 2


def test_the_command_asks_for_all_samples_when_there_are_more_than_tensorboard_keeps(tmp_path: Path) -> None:
    few, many = (tensorboard_command(make_trainer(number), tmp_path) for number in (10, 11))
    assert many == f"{few} --samples_per_plugin text=1000,images=1000"


def test_a_logger_that_is_not_installed_is_named_in_one_line(config: Path) -> None:
    """`--trainer.logger WandbLogger` without wandb gives no traceback."""
    with mock.patch("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False):
        answer = gptlit("fit", "--config", config, "--trainer.logger", "WandbLogger")
    assert answer.code == 2
    (line,) = answer.err.splitlines()
    assert "not installed" in line
