"""LitGPT: the GPT as a LightningModule, with its steps, its metrics, its optimizer and its own tokenizer."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from gptlit.convert.pretrained import Pretrained, fit_to, load_pretrained
from gptlit.device.processes import HostCopy, blank_batch, mean_over_processes
from gptlit.device.seeds import mix, seed_device
from gptlit.errors import UserError
from gptlit.generation.text import GeneratedText, GenerationConfig, TextSink, generate_texts
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.optim import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate_factor, parameter_groups
from gptlit.tokenizer import Tokenizer, from_json
from gptlit.training.compiling import Mode, compile_training, compiling_pays
from gptlit.training.lightning_internals import (
    callbacks_of,
    datamodule_of,
    set_progress_to_step_boundary,
    trainer_of,
)
from gptlit.version import __version__

ESTIMATES = ("train/loss_estimate", "val/loss_estimate")  # in the order of the validation loaders after the first


class LitGPT(pl.LightningModule):
    """Trains and validates a `GPT`; a checkpoint of it holds everything that sampling needs.

    The network is built in `configure_model`, as soon as the tokenizer is known: from the hyper-parameters of a
    checkpoint, or, the first time, from the DataModule.

    Args:
        gpt: the architecture.
        optimizer: AdamW or Muon, with their rates and what decays.
        schedule: the learning rate over the run.
        tokenizer: JSON of the tokenizer; null takes it from the data.
        init_from: where the first weights come from: a GPT-2 or NanoChat folder or id of Hugging Face, another run of
            gptlit, or nanoGPT's ckpt.pt. Architecture and tokenizer come with them; of `gpt`, `block_size`, the
            dropouts and `token_noise` count. The optimizer starts afresh.
        seed: fixes the first weights and the dropout; the command takes it from `seed_everything`.
        compile: compile blocks, head and loss with torch.compile while training; where that fails, a line says why and
            training runs eagerly. `auto` compiles where the run is long enough
            (`gptlit.training.compiling.compiling_pays`). `reduce-overhead` is torch.compile's mode of that name (CUDA
            graphs), meant for small models on a GPU; not measured.
        checkpoint_activations: keep only what goes into each block, and compute the rest again in the backward pass:
            a third more time for a fraction of the memory (arXiv:1604.06174).
        matmul_precision: how float32 matrix products may round, as in torch.set_float32_matmul_precision: `medium`
            lets a CPU with bfloat16 units (AMX) and a GPU use them, which halves the time of a step.
    """

    def __init__(
        self,
        gpt: GPTConfig = GPTConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(),
        tokenizer: str | None = None,
        init_from: str | None = None,
        seed: int = 1337,
        compile: bool | Literal["auto", "reduce-overhead"] = False,
        checkpoint_activations: bool = False,
        matmul_precision: Literal["highest", "high", "medium"] = "highest",
    ) -> None:
        super().__init__()
        self.gpt = GPTConfig(**gpt) if isinstance(gpt, Mapping) else gpt
        self.optimizer_config = OptimizerConfig(**optimizer) if isinstance(optimizer, Mapping) else optimizer
        self.schedule = ScheduleConfig(**schedule) if isinstance(schedule, Mapping) else schedule
        self.tokenizer: Tokenizer | None = None if tokenizer is None else from_json(tokenizer)
        self._start: Pretrained | None = None
        if init_from is not None:
            kept = ("block_size", "dropout", "attention_dropout", "embedding_dropout", "token_noise")
            self._start = fit_to(load_pretrained(init_from), **{name: getattr(self.gpt, name) for name in kept})
            self.gpt = self._start.gpt
            self.tokenizer = self.tokenizer or self._start.tokenizer
        self.seed = seed
        self.compile_network = compile
        self.checkpoint_activations = checkpoint_activations
        self.matmul_precision = matmul_precision
        self._precision_before: str | None = None
        self.net: GPT | None = None
        self.grad_norm: Tensor | None = None  # of the last optimizer step, before clipping
        self.train_loss: Tensor | None = None  # of the last step: mean over its micro-batches and all processes
        self.generation_config = GenerationConfig()
        self.text_sink: TextSink | None = None  # receives the text of predict_step while it is sampled
        self.weights_step: int | None = None  # the step that the weights belong to once the optimizer is done
        self.run_config: str | None = None  # YAML of the whole run, kept in the checkpoint
        self._micro_losses: list[Tensor] = []
        self._loss_ahead: HostCopy | None = None  # the training loss on its way to the host
        self.val_loss = MeanMetric()
        self.val_chars = MeanMetric()  # characters per token
        self.estimates: Any = nn.ModuleList(MeanMetric() for _ in ESTIMATES)
        # Plain types only: a checkpoint must load with weights_only=True.
        self.save_hyperparameters(
            {
                "gpt": asdict(self.gpt),
                "optimizer": plain(asdict(self.optimizer_config)),
                "schedule": asdict(self.schedule),
                "tokenizer": tokenizer,
                "init_from": None,  # the weights are in the checkpoint
                "seed": seed,
                "compile": compile,
                "checkpoint_activations": checkpoint_activations,
                "matmul_precision": matmul_precision,
            },
            logger=False,
        )

    # ---------------------------------------------------------------- the network

    def configure_model(self) -> None:
        """Builds the network once the tokenizer is known. Called by Lightning before weights are restored.

        Raises:
            UserError: when `model.gpt.vocab_size` contradicts the tokenizer, or no tokenizer is to be had.
        """
        if self.net is not None:
            return
        if self.tokenizer is None:
            datamodule = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
            self.tokenizer = getattr(datamodule, "tokenizer", None)
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer: train it with a TextDataModule, or hand it one as JSON")
        size = self.tokenizer.vocab_size
        if self._start is not None:
            self._start = fit_to(self._start, vocab_size=size)
            self.gpt = self._start.gpt
        check_vocabulary(self.gpt, size)
        self.gpt = replace(self.gpt, vocab_size=size)
        self.hparams["gpt"], self.hparams["tokenizer"] = asdict(self.gpt), self.tokenizer.to_json()
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.seed)
            self.net = GPT(self.gpt)
        self.net.checkpoint_activations = self.checkpoint_activations
        if self._start is not None:
            self.net.load_state_dict(self._start.state_dict())
            self._start = None
        self.chars_per_token: Tensor
        self.register_buffer("chars_per_token", torch.tensor(self.tokenizer.chars_per_token()), persistent=False)
        if self.device_mesh is not None:  # of ModelParallelStrategy
            shard(self.net, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Sets the precision of float32 products for this stage; torch keeps it for the whole process."""
        if stage != "predict":
            self._precision_before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(self.matmul_precision)

    def teardown(self, stage: str) -> None:
        """Puts the precision back."""
        if self._precision_before is not None:
            torch.set_float32_matmul_precision(self._precision_before)
            self._precision_before = None

    @property
    def network(self) -> GPT:
        """The GPT; an error before `configure_model` has run."""
        if self.net is None:
            raise RuntimeError("the network is not built yet: Trainer.fit or configure_model() builds it")
        return self.net

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        return self.network(ids)

    # ---------------------------------------------------------------- training

    @property
    def mid_step(self) -> bool:
        """Whether the weights may be half old and half new, or newer than the count of steps."""
        return self.weights_step not in (None, self.global_step)

    def on_train_start(self) -> None:
        """Forgets what an earlier fit left, and compiles if asked to."""
        self.weights_step = self._loss_ahead = None
        self._micro_losses.clear()
        if self.global_step:  # the rates that the last step had: another callback may read them before the next one
            self._set_rates(self.trainer.optimizers[0], self.global_step - 1)
        if self.compile_network:
            self.compile_before_training()

    def compile_before_training(self) -> None:
        """Compiles on a batch of the right shape, so that a failure costs nothing and the clock has not started."""
        data = datamodule_of(self.trainer)
        share = data.batch_size // self.trainer.world_size
        tokens = share * data.block_size
        if self.compile_network == "auto" and not compiling_pays(
            self.network, tokens, self.trainer.max_steps, self.device
        ):
            return
        micro = share // self.trainer.accumulate_grad_batches
        batch = blank_batch(micro, data.block_size, self.device)

        def loss_fn(inputs: Tensor, targets: Tensor) -> Tensor:
            with self.trainer.precision_plugin.forward_context():
                return self.network.train()(inputs, targets=targets)

        mode: Mode = "reduce-overhead" if self.compile_network == "reduce-overhead" else "default"
        outcome = compile_training(self.network, lambda: loss_fn(*batch), mode)
        if self.trainer.is_global_zero:
            print(outcome, file=sys.stderr)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds dropout from (seed, step, micro-batch, rank), so that a resumed run draws the same masks."""
        if self.gpt.draws_in_training:
            seed_device(self.device, mix(self.seed, batch_idx, self.global_rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy (nats per token) of a micro-batch."""
        inputs, targets = batch  # (B, T) each
        if self.compile_network == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # from here on, results of the last step may be overwritten
        loss: Tensor = self.network(inputs, targets=targets)
        self._micro_losses.append(loss.detach().clone())  # a CUDA graph writes the next loss into the same memory
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.train_loss = mean_over_processes(torch.stack(self._micro_losses).mean())
            self._micro_losses.clear()
            self._loss_ahead = HostCopy(self.train_loss)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stops before the weights are touched when the loss is no number.

        Raises:
            FloatingPointError: names the step and what usually helps.
        """
        loss = self._loss_ahead.item() if self._loss_ahead is not None else 0.0
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss} at step {self.global_step + 1}: the run stopped before the weights were "
                "touched; lower model.optimizer.lr, or set trainer.gradient_clip_val"
            )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by norm and keeps the norm, of shards too; leaves other algorithms and strategies to Lightning."""
        by_norm = gradient_clip_val and gradient_clip_algorithm in (None, "norm")
        if by_norm and isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, float(gradient_clip_val or 0.0))
            self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.weights_step = self.global_step + 1  # in the last hook before the weights change

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """One optimizer step at the rate that the schedule gives for it: a function of the step alone."""
        self._set_rates(optimizer, self.global_step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def _set_rates(self, optimizer: Any, step: int) -> None:
        factor = learning_rate_factor(step, self.trainer.max_steps, self.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def configure_optimizers(self) -> Optimizer:
        """One optimizer over groups that provably hold every parameter once."""
        groups = parameter_groups(self.network, self.optimizer_config)
        # A fused step cannot be clipped under a gradient scaler, which 16-mixed brings; and Lightning, which clips by
        # value, takes every mixed precision for one.
        by_value = self.trainer.gradient_clip_algorithm == "value"
        scaled = ("16-mixed", "bf16-mixed") if by_value else ("16-mixed",)
        fused = self.trainer.precision not in scaled and self.device.type in ("cpu", "cuda")
        optimizer = build_optimizer(self.network, self.optimizer_config, fused=fused)
        for group, fresh in zip(optimizer.param_groups, groups, strict=True):
            group["initial_lr"] = fresh.get("lr", group["lr"])
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the configuration of the run and the fingerprint of its text: a checkpoint alone is enough to go on."""
        fingerprint = getattr(getattr(self.trainer, "datamodule", None), "fingerprint", None)
        corpus = None if fingerprint is None else fingerprint()
        checkpoint["gptlit"] = {"version": __version__, "config": self.run_config, "corpus": corpus}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Sets Lightning's loops to the boundary after the last whole step, whatever moment the file was written at; a
        run that keeps no average any more goes on from the weights that were trained.

        Raises:
            UserError: where those cannot be had, because the strategy reads its shards from the file itself.
        """
        fits = self._trainer is not None and self.trainer.state.fn == "fit"
        averaged = fits and "current_model_state" in checkpoint
        if averaged and not any(isinstance(callback, WeightAveraging) for callback in callbacks_of(self.trainer)):
            if "state_dict" not in checkpoint:
                raise UserError(
                    "the checkpoint holds an average of the weights (average.decay), which trainer.strategy would take "
                    "for the weights: make a step without the average on one device first, or choose ddp"
                )
            checkpoint["state_dict"] = checkpoint["current_model_state"]
        trainer = trainer_of(self)
        set_progress_to_step_boundary(checkpoint, 1 if trainer is None else trainer.accumulate_grad_batches)

    # ---------------------------------------------------------------- validation

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch of windows (loader 0) or of random chunks (the estimates) to the running means."""
        inputs, targets = batch  # (B, T) each
        counted = targets >= 0
        tokens = counted.sum()
        logits = self(inputs)  # (B, T, V)
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        loss = total / tokens.clamp(min=1)
        if dataloader_idx:
            self.estimates[dataloader_idx - 1].update(loss, tokens)
        else:
            self.val_loss.update(loss, tokens)
            chars = self.chars_per_token[targets.clamp(min=0)] * counted
            self.val_chars.update(chars.sum() / tokens.clamp(min=1), tokens)

    def on_validation_epoch_end(self) -> None:
        """`val/loss` (nats per token), `val/bpc` (bits per character), `val/perplexity`, and the estimates."""
        self.log_dict(self.collect("val"), logger=self._outside_fit())

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """As validation, named `test/…`."""
        self.log_dict(self.collect("test"), logger=self._outside_fit())

    def _outside_fit(self) -> bool:
        """During a fit `MetricsLogger` hands metrics to the loggers, at the true step; else Lightning returns them."""
        return self.trainer.state.fn != "fit"

    # ---------------------------------------------------------------- generating text

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> list[GeneratedText]:
        """Generate text from a batch of prompts as `generation_config` says.

        Args:
            batch: prompts, as lists of ids or as objects with such a list in `ids`.

        Returns:
            `num_samples` texts per prompt, prompt by prompt. `text_sink`, if set, receives them while they are sampled.
        """
        if self.tokenizer is None:
            raise RuntimeError("the model has no tokenizer yet: train it first, or load a checkpoint")
        return generate_texts(self.network, self.tokenizer, batch, self.generation_config, self.text_sink)

    def collect(self, part: str) -> dict[str, float]:
        """The metrics of a finished pass, exact over all tokens of all processes; resets them."""
        loss, chars = self.val_loss.compute().item(), self.val_chars.compute().item()
        metrics = {
            f"{part}/loss": loss,
            f"{part}/bpc": loss / math.log(2) / chars,
            f"{part}/perplexity": math.exp(min(loss, 700.0)),
        }
        for name, estimate in zip(ESTIMATES, self.estimates, strict=True):
            if estimate.update_called:
                metrics[name] = estimate.compute().item()
                estimate.reset()
        self.val_loss.reset()
        self.val_chars.reset()
        return metrics


def check_vocabulary(config: GPTConfig, size: int) -> None:
    """Raises `UserError` when `model.gpt.vocab_size` is neither 0 nor the tokenizer's number of symbols."""
    if config.vocab_size not in (0, size):
        raise UserError(
            f"model.gpt.vocab_size is {config.vocab_size}, but the tokenizer has {size} symbols: "
            "leave it at 0 to take the tokenizer's"
        )


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down: YAML and checkpoints know no tuples."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def shard(network: GPT, mesh: DeviceMesh) -> None:
    """Spreads weights, and with them gradients and optimizer state, over the processes of a mesh, block by block."""
    for part in (*network.blocks, network):
        fully_shard(part, mesh=mesh)


def load_model(checkpoint: dict[str, Any]) -> LitGPT:
    """The model of a checkpoint, with its weights, ready to draw from; needs no corpus.

    Raises:
        UserError: when the checkpoint contradicts itself.
    """
    try:
        model = LitGPT(**checkpoint["hyper_parameters"] | {"init_from": None})  # a checkpoint names no other
        model.configure_model()
        model.load_state_dict(checkpoint["state_dict"])
    except UserError:
        raise
    except RuntimeError as error:
        raise UserError(f"the checkpoint does not fit its own settings: {error}") from error
    return model.eval()
