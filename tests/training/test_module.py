"""LitGPT: exact metrics, a step that equals plain PyTorch, and self-contained checkpoints."""

import math
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from gptlit import (
    BPETokenizer,
    CharTokenizer,
    GPTConfig,
    LitGPT,
    OptimizerConfig,
    ScheduleConfig,
    TextDataModule,
    UserError,
)
from gptlit.callbacks.averaging import AverageWeights
from gptlit.callbacks.metrics import MetricsLogger
from gptlit.callbacks.signals import StopBetweenSteps
from gptlit.device.seeds import mix
from gptlit.generation.generate import Sampling
from gptlit.generation.text import GenerationConfig

TINY = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16}
TEXT = "To learn a tongue, one letter at a time,\nIs all the craft that lies behind this rhyme.\n" * 20


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A small text in a file."""
    path = tmp_path / "rhyme.txt"
    path.write_text(TEXT)
    return path


def quiet_trainer(tmp_path: Path, **settings: object) -> pl.Trainer:
    """A Trainer on the CPU that says and writes nothing."""
    defaults: dict = {
        "accelerator": "cpu",
        "max_steps": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**(defaults | settings))


def trained(corpus: Path, tmp_path: Path, gpt: dict | None = None, **settings: object) -> tuple[LitGPT, pl.Trainer]:
    """A few steps on the small text."""
    optimizer = OptimizerConfig(name="adamw", lr=1e-2)
    module = LitGPT(GPTConfig(**(TINY | (gpt or {}))), optimizer, ScheduleConfig(shape="linear", warmup_steps=2))
    trainer = quiet_trainer(tmp_path, **settings)
    trainer.fit(module, datamodule=TextDataModule(str(corpus), block_size=8, batch_size=6))
    return module, trainer


def test_three_steps_equal_the_plain_loop(corpus: Path, tmp_path: Path) -> None:
    """The whole of Lightning, hooks and schedule changes nothing about the mathematics."""
    module, trainer = trained(corpus, tmp_path)
    data = trainer.datamodule
    reference = LitGPT(GPTConfig(**TINY), tokenizer=data.tokenizer.to_json())
    reference.configure_model()
    optimizer = torch.optim.AdamW(reference.network.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    chunks = trainer.train_dataloader.chunks
    for step, rate in enumerate([1e-2 / 3, 2e-2 / 3, 1e-2]):
        optimizer.param_groups[0]["lr"] = rate
        inputs, targets = chunks[step]
        loss = F.cross_entropy(reference(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, theirs in zip(module.network.parameters(), reference.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_accumulation_takes_the_same_steps(corpus: Path, tmp_path: Path) -> None:
    """Three micro-batches of two rows are one batch of six."""
    whole, _ = trained(corpus, tmp_path)
    parts, _ = trained(corpus, tmp_path, accumulate_grad_batches=3)
    for a, b in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_logged_loss_is_that_of_the_step_at_the_end_of_an_epoch_too(corpus: Path, tmp_path: Path) -> None:
    """Lightning also steps after the last batch of an epoch, however few micro-batches the step has then."""
    made: list[list[torch.Tensor]] = [[]]
    logged: list[torch.Tensor] = []

    class Watched(LitGPT):
        def training_step(self, *arguments: Any) -> torch.Tensor:
            made[-1].append(super().training_step(*arguments))
            return made[-1][-1]

        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == len(made):
                logged.append(self.trainer.callback_metrics["train/loss"])
                made.append([])

    module = Watched(GPTConfig(**TINY), OptimizerConfig(name="adamw", lr=1e-2))
    epochs = {"max_steps": 6, "max_epochs": -1, "limit_train_batches": 3, "limit_val_batches": 0}
    trainer = quiet_trainer(tmp_path, accumulate_grad_batches=2, **epochs)
    trainer.fit(module, datamodule=TextDataModule(str(corpus), block_size=8, batch_size=6))
    assert [len(losses) for losses in made[:-1]] == [2, 1] * 3
    for losses, loss in zip(made, logged, strict=False):
        torch.testing.assert_close(loss, torch.stack(losses).mean().detach(), check_dtype=False)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_validation_loader_of_the_user_has_its_own_loss(tmp_path: Path, count: int) -> None:
    """The second one was published as `train/loss_estimate`; four of them ended in an IndexError."""
    module, loaders = tiny_model(), [own_loader(3 + number) for number in range(count)]
    stopping = EarlyStopping("val/loss" if count == 1 else "val_1/loss")
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[stopping])
    trainer.fit(module, own_loader(2), loaders)
    in_fit = {name for name in trainer.callback_metrics if name.startswith("val") and name.endswith("/loss")}
    names = ["val/loss", *(f"val_{number}/loss" for number in range(1, count))]
    assert in_fit == set(names)
    assert "train/loss_estimate" not in trainer.callback_metrics
    alone = [trainer.validate(module, loader, verbose=False)[0]["val/loss"] for loader in loaders]
    together: dict[str, float] = {}
    for found in trainer.validate(module, loaders, verbose=False):
        together |= found
    assert [together[name] for name in names] == alone
    assert len(set(alone)) == count


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_processes_that_would_keep_the_trained_weights_are_refused(tmp_path: Path, strategy: str) -> None:
    """The model was untrained after the fit, without a word."""
    module = tiny_model()
    module.trainer = quiet_trainer(tmp_path, strategy=strategy, devices=2)
    module.trainer.state.fn = TrainerFn.FITTING
    with pytest.raises(UserError, match=r"choose trainer\.strategy ddp"):
        module.configure_callbacks()


def test_a_step_with_fewer_micro_batches_counts_as_a_step(tmp_path: Path, corpus: Path) -> None:
    """The last step of an epoch of three, in twos: its time was added to the next step, and a signal waited for it."""
    timed, stop = MetricsLogger(), StopBetweenSteps()
    agreed: list[int] = []

    class Signal(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                stop.received = signal.SIGTERM

        def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
            agreed.append(trainer.global_step)

    settings = {"max_steps": 9, "max_epochs": -1, "limit_train_batches": 3, "limit_val_batches": 0}
    trainer = quiet_trainer(tmp_path, accumulate_grad_batches=2, callbacks=[timed, stop, Signal()], **settings)
    with pytest.raises(SystemExit):
        trainer.fit(LitGPT(GPTConfig(**TINY)), datamodule=TextDataModule(str(corpus), block_size=8, batch_size=6))
    assert (timed.steps_timed, agreed) == (6, [6])


class Rates(pl.Callback):
    """Keeps the learning rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def own_loader(batches: int, batch_size: int = 2, sized: bool = True) -> DataLoader[Any]:
    """A DataLoader of the user, over random ids of a vocabulary of three."""
    ids = torch.randint(3, (batches * batch_size, 9), generator=torch.Generator().manual_seed(1))
    rows = TensorDataset(ids[:, :-1], ids[:, 1:])
    return DataLoader(rows if sized else Unsized(rows), batch_size)


