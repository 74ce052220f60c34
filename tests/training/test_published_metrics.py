"""Metrics of LitGPT: exact in every precision, the same from Python and from the command, and open to monitoring."""

import csv
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from command import gptlit, load, report, write_config
from lightning.pytorch.callbacks import (
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ThroughputMonitor,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional as F

from gptlit import GPTConfig, LitGPT, OptimizerConfig, ScheduleConfig, TextDataModule, UserError
from gptlit.callbacks.bar import RunBar
from gptlit.callbacks.metrics import MetricsFile, MetricsLogger
from gptlit.data.chunks import RandomChunks
from gptlit.model import GPT
from gptlit.optim import learning_rate_factor
from gptlit.training.evaluation import TokenSums, token_losses

TEXT = "To learn a tongue, one letter at a time,\nIs all the craft that lies behind this rhyme.\n" * 20
TINY = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16}
VAL = {"val/loss", "val/bpc", "val/bpb", "val/perplexity"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A small text in a file."""
    path = tmp_path / "rhyme.txt"
    path.write_text(TEXT)
    return path


def fit(corpus: Path, model: LitGPT | None = None, **settings: Any) -> pl.Trainer:
    """Train with a plain Trainer on the CPU."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 6,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in settings.get("callbacks", [])),
        "default_root_dir": corpus.parent,
    }
    trainer = pl.Trainer(**(defaults | settings))
    model = model or LitGPT(GPTConfig(**TINY), OptimizerConfig(name="adamw"))
    trainer.fit(model, datamodule=TextDataModule(str(corpus), block_size=8, batch_size=6, eval_batch_size=2))
    return trainer


def points(folder: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's scalars: tag -> step -> value."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def table(path: Path) -> dict[str, dict[int, float]]:
    """A CSV file of metrics: name -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    assert step not in found.setdefault(name, {}), f"{name} is logged twice at step {step}"
                    found[name][step] = float(value)
    return found


# ---------------------------------------------------------------- from Python and from the command


def test_a_run_from_python_logs_what_the_command_logs_value_for_value(tmp_path: Path) -> None:
    """With Lightning's own loggers and a plain Trainer, under the same steps."""
    config = write_config(tmp_path, trainer__max_steps=14, trainer__log_every_n_steps=4, data__estimate_batches=2)
    assert gptlit("fit", "--config", config, "--run_dir", tmp_path / "command").code == 0

    gpt = GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.3)
    schedule = ScheduleConfig(shape="cosine", warmup_steps=3)
    model = LitGPT(gpt, OptimizerConfig(name="muon", lr=5e-3, muon_lr=0.02), schedule, seed=7)
    data = TextDataModule(
        str(tmp_path / "text.txt"), block_size=16, batch_size=8, eval_batch_size=16, estimate_batches=2, seed=7
    )
    loggers = [CSVLogger(tmp_path, name="csv", version=""), TensorBoardLogger(tmp_path, name="board", version="")]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=14,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        log_every_n_steps=4,
        gradient_clip_val=1.0,
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)

    ours, plain = table(tmp_path / "command" / "metrics.csv"), table(tmp_path / "csv" / "metrics.csv")
    ours = {name: values for name, values in ours.items() if not name.startswith("perf/")}
    last = 14  # the command validates after the last step too
    assert (
        ours.keys()
        == plain.keys()
        == {"train/loss", "train/grad_norm", "lr/muon", "lr/adamw"}
        | VAL
        | {
            "train/loss_estimate",
            "val/loss_estimate",
        }
    )
    board = points(tmp_path / "board")
    for name, values in plain.items():
        expected = {step: value for step, value in ours[name].items() if step in values}
        assert values == pytest.approx(expected, rel=1e-7), name
        assert set(ours[name]) - set(values) <= ({last} if name.endswith(("estimate", *VAL)) else set()), name
        assert {step: board[name][step] for step in values} == pytest.approx(values, rel=1e-6), name


def test_metrics_are_where_lightning_users_look_for_them(corpus: Path) -> None:
    """In callback_metrics, logged_metrics and the progress bar's, as self.log would put them."""
    trainer = fit(corpus, logger=CSVLogger(corpus.parent))
    names = {"train/loss", "train/grad_norm", "lr/adamw"} | VAL
    assert names <= trainer.callback_metrics.keys()
    assert names <= trainer.logged_metrics.keys()
    assert {"train/loss", "val/loss"} <= trainer.progress_bar_metrics.keys()
    assert all(isinstance(trainer.callback_metrics[name], Tensor) for name in names)


