"""Training whose passes and update are recorded: the same run as without, and when it is not recorded.

Without a GPU a tape stands in for the recordings. Like them it reads and writes fixed places in memory, runs nothing
while it is made that would not be undone, and leaves the names that Python has for gradients as they are.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from command import At, digest, extra_callbacks, gptlit, load, write_config
from torch import Tensor

from gptlit.data.chunks import RandomChunks
from gptlit.device.cuda_graphs import Recorder
from gptlit.device.processes import blank_batch
from gptlit.device.seeds import seed_device
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.optim import OptimizerConfig, build_optimizer
from gptlit.training.compiling import compile_training
from gptlit.training.cuda_graphs import RecordedStep, rates_in_memory, record_training

# Rates that float32 holds exactly: then a recorded update, which reads them from memory, rounds like the other.
EXACT = {
    "model__optimizer__lr": 2**-8,
    "model__optimizer__weight_decay": 0.125,
    "model__optimizer__muon_lr": 2**-6,
    "model__optimizer__muon_weight_decay": 0.125,
    "model__schedule__shape": "constant",
    "model__schedule__warmup_steps": 0,
}
ON_GPU = {"trainer__accelerator": "gpu", "trainer__deterministic": True}
SMALL = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.25)


def gpu(test: Any) -> Any:
    """Marks a test that needs one."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


def on_tape(recorder: Recorder, work: Callable[[], Any]) -> Callable[[], Any]:
    """Stands in for `Recorder.capture`."""
    step: RecordedStep = work.__self__  # type: ignore[attr-defined]
    result = work()
    place = result.clone() if isinstance(result, Tensor) else None
    places = [p.grad for p in step.parameters]

    def play() -> Any:
        named = [p.grad for p in step.parameters]
        for parameter, gradient in zip(step.parameters, places, strict=True):
            parameter.grad = gradient
        with rates_in_memory(step.optimizer, step.rates):
            fresh = work()
        for parameter, gradient, name in zip(step.parameters, places, named, strict=True):
            if parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = name
        return None if place is None else place.copy_(fresh)

    return play


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> list[RecordedStep]:
    """Lets a CPU record, without compiling; the steps that were recorded."""
    made: list[RecordedStep] = []
    record = RecordedStep.record
    monkeypatch.setattr(RecordedStep, "record", lambda self: made.append(self) or record(self))
    monkeypatch.setattr(RecordedStep, "serves", staticmethod(lambda device: True))
    monkeypatch.setattr(Recorder, "capture", on_tape)
    monkeypatch.setattr("gptlit.training.module.compile_training", lambda network, forward: "compiled in 0 s")
    return made


def numbers(run: Path) -> list[str]:
    """The rows of metrics.csv without what is timed."""
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    kept = [column for column, name in enumerate(header) if not name.startswith("perf/")]
    return [",".join(row[column] for column in kept) for row in (header, *rows)]


def fit(config: Path, run: Path, compiled: str = "graphs", *flags: object) -> str:
    """A whole run; what it said."""
    answer = gptlit("fit", "--config", config, "--run_dir", run, "--model.compile", compiled, *flags)
    assert answer.code == 0
    return answer.err


# ---------------------------------------------------------------- the same run


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_recorded_run_is_the_run(name: str, tape: list[RecordedStep], tmp_path: Path) -> None:
    """To the last bit: dropout, clipping, validations in between, an average of the weights, and all that is logged."""
    config = write_config(tmp_path, **EXACT, model__optimizer__name=name, average__decay=0.9)
    assert "recorded as CUDA graphs in" in fit(config, tmp_path / "recorded")
    assert "CUDA graphs" not in fit(config, tmp_path / "plain", "false")
    assert len(tape) == 1
    assert digest(tmp_path / "recorded" / "last.ckpt") == digest(tmp_path / "plain" / "last.ckpt")
    assert numbers(tmp_path / "recorded") == numbers(tmp_path / "plain")


def test_a_recorded_run_resumes_bit_for_bit(tape: list[RecordedStep], tmp_path: Path) -> None:
    """Guards against a recording that changes what it begins from, such as the optimizer's loaded state."""
    config = write_config(tmp_path, **EXACT)
    fit(config, tmp_path / "whole")
    fit(config, tmp_path / "cut", "graphs", "--trainer.max_steps", 11)
    assert gptlit("fit", "--ckpt_path", tmp_path / "cut", "--trainer.max_steps", 20).code == 0
    assert len(tape) == 3
    assert digest(tmp_path / "cut" / "last.ckpt") == digest(tmp_path / "whole" / "last.ckpt")