class Unsized(IterableDataset[Any]):
    """Rows without a length."""

    def __init__(self, rows: TensorDataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def tiny_model(shape: str = "constant", **gpt: Any) -> LitGPT:
    """An untrained model of three characters."""
    settings, schedule = GPTConfig(**(TINY | gpt)), ScheduleConfig(shape=shape)  # type: ignore[arg-type]
    return LitGPT(settings, OptimizerConfig("adamw", lr=1e-2), schedule, CharTokenizer.train("abc").to_json())


def test_without_max_steps_the_rate_falls_over_the_epochs(tmp_path: Path) -> None:
    """It was 0 from the second step on."""
    runs = []
    for length in ({"max_steps": 6}, {"max_steps": -1, "max_epochs": 2}):
        rates = Rates()
        trainer = quiet_trainer(tmp_path, callbacks=[rates], accumulate_grad_batches=2, **length)
        trainer.fit(tiny_model("linear"), own_loader(5))
        assert trainer.global_step == 6, "two steps of two batches and one of one in every epoch"
        runs.append(rates.rates)
    assert runs[0] == runs[1]
    assert 0 < min(runs[1]) < max(runs[1]) == 1e-2


def test_without_max_steps_metrics_are_logged_at_their_interval(tmp_path: Path) -> None:
    """Every step was taken for the last one."""
    logger = DummyLogger()
    steps: list[int] = []
    logger.log_metrics = lambda metrics, step: steps.append(step) if "train/loss" in metrics else None  # type: ignore[method-assign]
    trainer = quiet_trainer(tmp_path, logger=logger, log_every_n_steps=3, max_steps=-1, max_epochs=2)
    trainer.fit(tiny_model(), own_loader(5))
    assert steps == [3, 6, 9, 10]


@pytest.mark.parametrize("settings", [{"max_epochs": 2}, {"max_epochs": -1}])
def test_a_schedule_over_an_unknown_number_of_steps_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    loader = own_loader(5, sized=settings["max_epochs"] == -1)
    settings |= {"max_steps": -1, "max_time": {"seconds": 1}}
    with pytest.raises(UserError, match=r"trainer\.max_steps is not set"):
        quiet_trainer(tmp_path, **settings).fit(tiny_model("linear"), loader)
    trainer = quiet_trainer(tmp_path, **settings)
    trainer.fit(tiny_model("constant"), loader)
    assert trainer.global_step >= 1


def test_validation_metrics_are_exact_over_tokens(corpus: Path, tmp_path: Path) -> None:
    """They equal those of a loop over single tokens; batches are of unequal size."""
    module, trainer = trained(corpus, tmp_path)
    data = TextDataModule(str(corpus), block_size=8, batch_size=6, eval_batch_size=5)
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    tokens = data.val_tokens.long()
    losses = []
    with torch.no_grad():
        for position in range(1, len(tokens)):
            start = (position - 1) // 8 * 8  # the window that predicts this token
            logits = module(tokens[None, start:position])[0, -1]
            losses.append(F.cross_entropy(logits, tokens[position]).item())
    mean = sum(losses) / len(losses)
    assert metrics["val/loss"] == pytest.approx(mean, rel=1e-5)
    assert metrics["val/bpc"] == pytest.approx(mean / math.log(2), rel=1e-5)
    assert metrics["val/bpb"] == pytest.approx(metrics["val/bpc"], rel=1e-9)  # ASCII: one byte a character
    assert metrics["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_loss_estimates_are_logged_for_both_parts(corpus: Path, tmp_path: Path) -> None:
    """The lecture's estimate_loss: the gap between the two curves is the lesson."""
    module = LitGPT(GPTConfig(**TINY), OptimizerConfig(name="adamw", lr=1e-2))
    trainer = quiet_trainer(tmp_path, val_check_interval=3)
    trainer.fit(module, datamodule=TextDataModule(str(corpus), block_size=8, batch_size=6, estimate_batches=4))
    metrics = trainer.callback_metrics
    assert {"val/loss", "train/loss_estimate", "val/loss_estimate"} <= metrics.keys()
    assert float(metrics["val/loss_estimate"]) == pytest.approx(float(metrics["val/loss"]), abs=0.3)
    assert float(metrics["val/loss_estimate"]) != float(metrics["train/loss_estimate"])


def test_a_checkpoint_alone_is_enough(corpus: Path, tmp_path: Path) -> None:
    """Tokenizer, architecture and weights travel in one file that loads without running anything in it."""
    module, trainer = trained(corpus, tmp_path)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    corpus.unlink()
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    loaded = LitGPT.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("rhyme")) == "rhyme"
    ids = torch.tensor([loaded.tokenizer.encode("one letter"[:8])])
    torch.testing.assert_close(loaded(ids), module.eval()(ids), rtol=0, atol=0)


def test_load_from_checkpoint_reads_every_source(corpus: Path, tmp_path: Path) -> None:
    """From a path, as text too, and from an open file; a call on an instance would lose its result and is refused."""
    module, trainer = trained(corpus, tmp_path)
    place = tmp_path / "model.ckpt"
    trainer.save_checkpoint(place)
    with open(place, "rb") as file:
        models = [LitGPT.load_from_checkpoint(source, map_location="cpu") for source in (place, str(place), file)]
    for model in models:
        for a, b in zip(model.network.parameters(), module.network.parameters(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        module.load_from_checkpoint(place)


@pytest.mark.parametrize("opened", [False, True], ids=["path", "file"])
def test_load_from_checkpoint_refuses_a_file_that_holds_code(corpus: Path, tmp_path: Path, opened: bool) -> None:
    """With gptlit's own error; only `weights_only=False` executes what is in the file."""
    _, trainer = trained(corpus, tmp_path)
    place, proof = tmp_path / "model.ckpt", tmp_path / "proof"
    trainer.save_checkpoint(place)
    torch.save(torch.load(place, weights_only=True) | {"extra": Payload(proof)}, place)
    for weights_only in ({}, {"weights_only": True}, {"weights_only": None}):
        with open(place, "rb") as file, pytest.raises(UserError, match="nothing in it was executed") as refusal:
            LitGPT.load_from_checkpoint(file if opened else place, **weights_only)
        assert isinstance(refusal.value.__cause__, pickle.UnpicklingError)
        assert "weights_only=False" not in str(refusal.value)
        assert not proof.exists()
    LitGPT.load_from_checkpoint(place, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize(
    ("content", "problem"), [(b"", "the file is empty"), (b"To be" * 99, "not a checkpoint"), (None, "cannot be read")]
)
def test_load_from_checkpoint_refuses_another_file(tmp_path: Path, content: bytes | None, problem: str) -> None:
    place = tmp_path / "model.ckpt"
    if content is not None:
        place.write_bytes(content)
    with pytest.raises(UserError, match=problem) as refusal:
        LitGPT.load_from_checkpoint(place)
    assert str(refusal.value).startswith(str(place))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


def test_first_weights_depend_on_the_seed_alone() -> None:
    """Guards against weights that change with whatever drew from torch's generator before."""
    tokenizer = CharTokenizer.train("abc").to_json()
    weights = []
    for seed, drawn_before in ((1, 0), (1, 5), (2, 0)):
        torch.rand(drawn_before)
        module = LitGPT(GPTConfig(**TINY), tokenizer=tokenizer, seed=seed)
        module.configure_model()
        weights.append(module.network.transformer["wte"].weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_building_the_network_leaves_the_random_stream_alone() -> None:
    """Guards against an architecture that changes the dropout of a run."""
    module = LitGPT(GPTConfig(**TINY), tokenizer=CharTokenizer.train("abc").to_json())
    before = torch.get_rng_state()
    module.configure_model()
    assert torch.equal(before, torch.get_rng_state())


def test_mixed_seeds_do_not_collide() -> None:
    """Neighbouring steps, ranks and seeds must not share dropout masks."""
    seeds = {mix(seed, step, rank) for seed in range(10) for step in range(100) for rank in range(4)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == 4000  # all that torch reads of them on a CPU


def test_every_bit_of_a_seed_counts_for_the_initial_weights() -> None:
    """The generator of torch on a CPU reads the last 32 bits only (findings/torch-seed-of-32-bits.sh)."""
    weights = []
    for seed in (7, 7 + 2**32, 7 + 2**40, -1, 2**32 - 1):
        module = LitGPT(GPTConfig(**TINY), tokenizer=CharTokenizer.train("abc").to_json(), seed=seed)
        module.configure_model()
        weights.append(tuple(module.network.transformer["wte"].weight.flatten().tolist()))
    assert len(set(weights)) == len(weights)


def test_a_contradicting_vocabulary_is_refused() -> None:
    """Guards against a head that is wider than the tokenizer."""
    module = LitGPT(GPTConfig(**TINY, vocab_size=7), tokenizer=CharTokenizer.train("abc").to_json())
    with pytest.raises(UserError, match="vocab_size is 7, but the tokenizer has 3"):
        module.configure_model()


def test_a_datamodule_encodes_its_text_for_each_model(corpus: Path, tmp_path: Path) -> None:
    """Ids of another tokenizer are other tokens, or none: the loss was wrong without a word."""
    text = corpus.read_text()
    models = [
        LitGPT(GPTConfig(**TINY), tokenizer=tokenizer.to_json())
        for tokenizer in (
            CharTokenizer.train(text),
            CharTokenizer.train(text + "0123"),
            BPETokenizer.train([text], 300),
        )
    ]
    for model in models:
        model.configure_model()
        with torch.no_grad():
            for parameter in model.parameters():  # initial logits are zero, whatever the ids are
                parameter.add_(torch.randn_like(parameter))
    shared = TextDataModule(str(corpus), block_size=8)
    for model in (*models, models[0]):
        losses = []
        for data in (shared, TextDataModule(str(corpus), block_size=8)):
            (metrics,) = quiet_trainer(tmp_path).validate(model, data, verbose=False)
            losses.append(metrics["val/loss"])
        assert losses[0] == losses[1]
        assert shared.tokenizer == model.tokenizer


def test_a_loss_that_is_no_number_stops_before_the_weights_change(corpus: Path, tmp_path: Path) -> None:
    """The step that would write NaN into every weight must not happen."""
    module, _ = trained(corpus, tmp_path)
    weights = [parameter.detach().clone() for parameter in module.network.parameters()]
    module.network.forward = lambda *arguments, **named: torch.tensor(torch.nan, requires_grad=True)
    second = quiet_trainer(tmp_path, limit_val_batches=0)
    with pytest.raises(FloatingPointError, match="training loss is nan at step 1"):
        second.fit(module, datamodule=TextDataModule(str(corpus), block_size=8, batch_size=6))
    assert all(torch.equal(a, b) for a, b in zip(weights, module.network.parameters(), strict=True))


def test_a_fit_with_an_average_leaves_it_in_the_model(corpus: Path, tmp_path: Path) -> None:
    """Guards against sampling, from Python, from other weights than the validated ones."""

    class Validated(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.weights = [p.detach().clone() for p in pl_module.parameters()]

    validated = Validated()
    module = LitGPT(GPTConfig(**TINY), OptimizerConfig(name="adamw"))
    trainer = quiet_trainer(tmp_path, max_steps=5, val_check_interval=5, callbacks=[AverageWeights(0.9), validated])
    trainer.fit(module, datamodule=TextDataModule(str(corpus), block_size=8, batch_size=6))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), validated.weights, strict=True))


def test_the_average_is_what_its_formula_says(corpus: Path, tmp_path: Path) -> None:
    """Guards against an average that lags by a step or starts at 0."""

    class Formula(pl.Callback):
        average: list[torch.Tensor]

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
            weights, t = [p.detach().double() for p in pl_module.parameters()], trainer.global_step - 1
            kept = min(0.3, (1 + t) / (10 + t)) if t else 0.0
            before = self.average if t else weights
            self.average = [kept * a + (1 - kept) * w for a, w in zip(before, weights, strict=True)]

    formula, module = Formula(), LitGPT(GPTConfig(**TINY), OptimizerConfig(name="adamw"))
    trainer = quiet_trainer(tmp_path, max_steps=6, val_check_interval=6, callbacks=[AverageWeights(0.3), formula])
    trainer.fit(module, datamodule=TextDataModule(str(corpus), block_size=8, batch_size=6))
    for weight, average in zip(module.parameters(), formula.average, strict=True):
        torch.testing.assert_close(weight.double(), average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("precision", "weights", "average"),
    [("bf16-true", torch.bfloat16, torch.float32), ("64-true", torch.float64, torch.float64)],
)
def test_an_average_keeps_its_digits_in_every_precision(
    corpus: Path, tmp_path: Path, precision: str, weights: torch.dtype, average: torch.dtype
) -> None:
    """An average in bfloat16 would stay where it is, and validations must round neither the weights nor the average."""
    states = []
    for interval in (12, 1):  # validations at the end, and after every step
        averaging = AverageWeights(0.99)
        module = LitGPT(GPTConfig(**TINY), OptimizerConfig(name="adamw", lr=1e-2))
        settings = {"max_steps": 12, "val_check_interval": interval, "precision": precision}
        trainer = quiet_trainer(tmp_path, callbacks=[averaging], **settings)
        trainer.fit(module, datamodule=TextDataModule(str(corpus), block_size=8, batch_size=6))
        path = tmp_path / f"{interval}.ckpt"
        trainer.save_checkpoint(path)
        checkpoint = torch.load(path, weights_only=True)
        assert {part.dtype for part in module.parameters()} == {weights}
        assert averaging._average_model is not None
        states.append([part.detach().clone() for part in averaging._average_model.module.parameters()])
        assert {part.dtype for part in states[-1]} == {average}
        assert set(checkpoint["state_dict"]) == set(dict(module.named_parameters()))
    assert all(map(torch.equal, *states))


def test_shards_are_not_filled_with_an_average() -> None:
    """A strategy that spreads weights reads the file by itself, and would take the average for the weights."""
    module = LitGPT(GPTConfig(**TINY))
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), callbacks=[], accumulate_grad_batches=1)
    module._trainer = trainer  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"average\.decay"):
        module.on_load_checkpoint({"current_model_state": {}})


def test_a_time_limit_counts_from_each_start(corpus: Path, tmp_path: Path) -> None:
    """Lightning restores the time that its Timer has counted: with the limit used up, no step would be made."""
    module, trainer = trained(corpus, tmp_path, max_steps=2, max_time={"hours": 1})
    path = tmp_path / "limit.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"] = 7200.0  # two hours
    torch.save(checkpoint, path)
    again = quiet_trainer(tmp_path, max_steps=5, max_time={"hours": 1})
    fresh = LitGPT(module.gpt, module.optimizer_config, module.schedule)
    again.fit(fresh, datamodule=trainer.datamodule, ckpt_path=path)
    assert again.global_step == 5


