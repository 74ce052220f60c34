"""Optimizers and lr_schedulers that a subclass of LitGPT returns: trained with, logged and resumed, or refused."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from gptlit import CharTokenizer, GPTConfig, LitGPT, OptimizerConfig, ScheduleConfig, TextDataModule, UserError
from gptlit.optim import learning_rate_factor

TINY = GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=16)
TEXT = "To learn a tongue, one letter at a time,\nIs all the craft that lies behind this rhyme.\n" * 20
CONSTANT = ScheduleConfig(shape="constant")
STEPS = 8


class Watch(pl.Callback, DummyLogger):
    """Collects the rates that reach the loggers, and those with which the optimizer made each step."""

    def __init__(self) -> None:
        super().__init__()
        self.published: list[dict[str, float]] = []
        self.used: list[list[float]] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Lightning calls it in the closure of a step, after the rates were set."""
        self.used.append([float(group["lr"]) for group in trainer.optimizers[0].param_groups])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Collect those of the training steps."""
        if "train/loss" in metrics:
            self.published.append({name: rate for name, rate in metrics.items() if name.startswith("lr/")})


def subclass(configure: Callable[[Any], Any]) -> type[LitGPT]:
    """A LitGPT with another `configure_optimizers`."""
    return type("Own", (LitGPT,), {"configure_optimizers": configure})


def scheduled(make: Callable[[Any], Any], **settings: Any) -> type[LitGPT]:
    """A LitGPT with its own optimizer and an lr_scheduler."""

    def configure(self: LitGPT) -> Any:
        optimizer = LitGPT.configure_optimizers(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step", **settings}}

    return subclass(configure)


def fit(
    folder: Path,
    kind: type[LitGPT],
    *callbacks: pl.Callback,
    schedule: ScheduleConfig | None = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> LitGPT:
    """Train a tiny model with a plain Trainer; return it."""
    (folder / "rhyme.txt").write_text(TEXT)
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=[callback for callback in callbacks if isinstance(callback, Watch)],
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **(defaults | settings),
    )
    model = kind(TINY, OptimizerConfig(name="adamw", lr=1e-2), **({} if schedule is None else {"schedule": schedule}))
    trainer.fit(model, datamodule=TextDataModule(str(folder / "rhyme.txt"), 8, 6), ckpt_path=ckpt_path)
    assert trainer.global_step == settings.get("max_steps", STEPS)
    return model


def weights(model: LitGPT) -> torch.Tensor:
    """All weights of a model in one row."""
    return torch.cat([parameter.detach().flatten() for parameter in model.network.parameters()])


def two_groups(model: LitGPT, *names: str) -> list[dict[str, Any]]:
    """The embedding, and everything else at half its rate."""
    embedding, *others = model.parameters()
    groups: list[dict[str, Any]] = [{"params": [embedding], "lr": 1e-2}, {"params": others, "lr": 5e-3}]
    return [{**group, "name": name} for group, name in zip(groups, names, strict=True)] if names else groups


@pytest.mark.parametrize(
    ("configure", "names"),
    [
        (lambda self: AdamW(self.parameters(), lr=1e-2), ["lr/adamw"]),
        (lambda self: SGD(self.parameters(), lr=1e-2), ["lr/sgd"]),
        (lambda self: [SGD(self.parameters(), lr=1e-2)], ["lr/sgd"]),
        (lambda self: SGD(two_groups(self)), ["lr/sgd_0", "lr/sgd_1"]),
        (lambda self: SGD(two_groups(self, "embedding", "rest")), ["lr/embedding", "lr/rest"]),
        (lambda self: AdamW(self.parameters(), lr=torch.tensor(1e-2), foreach=False), ["lr/adamw"]),
    ],
    ids=["AdamW", "SGD", "in a list", "two groups", "named groups", "tensor"],
)
@pytest.mark.parametrize("schedule", [None, CONSTANT], ids=["default", "constant"])
def test_an_optimizer_of_a_subclass_trains_and_follows_the_schedule(
    tmp_path: Path, configure: Callable[[Any], Any], names: list[str], schedule: ScheduleConfig | None
) -> None:
    """It ended in a KeyError before the first step."""
    watch = Watch()
    fit(tmp_path, subclass(configure), watch, schedule=schedule)
    shape = schedule or ScheduleConfig()
    peaks = [1e-2, 5e-3][: len(names)]
    expected = [[peak * learning_rate_factor(step, STEPS, shape) for peak in peaks] for step in range(STEPS)]
    for used, published, rates in zip(watch.used, watch.published, expected, strict=True):
        assert used == pytest.approx(rates)
        assert published == pytest.approx(dict(zip(names, rates, strict=True)))


def test_an_optimizer_of_a_subclass_makes_the_steps_that_it_makes_without_gptlit(tmp_path: Path) -> None:
    watch = Watch()
    model = fit(tmp_path, subclass(lambda self: SGD(self.parameters(), lr=0.5)), watch, schedule=CONSTANT)
    reference = LitGPT(TINY, tokenizer=model.hparams["tokenizer"])
    reference.configure_model()
    optimizer = SGD(reference.parameters(), lr=0.5)
    for step in range(STEPS):
        inputs, targets = model.trainer.train_dataloader.chunks[step]
        optimizer.zero_grad()
        reference.network(inputs, targets=targets).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-4, atol=1e-5)


def test_a_fit_without_an_optimizer_logs_no_rate(tmp_path: Path) -> None:
    """Lightning takes None, and puts an optimizer without parameter groups in its place."""
    watch = Watch()
    with pytest.warns(UserWarning, match="no optimizer"):
        fit(tmp_path, subclass(lambda self: None), watch)
    assert watch.published == [{}] * STEPS


# ---------------------------------------------------------------- lr_scheduler


def test_an_lr_scheduler_of_a_subclass_is_obeyed(tmp_path: Path) -> None:
    """The schedule overwrote its rate of 0, which was published nevertheless."""
    short, long = (fit(tmp_path, scheduled(lambda o: LambdaLR(o, lambda _: 0.0)), max_steps=steps) for steps in (1, 8))
    assert torch.equal(weights(short), weights(long))


def test_the_published_rate_is_that_of_the_step_and_not_of_the_next_one(tmp_path: Path) -> None:
    """Lightning steps an lr_scheduler before the metrics of the step are logged."""
    watch = Watch()
    fit(tmp_path, scheduled(lambda optimizer: ExponentialLR(optimizer, 0.5)), watch)
    expected = [1e-2 * 0.5**step for step in range(STEPS)]
    assert [rates[0] for rates in watch.used] == pytest.approx(expected)
    assert [rates["lr/adamw"] for rates in watch.published] == pytest.approx(expected)


def test_a_scheduler_on_a_plateau_reads_the_validation_loss(tmp_path: Path) -> None:
    watch = Watch()
    kind = scheduled(lambda o: ReduceLROnPlateau(o, "max", 0.1, patience=0), monitor="val/loss", frequency=2)
    fit(tmp_path, kind, watch)
    rates = [rates["lr/adamw"] for rates in watch.published]
    assert rates == pytest.approx([1e-2] * 4 + [1e-3] * 2 + [1e-4] * 2)


def optimizer_and(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a `configure_optimizers` with an optimizer from outside and an lr_scheduler."""

    def configure(self: LitGPT) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": make(optimizer), "interval": "step"}]

    return configure