def test_the_initial_weights_are_validated_and_logged_at_step_0(corpus: Path) -> None:
    """The lecture's first check: a model that knows nothing has a loss of ln V; a resumed run does not repeat it."""
    logger = CSVLogger(corpus.parent, name="csv", version="")
    trainer = fit(corpus, logger=logger)
    found = table(corpus.parent / "csv" / "metrics.csv")
    assert list(found["val/loss"]) == [0, 3, 6]
    assert found["val/loss"][0] == pytest.approx(math.log(trainer.lightning_module.gpt.vocab_size), rel=1e-6)

    path = corpus.parent / "saved.ckpt"
    trainer.save_checkpoint(path)
    again = pl.Trainer(
        accelerator="cpu",
        max_steps=8,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        logger=CSVLogger(corpus.parent, name="resumed", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = LitGPT(GPTConfig(**TINY), OptimizerConfig(name="adamw"))
    again.fit(model, datamodule=TextDataModule(str(corpus), block_size=8, batch_size=6), ckpt_path=path)
    assert list(table(corpus.parent / "resumed" / "metrics.csv")["val/loss"]) == [8]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("init", ["zero", "normal"])
def test_logits_of_zero_need_no_forward_pass(
    corpus: Path, init: Any, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metrics at step 0 are the same numbers; guards against a shortcut for other weights, or later steps."""

    def run() -> tuple[dict[str, float], int]:
        first: list[tuple[dict[str, float], int]] = []
        passes: list[Any] = []

        class AtStart(Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
                first.append(({name: float(trainer.callback_metrics[name]) for name in VAL}, len(passes)))

        model = LitGPT(GPTConfig(**TINY, init=init), OptimizerConfig(name="adamw"))
        monkeypatch.setattr(model, "forward", lambda ids: [passes.append(ids), LitGPT.forward(model, ids)][1])
        fit(corpus, model, callbacks=[AtStart()], precision=precision, num_sanity_val_steps=0)
        assert len(passes) > first[0][1]  # the validations after steps
        return first[0]

    metrics, passes = run()
    monkeypatch.setattr(GPT, "logits_are_zero", False)
    expected, all_passes = run()
    assert metrics == expected
    assert passes == (0 if init == "zero" else all_passes)
    assert all_passes > 0


def test_the_gradient_norm_is_logged_without_clipping_too(corpus: Path) -> None:
    """And it is the norm of all gradients, before they are clipped."""
    seen: dict[int, float] = {}

    class Norm(Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
            squares = [p.grad.square().sum() for p in pl_module.parameters() if p.grad is not None]
            seen[trainer.global_step + 1] = math.sqrt(float(sum(squares)))

    for clip in (None, 0.01):
        seen.clear()
        logger = CSVLogger(corpus.parent, name="csv", version=str(clip))
        fit(corpus, logger=logger, callbacks=[Norm()], gradient_clip_val=clip)
        logged = table(Path(logger.log_dir) / "metrics.csv")["train/grad_norm"]
        assert list(logged) == [2, 4, 6]
        assert logged == pytest.approx({step: seen[step] for step in logged}, rel=1e-5)


# ---------------------------------------------------------------- precision


def float64_loss(model: LitGPT, tokens: Tensor, block_size: int) -> float:
    """Mean loss over a text in windows that do not overlap, computed in float64 with the same weights."""
    network = LitGPT(model.gpt, tokenizer=model.tokenizer.to_json())  # type: ignore[union-attr]
    torch.set_default_dtype(torch.float64)
    try:
        network.configure_model()  # with the angles of rotary embedding in float64
    finally:
        torch.set_default_dtype(torch.float32)
    network.load_state_dict(model.state_dict())
    network.eval()
    total, count = 0.0, len(tokens) - 1
    rows = 512 * block_size
    with torch.no_grad():
        for first in range(0, count, rows):
            inputs, targets = tokens[first : min(first + rows, count)], tokens[first + 1 : min(first + rows, count) + 1]
            whole = len(inputs) // block_size * block_size
            for ids, wanted in ((inputs[:whole], targets[:whole]), (inputs[whole:], targets[whole:])):
                if len(ids):
                    shape = (-1, block_size) if len(ids) % block_size == 0 else (1, -1)
                    logits = network(ids.long().reshape(shape))
                    total += F.cross_entropy(logits.flatten(0, 1), wanted.long(), reduction="sum").item()
    return total / count


PRECISIONS = {  # largest difference from float64: the rounding of the forward pass, not of the mean
    "64-true": 1e-12,
    "32-true": 1e-6,
    "bf16-mixed": 2e-3,
    "16-mixed": 2e-3,
    "bf16-true": 2e-2,
    "16-true": 2e-3,
}
PRECISION_TABLE = ("precision", "text", "val/loss", "float64 evaluation of the same weights", "difference")


@pytest.mark.parametrize("megabytes", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_validation_is_exact_in_every_precision(precision: Any, megabytes: int, tmp_path: Path) -> None:
    """Sums in half precision stop growing at 256 (bfloat16) or overflow at 65,504 (float16)."""
    generator = torch.Generator().manual_seed(1)
    text = tmp_path / "text.txt"
    words = ["".join(chr(97 + (i * 7 + j) % 26) for j in range(1 + i % 7)) for i in range(50)]
    chosen = torch.randint(len(words), (megabytes * 200_000,), generator=generator).tolist()
    text.write_text(" ".join(words[i] for i in chosen)[: megabytes * 1_000_000])
    model = LitGPT(
        GPTConfig(block_size=32, n_layer=1, n_head=1, n_embd=8), OptimizerConfig(name="adamw", lr=3e-2, eps=1e-4)
    )
    data = TextDataModule(str(text), block_size=32, batch_size=8, eval_batch_size=64)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=20,
        val_check_interval=20,
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    found = float(trainer.callback_metrics["val/loss"])
    assert isinstance(data.val_tokens, Tensor)
    truth = float64_loss(model, data.val_tokens, 32)
    report(
        "Precision",
        PRECISION_TABLE,
        precision,
        f"{megabytes} MB",
        f"{found:.6f}",
        f"{truth:.6f}",
        f"{abs(found - truth):.1e}",
    )
    assert found == pytest.approx(truth, abs=PRECISIONS[precision])
    (returned,) = trainer.validate(model, datamodule=data, verbose=False)
    assert returned["val/loss"] == pytest.approx(found, abs=1e-9)


def test_sums_count_beyond_the_integers_of_float32() -> None:
    """float32 stops at 2**24 = 16,777,216: one more changes nothing there."""
    sums = TokenSums()
    sums.update(torch.zeros(20_000_000), torch.ones(20_000_000, dtype=torch.bool))
    for _ in range(1000):
        sums.update(torch.ones(1), torch.ones(1, dtype=torch.bool))
    assert sums.compute()[0].item() == 1000 / 20_001_000
    sums.reset()
    sums.update(torch.ones(2), torch.tensor([True, False]))
    assert sums.sums.tolist() == [2.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("ignored", [-1, -100])
def test_every_negative_target_is_ignored(ignored: int) -> None:
    logits = torch.randn(1, 3, 5)
    losses = token_losses(logits, torch.tensor([[2, ignored, 4]]))
    assert losses[1] == 0
    assert losses[0].item() == pytest.approx(-logits[0, 0].log_softmax(0)[2].item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_of_tokens_are_float32_or_better(dtype: torch.dtype) -> None:
    """And an ignored target has none."""
    losses = token_losses(torch.zeros(1, 2, 5, dtype=dtype), torch.tensor([[3, -100]]))
    assert losses.tolist() == pytest.approx([math.log(5), 0.0])
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("dtype", "nats"), [(torch.float16, 30.0), (torch.bfloat16, 120.0), (torch.float32, 120.0)])
def test_the_loss_of_a_token_whose_probability_underflows_is_finite(dtype: torch.dtype, nats: float) -> None:
    """The logarithm of a softmax is −∞ there (findings/torchmetrics-perplexity-underflow.sh)."""
    assert token_losses(torch.tensor([[[nats, 0.0]]], dtype=dtype), torch.tensor([[1]])).item() == nats


def test_a_validation_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    """Guards against a run without best.ckpt that ends with exit code 0."""

    class Break(Callback):
        def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.global_step:
                pl_module.network.lm_head.weight.data[0] = torch.nan

    from command import extra_callbacks

    with extra_callbacks(Break()):
        answer = gptlit("fit", "--config", write_config(tmp_path), "--run_dir", tmp_path / "run")
    assert answer.code == 1
    assert "the validation loss is nan after step 6" in answer.err


# ---------------------------------------------------------------- monitoring


@pytest.mark.parametrize("name", ["train/loss", "train/grad_norm", "lr/adamw", "val/loss", "val/bpc", "val/bpb"])
def test_every_metric_can_be_monitored(corpus: Path, name: str) -> None:
    """Before the first log too: EarlyStopping and ModelCheckpoint look at each validation, and every step."""
    stopping = EarlyStopping(monitor=name, patience=100)
    saving = ModelCheckpoint(corpus.parent / "kept", monitor=name, every_n_train_steps=1, save_top_k=-1)
    fit(corpus, callbacks=[stopping, saving], log_every_n_steps=100, val_check_interval=2)
    assert math.isfinite(float(stopping.best_score))
    assert saving.best_model_score is not None


def test_a_monitored_training_loss_is_the_one_of_the_step(corpus: Path) -> None:
    """Guards against a value that is as old as the last log."""
    seen: dict[int, float] = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen[trainer.global_step] = float(trainer.callback_metrics["train/loss"])
            assert seen[trainer.global_step] == pytest.approx(float(outputs["loss"]))

    fit(corpus, callbacks=[Watch()], log_every_n_steps=100)
    assert len(seen) == len(set(seen.values())) == 6


@pytest.mark.parametrize(
    ("callback", "name", "instead"),
    [
        ("EarlyStopping", "val_loss", "val/loss"),
        ("EarlyStopping", "train_loss", "train/loss"),
        ("ModelCheckpoint", "lr", "lr/"),
        ("ModelCheckpoint", "grad_norm", "train/grad_norm"),
    ],
)
def test_an_unknown_metric_is_refused_before_the_first_step(
    tmp_path: Path, callback: str, name: str, instead: str
) -> None:
    """With the name that was meant; no file is left."""
    flags = ("--trainer.callbacks", callback, "--trainer.callbacks.monitor", name)
    answer = gptlit("fit", "--config", write_config(tmp_path), "--run_dir", tmp_path / "run", *flags)
    assert (answer.code, answer.out) == (2, "")
    assert f"gptlit: --trainer.callbacks.{callback}.monitor is {name!r}" in answer.err
    assert f"did you mean {instead}" in answer.err
    assert not (tmp_path / "run").exists()


def test_a_metric_of_a_callback_of_the_user_can_be_monitored(corpus: Path) -> None:
    """What such a callback logs is not known before it does."""

    class Logs(Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.log("mine", 1.0)

    stopping = EarlyStopping(monitor="mine", patience=100)
    fit(corpus, callbacks=[Logs(), stopping])
    assert float(stopping.best_score) == 1.0


def test_a_metric_of_a_subclass_can_be_monitored(corpus: Path) -> None:
    """It was refused as one that the run does not log."""

    class Own(LitGPT):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx, dataloader_idx)
            self.log("val/accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

        def training_step(self, *arguments: Any) -> Tensor:
            self.log("train/twice", 2 * (loss := super().training_step(*arguments)))
            return loss

    stopping = EarlyStopping(monitor="val/accuracy", mode="max", patience=100)
    saving = ModelCheckpoint(corpus.parent / "kept", monitor="train/twice", every_n_train_steps=1)
    fit(corpus, Own(GPTConfig(**TINY), OptimizerConfig(name="adamw")), callbacks=[stopping, saving])
    assert 0 < float(stopping.best_score) < 1
    assert float(saving.best_model_score or 0) > 0


@pytest.mark.parametrize(
    "settings", [{"log_every_n_steps": 0}, {"barebones": True}], ids=lambda value: next(iter(value))
)
def test_nothing_is_logged_of_steps_if_the_interval_is_0(corpus: Path, settings: dict[str, Any]) -> None:
    """Lightning's number for no logs, which `barebones` sets too, ended in a ZeroDivisionError."""
    logged: set[str] = set()
    logger = DummyLogger()
    logger.log_metrics = lambda metrics, step: logged.update(metrics)  # type: ignore[method-assign]
    if "barebones" in settings:
        free = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "log_every_n_steps")
        settings = settings | dict.fromkeys(free)
    else:
        settings = settings | {"logger": logger, "callbacks": [MetricsLogger(), RunBar()], "enable_progress_bar": True}
    trainer = fit(corpus, **settings)
    assert trainer.global_step == 6
    assert {"train/loss", "lr/adamw", *VAL} <= trainer.callback_metrics.keys()
    assert logged == (set() if trainer.barebones else VAL), "those of validations"


# ---------------------------------------------------------------- metrics.csv, whoever logs


def test_metrics_csv_has_one_row_per_step_whoever_logs(corpus: Path) -> None:
    """Lightning's own callbacks count one step less, or the batches of a validation."""
    folder = corpus.parent / "run"
    others = [LearningRateMonitor("step"), DeviceStatsMonitor(cpu_stats=False), throughput_monitor()]
    schedule = ScheduleConfig(shape="linear")
    model = LitGPT(GPTConfig(**TINY), OptimizerConfig(name="adamw"), schedule)
    settings = {"logger": MetricsFile(folder), "max_steps": 12, "log_every_n_steps": 2}
    fit(corpus, model, callbacks=[MetricsLogger(), *others], **settings)
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps))
    assert {0, 2, 3, 4, 6, 8, 9, 10, 12} <= set(steps) <= set(range(13))
    for name in ("lr/adamw", next(name for name in rows[0] if name.startswith("lr-"))):
        rates = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert len(rates) >= 5
        expected = {step: 5e-3 * learning_rate_factor(max(step - 1, 0), 12, schedule) for step in rates}
        assert rates == pytest.approx(expected, rel=1e-6), name