def test_predict_step_generates_what_generate_does(corpus: Path, tmp_path: Path) -> None:
    """The command, the samples of a fit and Python give the same text."""
    from gptlit import generate

    module, _ = trained(corpus, tmp_path)
    module.generation_config = GenerationConfig(
        max_new_tokens=30, sampling=Sampling(temperature=0.7), num_samples=2, seed=5
    )
    prompt = module.tokenizer.encode("one ")
    rows = module.predict_step([prompt])
    ids = torch.stack(list(generate(module.network, [prompt], 30, Sampling(temperature=0.7), num_samples=2, seed=5)), 1)
    assert [row.text for row in rows] == [module.tokenizer.decode(row) for row in ids.tolist()]


def test_precision_of_products_is_put_back(corpus: Path, tmp_path: Path) -> None:
    """Torch keeps it for the whole process: training must not leave it changed."""
    module = LitGPT(GPTConfig(**TINY), OptimizerConfig(name="adamw"), matmul_precision="medium")
    seen = []
    module.on_train_start = lambda: seen.append(torch.get_float32_matmul_precision())
    quiet_trainer(tmp_path).fit(module, datamodule=TextDataModule(str(corpus), block_size=8, batch_size=6))
    assert seen == ["medium"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_run_can_start_from_the_weights_of_another(corpus: Path, tmp_path: Path) -> None:
    """Weights, architecture and tokenizer come from the source; the new checkpoint stands alone."""
    first, trainer = trained(corpus, tmp_path)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = LitGPT(GPTConfig(block_size=8, dropout=0.1), init_from=str(tmp_path / "first.ckpt"))
    second.configure_model()
    assert (second.gpt.n_embd, second.gpt.dropout) == (first.gpt.n_embd, 0.1)
    for ours, theirs in zip(second.network.parameters(), first.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    again = quiet_trainer(tmp_path)
    again.fit(second, datamodule=TextDataModule(str(corpus), block_size=8, batch_size=6))
    again.save_checkpoint(tmp_path / "second.ckpt")
    (tmp_path / "first.ckpt").unlink()
    loaded = LitGPT.load_from_checkpoint(tmp_path / "second.ckpt", weights_only=True)
    content = torch.load(tmp_path / "second.ckpt", weights_only=True)["gptlit"]
    assert content["init_from"] == loaded.origin["init_from"] == str(tmp_path / "first.ckpt")


class Masks(pl.Callback):
    """Keeps (epoch, batch, step) of every micro-batch, and the seed of its dropout."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int, int]] = []
        self.seeds: list[int] = []

    def on_before_zero_grad(self, *_: Any) -> None:
        self.seeds.append(torch.random.default_generator.initial_seed())

    def on_train_batch_end(self, trainer: pl.Trainer, _m: Any, _o: Any, _b: Any, batch_idx: int) -> None:
        self.places.append((trainer.current_epoch, batch_idx, trainer.global_step))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_micro_batch_has_its_own_dropout_masks(corpus: Path, tmp_path: Path, own: bool, accumulate: int) -> None:
    """They were the same in every epoch."""
    seeds: list[int] = []

    class Watched(LitGPT):
        def training_step(self, *arguments: Any) -> torch.Tensor:
            seeds.append(torch.random.default_generator.initial_seed())
            return super().training_step(*arguments)

    data: dict[str, Any] = {"train_dataloaders": own_loader(5)}
    if not own:
        data = {"datamodule": TextDataModule(str(corpus), block_size=8, batch_size=4)}
    epochs = {"max_steps": 9, "max_epochs": -1, "limit_train_batches": 3, "limit_val_batches": 0}
    module = Watched(GPTConfig(**TINY, dropout=0.1), tokenizer=tiny_model().hparams["tokenizer"] if own else None)
    quiet_trainer(tmp_path, accumulate_grad_batches=accumulate, **epochs).fit(module, **data)
    assert len(set(seeds)) == len(seeds) > 3


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("length", [{"max_steps": -1, "max_epochs": 3}, {"max_steps": 13, "max_epochs": 3}])
def test_a_run_of_several_epochs_continues_in_its_epoch(
    tmp_path: Path, accumulate: int, length: dict[str, Any]
) -> None:
    """It began again with epoch 0, and made more steps."""
    places = tmp_path / "places"
    save = ModelCheckpoint(places, "{epoch}-{step}", save_top_k=-1, every_n_train_steps=1)
    end = ModelCheckpoint(places, "end-{epoch}-{step}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = Masks()
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, **length}
    saving = quiet_trainer(tmp_path, callbacks=[whole, save, end], enable_checkpointing=True, **settings)
    saving.fit(tiny_model(dropout=0.1), own_loader(5))
    files = [path for path in places.iterdir() if not path.stem.endswith(f"step={saving.global_step}")]
    assert len(files) == saving.global_step - 1 + 2, "after every step, and at the end of two epochs"
    for path in files:
        step = torch.load(path, weights_only=True)["global_step"]
        rest = Masks()
        trainer = quiet_trainer(tmp_path, callbacks=[rest], **settings)
        trainer.fit(tiny_model(dropout=0.1), own_loader(5), ckpt_path=path)
        after = next(index for index, place in enumerate(whole.places) if place[2] == step) + 1
        assert rest.places == whole.places[after:], path.name
        assert rest.seeds == whole.seeds[-len(rest.seeds) :]
        assert (trainer.global_step, trainer.current_epoch) == (saving.global_step, saving.current_epoch)


def test_a_run_cut_off_by_max_steps_continues_in_its_epoch(tmp_path: Path) -> None:
    """Lightning counts an epoch as done that max_steps has cut off."""
    place = tmp_path / "cut.ckpt"
    first = quiet_trainer(tmp_path, max_steps=14, max_epochs=3)
    first.fit(tiny_model(), own_loader(10))
    first.save_checkpoint(place)
    rest = Masks()
    trainer = quiet_trainer(tmp_path, max_steps=-1, max_epochs=3, callbacks=[rest])
    trainer.fit(tiny_model(), own_loader(10), ckpt_path=place)
    assert rest.places[0] == (1, 4, 15)
    assert trainer.global_step == 30


def test_a_longer_run_on_a_datamodule_stays_one_epoch(corpus: Path, tmp_path: Path) -> None:
    module, trainer = trained(corpus, tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    rest = Masks()
    longer = quiet_trainer(tmp_path, max_steps=6, max_epochs=1, callbacks=[rest])
    fresh = LitGPT(module.gpt, module.optimizer_config, module.schedule)
    longer.fit(fresh, datamodule=trainer.datamodule, ckpt_path=tmp_path / "done.ckpt")
    assert rest.places == [(0, 3, 4), (0, 4, 5), (0, 5, 6)]