@pytest.mark.parametrize(
    "kind",
    [
        scheduled(lambda optimizer: StepLR(optimizer, 3, 0.5)),
        scheduled(lambda optimizer: ExponentialLR(optimizer, 0.8)),
        scheduled(lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step))),
        scheduled(lambda optimizer: OneCycleLR(optimizer, 0.02, total_steps=STEPS + 1)),
        scheduled(lambda o: ReduceLROnPlateau(o, "max", 0.1, patience=0), monitor="val/loss", frequency=2),
        subclass(optimizer_and(lambda optimizer: ExponentialLR(optimizer, 0.8))),
        subclass(optimizer_and(lambda optimizer: OneCycleLR(optimizer, 0.2, total_steps=STEPS + 1))),
        subclass(lambda self: AdamW(self.parameters(), lr=1e-2)),
    ],
    ids=[
        "StepLR",
        "ExponentialLR",
        "LambdaLR",
        "OneCycleLR",
        "plateau",
        "SGD, ExponentialLR",
        "SGD, OneCycleLR",
        "AdamW alone",
    ],
)
def test_a_resumed_subclass_makes_the_same_steps(tmp_path: Path, kind: type[LitGPT]) -> None:
    """Rates and momenta are those of the checkpoint; gptlit's optimizer keeps its configuration otherwise."""
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(tmp_path, kind, saving)
    for step in (1, 4):
        resumed = fit(tmp_path, kind, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert torch.equal(weights(resumed), weights(whole)), step


@pytest.mark.parametrize("schedule", [ScheduleConfig(shape="cosine"), ScheduleConfig(warmup_steps=2)])
def test_an_lr_scheduler_next_to_a_schedule_is_refused(tmp_path: Path, schedule: ScheduleConfig) -> None:
    """One of them would be without effect."""
    kind = scheduled(lambda optimizer: LambdaLR(optimizer, lambda _: 1.0))
    with pytest.raises(UserError, match=r"model\.schedule is not the default, but configure_optimizers .* LambdaLR"):
        fit(tmp_path, kind, schedule=schedule)
    fit(tmp_path, kind, schedule=CONSTANT)


def test_an_lr_scheduler_that_steps_by_epochs_needs_epochs(tmp_path: Path) -> None:
    """A run on a TextDataModule is one epoch, so that its rate would never change; `epoch` is Lightning's default."""
    kind = scheduled(lambda optimizer: StepLR(optimizer, 1, 0.5), interval="epoch")
    with pytest.raises(UserError, match="configure_optimizers returns the lr_scheduler StepLR with interval epoch"):
        fit(tmp_path, kind)
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[watch],
        logger=watch,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ids = torch.randint(3, (8, 9))
    loader = DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=4)
    tokenizer = CharTokenizer.train("abc").to_json()
    trainer.fit(kind(TINY, OptimizerConfig(name="adamw", lr=1e-2), tokenizer=tokenizer), loader)
    assert [rates["lr/adamw"] for rates in watch.published] == pytest.approx([1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3, 2.5e-3])