@pytest.mark.usefixtures("tape")
def test_a_recorded_run_follows_the_schedule(tmp_path: Path) -> None:
    """Guards against rates that stay what they were when the update was recorded; outside they are plain numbers."""
    config = write_config(tmp_path)
    fit(config, tmp_path / "recorded")
    fit(config, tmp_path / "plain", "false")
    recorded, plain = (load(tmp_path / name / "last.ckpt") for name in ("recorded", "plain"))
    for name, weight in plain["state_dict"].items():
        torch.testing.assert_close(recorded["state_dict"][name], weight, rtol=1e-3, atol=1e-5)
    assert recorded["optimizer_states"][0]["param_groups"] == plain["optimizer_states"][0]["param_groups"]


class Poison(pl.Callback):
    """Makes a weight infinite before a step, and keeps the weights as they are then."""

    def __init__(self, step: int) -> None:
        self.step, self.weights = step, {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.network.lm_head.weight[0, 0] = torch.inf
            self.weights = {name: weight.clone() for name, weight in pl_module.network.named_parameters()}
            self.network = pl_module.network


@pytest.mark.usefixtures("tape")
def test_a_recorded_loss_that_is_no_number_stops_before_the_weights_change(tmp_path: Path) -> None:
    poison = Poison(4)
    config = write_config(tmp_path)
    with extra_callbacks(poison):
        answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run", "--model.compile", "graphs")
    assert answer.code == 1
    assert "at step 5: the run stopped before the weights were touched" in answer.err
    for name, weight in poison.network.named_parameters():
        assert torch.equal(weight, poison.weights[name]), name


class Move(pl.Callback):
    """Puts the weights elsewhere in memory before a step."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 7:
            self.old = [p.data for p in pl_module.network.parameters()]  # kept, so that their memory stays theirs
            for parameter in pl_module.network.parameters():
                parameter.data = parameter.data.clone()


def test_weights_that_move_are_followed(tape: list[RecordedStep], tmp_path: Path) -> None:
    """Guards against an update of memory that is nobody's any more."""
    config = write_config(tmp_path, **EXACT)
    with extra_callbacks(Move()):
        fit(config, tmp_path / "recorded")
    fit(config, tmp_path / "plain", "false")
    assert len(tape) == 2
    assert digest(tmp_path / "recorded" / "last.ckpt") == digest(tmp_path / "plain" / "last.ckpt")


def test_after_a_fit_nothing_is_left_of_the_recording(tape: list[RecordedStep], tmp_path: Path) -> None:
    """Its memory, and the optimizer's step that plays it."""
    fit(write_config(tmp_path, trainer__max_steps=2), tmp_path / "run")
    (step,) = tape
    assert "step" not in vars(step.optimizer)
    assert all(p.grad is None for p in step.parameters)


# ---------------------------------------------------------------- when a step is recorded


def test_where_recording_fails_the_run_goes_on_without(
    tape: list[RecordedStep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says why; weights, optimizer and random numbers are what they would have been."""

    def fail(recorder: Recorder, work: Callable[[], Any]) -> Any:
        work()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(Recorder, "capture", fail)
    config = write_config(tmp_path)
    err = fit(config, tmp_path / "recorded")
    line = (
        "not recorded as CUDA graphs, which is slower but changes nothing else: RuntimeError: operation not permitted "
    )
    assert err.count(line + "when stream is capturing\n") == 1
    fit(config, tmp_path / "plain", "false")
    assert digest(tmp_path / "recorded" / "last.ckpt") == digest(tmp_path / "plain" / "last.ckpt")


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer__accumulate_grad_batches": 2},
        {"trainer__precision": "bf16-true"},
        {"trainer__detect_anomaly": True},
        {"model__checkpoint_activations": True},
    ],
    ids=str,
)
def test_what_cannot_be_recorded_is_not_tried(
    changes: dict[str, Any], tape: list[RecordedStep], tmp_path: Path
) -> None:
    """And it is said, since it was asked for."""
    config = write_config(tmp_path, **changes, trainer__max_steps=2)
    assert "not recorded as CUDA graphs: that takes one CUDA device" in fit(config, tmp_path / "run")
    assert not tape


def test_only_a_gpu_records_training() -> None:
    assert not RecordedStep.serves(torch.device("cpu"))
    assert not RecordedStep.serves(torch.device("mps"))
    assert RecordedStep.serves(torch.device("cuda", 1))


# ---------------------------------------------------------------- the step alone


def parts(
    device: str = "cpu", config: GPTConfig = SMALL
) -> tuple[GPT, Callable[..., Tensor], tuple[Tensor, Tensor], torch.optim.Optimizer]:
    """A network, its loss, a blank batch and an optimizer."""
    torch.manual_seed(0)
    network = GPT(config).to(device)
    with torch.no_grad():
        network.lm_head.weight.normal_(std=0.1)
    optimizer = build_optimizer(network, OptimizerConfig(), fused=True)

    def loss_fn(inputs: Tensor, targets: Tensor) -> Tensor:
        return network.train()(inputs, targets=targets)

    return network, loss_fn, blank_batch(4, config.block_size, torch.device(device)), optimizer


@pytest.mark.usefixtures("tape")
def test_recording_leaves_everything_as_it_was() -> None:
    """Weights, rates, and the stream of random numbers; what state is made begins with zeros."""
    _, loss_fn, batch, optimizer = parts()
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    settings, random = [dict(group) for group in optimizer.param_groups], torch.get_rng_state()
    recorded = RecordedStep(loss_fn, batch, optimizer)
    assert torch.equal(torch.get_rng_state(), random)
    assert [dict(group) for group in optimizer.param_groups] == settings
    assert all(torch.equal(p, weight) for p, weight in zip(recorded.parameters, weights, strict=True))
    state = [value for p in recorded.parameters for value in optimizer.state[p].values()]
    assert state
    assert not any(value.any() for value in state)


@pytest.mark.usefixtures("tape")
def test_another_shape_is_refused() -> None:
    """Guards against one row that is trained on many times over, since copying would repeat it."""
    _, loss_fn, batch, optimizer = parts()
    recorded = RecordedStep(loss_fn, batch, optimizer)
    row = torch.zeros(1, SMALL.block_size, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"recorded for \(4, 8\) tokens, not \(1, 8\)"):
        recorded(row, row)


def test_a_blank_batch_lies_in_memory_as_a_real_one() -> None:
    """Guards against compiling twice, the second time on the clock of the first step."""
    chunks = RandomChunks(torch.arange(100), block_size=8, batch_size=4, seed=1)
    for blank, real in zip(blank_batch(4, 8, torch.device("cpu")), chunks[0], strict=True):
        assert (blank.shape, blank.stride(), blank.dtype) == (real.shape, real.stride(), real.dtype)
        assert blank.storage_offset() == real.storage_offset()


# ---------------------------------------------------------------- on a GPU


def ids_on_gpu(seed: int) -> tuple[Tensor, Tensor]:
    """A batch for `SMALL`."""
    generator = torch.Generator().manual_seed(seed)
    chunk = torch.randint(SMALL.vocab_size, (4, SMALL.block_size + 1), generator=generator).cuda()
    return chunk[:, :-1], chunk[:, 1:]


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch, in_any_order_again: None) -> Iterator[list[Any]]:
    """The steps that were recorded on a GPU, without compiling, and not kept alive by it."""
    made: list[Any] = []
    record = RecordedStep.record
    monkeypatch.setattr(RecordedStep, "record", lambda self: record(self) or made.append(weakref.ref(self)))
    monkeypatch.setattr("gptlit.training.module.compile_training", lambda network, forward: "compiled in 0 s")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield made
    gc.collect()


@gpu
@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_recorded_run_on_a_gpu_is_the_run(name: str, precision: str, recordings: list[Any], tmp_path: Path) -> None:
    """Kernels, masks of dropout and rates are the same: so are all numbers that are logged, and the weights."""
    changes = {"model__optimizer__name": name, "trainer__precision": precision, "average__decay": 0.9}
    config = write_config(tmp_path, **EXACT, **ON_GPU, **changes)
    assert "recorded as CUDA graphs in" in fit(config, tmp_path / "recorded")
    assert len(recordings) == 1
    fit(config, tmp_path / "plain", "false")
    assert numbers(tmp_path / "recorded") == numbers(tmp_path / "plain")
    assert digest(tmp_path / "recorded" / "last.ckpt") == digest(tmp_path / "plain" / "last.ckpt")


@gpu
def test_weights_that_move_on_a_gpu_are_followed(recordings: list[Any], tmp_path: Path) -> None:
    """A second recording, on another stream, while the first one is still there."""
    config = write_config(tmp_path, **EXACT, **ON_GPU)
    with extra_callbacks(Move()):
        fit(config, tmp_path / "recorded")
    fit(config, tmp_path / "plain", "false")
    assert len(recordings) == 2
    assert digest(tmp_path / "recorded" / "last.ckpt") == digest(tmp_path / "plain" / "last.ckpt")


@gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_every_recorded_step_drops_what_its_seed_says(compiled: bool) -> None:
    """Guards against one mask for the whole run; loss and gradients are those of a step that is not recorded."""
    network, loss_fn, batch, optimizer = parts("cuda", replace(SMALL, attention_dropout=0.25, token_noise=0.1))
    if compiled:
        assert compile_training(network, lambda: loss_fn(*batch)).startswith("compiled in")
    recorded, (inputs, targets) = RecordedStep(loss_fn, batch, optimizer), ids_on_gpu(3)

    def played(seed: int | None) -> tuple[Tensor, list[Tensor]]:
        if seed is not None:
            seed_device(inputs.device, seed)
        loss = recorded(inputs, targets).clone()
        recorded.backward()
        return loss, [gradient.clone() for gradient in recorded.gradients]

    (first, gradients), (moved, _), (other, _), (again, same) = (played(seed) for seed in (1, None, 2, 1))
    assert len({first.item(), moved.item(), other.item()}) == 3
    assert first == again
    seed_device(inputs.device, 1)
    optimizer.zero_grad(set_to_none=True)
    loss = loss_fn(inputs, targets)
    loss.backward()
    torch.testing.assert_close(first, loss.detach())
    for parameter, gradient, once_more in zip(recorded.parameters, gradients, same, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
        torch.testing.assert_close(gradient, once_more)


@gpu
@pytest.mark.usefixtures("in_any_order_again")
def test_a_compiled_and_recorded_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """All steps, the first after resuming among them, are played from the same kind of recording."""
    config = write_config(tmp_path, **ON_GPU, trainer__precision="bf16-mixed", model__schedule__shape="constant")
    err = fit(config, tmp_path / "whole")
    assert "recorded as CUDA graphs in" in err
    fit(config, tmp_path / "cut", "graphs", "--trainer.max_steps", 11)
    assert gptlit("fit", "--ckpt_path", tmp_path / "cut", "--trainer.max_steps", 20).code == 0
    assert numbers(tmp_path / "cut")[-1] == numbers(tmp_path / "whole")[-1]
    assert digest(tmp_path / "cut" / "last.ckpt") == digest(tmp_path / "whole" / "last.ckpt")


@gpu
@pytest.mark.usefixtures("recordings")
def test_recorded_training_never_waits_for_the_device(tmp_path: Path) -> None:
    """Guards against a copy to the host in every step, which would leave the device idle after each."""
    changes = {"trainer__max_steps": 30, "trainer__log_every_n_steps": 30, "trainer__val_check_interval": 30}
    changes |= {"average__decay": 0.9}
    config = write_config(tmp_path, **changes, trainer__accelerator="gpu", trainer__precision="bf16-mixed")
    watch = (
        At("on_train_batch_start", 5, lambda: torch.cuda.set_sync_debug_mode("error")),
        At("on_train_batch_start", 25, lambda: torch.cuda.set_sync_debug_mode("default")),
    )
    try:
        with extra_callbacks(*watch):
            err = fit(config, tmp_path / "run", "graphs", "--save_every_n_steps", 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert err.count("synchroniz") == 0
    assert all(callback.done for callback in watch)


@gpu
def test_what_cannot_be_recorded_is_trained_all_the_same() -> None:
    """A failure in the middle of recording must leave the generator, the streams and the optimizer usable."""
    network, loss_fn, batch, optimizer = parts("cuda")
    weights = [p.detach().clone() for p in network.parameters()]

    def asks_the_device(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = loss_fn(inputs, targets)
        return loss if loss.item() > 0 else -loss

    recorded, said = record_training(asks_the_device, batch, optimizer)
    assert recorded is None
    assert said.startswith("not recorded as CUDA graphs")
    assert all(torch.equal(p, weight) for p, weight in zip(network.parameters(), weights, strict=True))
    loss_fn(*ids_on_gpu(1)).backward()
    optimizer.step()
    assert torch.rand(3, device="cuda").shape == (3,)
    again, said = record_training(loss_fn, batch, optimizer)
    assert said.startswith("recorded as CUDA graphs in")
    assert again is not None
    assert again(*ids_on_gpu(1)).isfinite()


@gpu
@pytest.mark.usefixtures("recordings")
def test_memory_of_recordings_goes_with_their_run(tmp_path: Path) -> None:
    """Several fits in one process, as in a notebook."""
    config, held = write_config(tmp_path, trainer__accelerator="gpu", trainer__max_steps=3), []
    for turn in range(4):
        fit(config, tmp_path / f"run{turn}")
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_allocated())
    assert held[1:] == held[1:2] * 3