def throughput_monitor() -> ThroughputMonitor:
    """Counts samples as users do."""
    return ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=2)


# ---------------------------------------------------------------- overfitting on a few batches


@pytest.mark.parametrize(("wanted", "distinct"), [(1, 1), (3, 3), (0.5, 3)])
def test_overfit_batches_is_obeyed_from_python(corpus: Path, wanted: int | float, distinct: int) -> None:
    """The same batches again and again, over the whole run."""
    seen: list[bytes] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch[0].numpy().tobytes())

    trainer = fit(corpus, callbacks=[Watch()], overfit_batches=wanted, max_steps=7 if wanted != 0.5 else 6)
    assert trainer.global_step == len(seen)
    assert len(set(seen)) == distinct
    assert seen[0] == seen[distinct]


def test_overfit_batches_is_obeyed_by_the_command(tmp_path: Path) -> None:
    """With accumulation, and after a resume: a step of two micro-batches is one batch."""
    config = write_config(tmp_path, trainer__accumulate_grad_batches=2)
    asked: list[int] = []
    rows = RandomChunks.rows

    def watch(self: RandomChunks, step: int, part: slice) -> Any:
        asked.append(step)
        return rows(self, step, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RandomChunks, "rows", watch)
        flags = ("--trainer.overfit_batches", 2)
        run = ("--run_dir", tmp_path / "run", "--trainer.max_steps", 5)
        assert gptlit("fit", "--config", config, *run, *flags).code == 0
        assert gptlit("fit", "--ckpt_path", tmp_path / "run", "--trainer.max_steps", 8).code == 0
    trained = [step for step in asked if step < 1000]
    assert trained[:10] == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0]
    assert set(trained) == {0, 1}


@pytest.mark.parametrize(("limit", "share"), [("null", 1.0), (2, 2), (0, 0)])
def test_overfit_batches_leaves_the_validation_as_it_is(tmp_path: Path, limit: str | int, share: float) -> None:
    config, run = write_config(tmp_path, trainer__max_steps=3), tmp_path / "run"
    flags = ("--trainer.overfit_batches", 0.4, "--trainer.limit_val_batches", limit)
    flags += ("--data.eval_batch_size", 1) if share else ()
    answer = gptlit("fit", "--config", config, "--run_dir", run, *flags)
    assert answer.code == 0, answer.err
    state = load(run / "last.ckpt")["callbacks"]["RunCheckpoints"]
    if not share:
        assert state["best_score"] is None
        return
    done, whole = state["validated_batches"]
    assert done == (whole if share == 1.0 else share) <= whole
    assert ("trainer.limit_val_batches is set" in " ".join(answer.err.split())) == (done < whole)


def test_user_errors_name_the_callback(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"EarlyStopping\.monitor is 'val_loss'.*did you mean val/loss"):
        fit(corpus, callbacks=[EarlyStopping(monitor="val_loss")])
