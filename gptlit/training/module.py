"""LitGPT: the GPT as a LightningModule with its training step, metrics, optimizer and checkpoints."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from gptlit.device.seeds import mix, seed_device
from gptlit.errors import settings_under
from gptlit.model.config import GPTConfig
from gptlit.optim import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    check_length,
    continue_scheduled_settings,
    learning_rate_factor,
)
from gptlit.training.checks import check_callbacks, check_epoch, check_processes, check_schedulers
from gptlit.training.compiling import batch_of_known_shape, compile_network, is_compiled
from gptlit.training.distillation import TEACHER_WEIGHT, distillation_loss, make_teachers
from gptlit.training.evaluation import EvaluatesTokens
from gptlit.training.gradients import clip_by_norm, fused_step_works
from gptlit.training.lightning_internals import (
    average_parameters_only,
    completes_step,
    set_metrics,
    steps_of_run,
)
from gptlit.training.metrics import (
    StepMetrics,
    check_monitors,
    is_logged,
    is_monitored,
    learning_rates,
    publish,
)
from gptlit.training.stored import StoredModule
from gptlit.training.strategies import holds_whole_model


class LitGPT(StoredModule, EvaluatesTokens):
    """Trains and validates a `GPT`. Its checkpoints hold everything that sampling needs.

    The network is built in `configure_model`, when the tokenizer is known: from the hyper-parameters of a checkpoint
    or, in a new run, from the DataModule.

    Every `log_every_n_steps` optimizer steps it logs `train/loss`, `train/grad_norm` (before clipping), `lr/adamw`,
    `lr/muon` and, with a `head_lr`, `lr/head`; at each validation, and before the first step, `val/loss` (nats per
    token over the whole validation part), `val/bpc` (bits per character), `val/bpb` (bits per byte of UTF-8) and
    `val/perplexity`. The x-axis is the number of optimizer steps made.

    Args:
        gpt: architecture.
        optimizer: AdamW or Muon, learning rates and weight decay.
        schedule: learning rate over the run, whose length is `max_steps` of the Trainer or, without it, follows from
            `max_epochs` and the length of the DataLoader.
        tokenizer: JSON of the tokenizer; null takes it from the data.
        init_from: initial weights: a GPT-2 or NanoChat folder or id of Hugging Face, a run of gptlit, or nanoGPT's
            ckpt.pt. Architecture and tokenizer come from there; of `gpt`, only `block_size`, the dropouts and
            `token_noise` are used. The optimizer starts without state.
        seed: seed of initial weights and dropout; the command takes it from `seed_everything`.
        compile: compile blocks, head and loss with torch.compile while training; where that fails, a line says why and
            training runs eagerly. `auto` compiles long runs on a GPU
            (`gptlit.training.compiling.compiling_pays`). `reduce-overhead` is torch.compile's mode of that name (CUDA
            graphs), meant for small models on a GPU; not measured.
        checkpoint_activations: store only the input of each block and recompute the rest in the backward pass: a third
            more time for a fraction of the memory (arXiv:1604.06174).
        matmul_precision: precision of float32 matrix multiplications, as in torch.set_float32_matmul_precision.
            `medium` uses bfloat16 units of CPUs (AMX) and GPUs, which halves the time of a step there.
        teachers: trained models, as for `init_from`, that predict next to this one while it trains: it learns their
            mean prediction too (knowledge distillation, arXiv:1503.02531). They need the tokenizer of the
            data and a context of at least `block_size`; resuming needs them again. Each adds a forward pass to a step.
            `train/loss` stays that of the text. With `compile`, only the blocks are compiled.
        teacher_weight: weight of the teachers' prediction in the training loss, above 0 and at most 1; the text has
            the rest.

    Raises:
        UserError: when a model of `init_from` or `teachers` cannot be read, or a setting is out of its range.
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
        teachers: str | list[str] | None = None,
        teacher_weight: float = TEACHER_WEIGHT,
    ) -> None:
        gpt = GPTConfig(**gpt) if isinstance(gpt, Mapping) else gpt
        super().__init__(gpt, tokenizer, init_from, seed, checkpoint_activations, matmul_precision)
        self.optimizer_config = OptimizerConfig(**optimizer) if isinstance(optimizer, Mapping) else optimizer
        self.schedule = ScheduleConfig(**schedule) if isinstance(schedule, Mapping) else schedule
        self.compile_network = compile
        self.teachers = make_teachers(teachers, teacher_weight)
        self.teacher_weight = teacher_weight
        self.weights_step: int | None = None  # step that the weights belong to when the optimizer returns
        self._to_compile = False  # with the first batch of a fit
        self._step = StepMetrics()
        self._logged_step = 0
        self._epoch_start = 0  # optimizer steps made before this epoch
        # Plain types only: a checkpoint must load with weights_only=True.
        self.save_hyperparameters(
            {
                "gpt": asdict(self.gpt),
                "optimizer": asdict(self.optimizer_config) | {"betas": list(self.optimizer_config.betas)},
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

    # ---------------------------------------------------------------- training

    @property
    def mid_step(self) -> bool:
        """Whether the weights may be partly updated, or newer than the count of steps."""
        return self.weights_step not in (None, self.global_step)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Refuse what cannot work here, before anything else happens in a fit; averages leave out tables."""
        if self.trainer.state.fn == "fit":
            check_processes(self.trainer)
            check_callbacks(self.trainer)
            average_parameters_only(self.trainer)
        return []

    def on_fit_start(self) -> None:
        """Refuse callbacks that monitor an unknown metric, and an lr_scheduler next to a schedule.

        Bring the teachers to the device.
        """
        with settings_under("trainer.callbacks"):
            check_monitors(self.trainer)
        check_schedulers(self.trainer, self.schedule)
        if self._has_scheduler:
            continue_scheduled_settings(self.trainer.optimizers[0])
        if self.teachers is not None:
            self.load_teachers(self.teachers)
            self.teachers.move_to(self.device, next(self.network.parameters()).dtype)

    def on_train_start(self) -> None:
        """Forget the last fit, compile if asked to, and validate the initial weights.

        Weights of a checkpoint are validated for a `ReduceLROnPlateau`, which has not been updated for that step yet.

        Raises:
            UserError: when the schedule needs the number of steps, and nothing tells it.
        """
        if not self._has_scheduler:
            check_length(steps_of_run(self.trainer), self.schedule)
        self.weights_step = self.validated_step = None
        self._logged_step = self.global_step
        self._step.reset()
        if self.global_step:  # the learning rates of the last step: a callback may read them before the next one
            self._set_rates(self.trainer.optimizers[0], self.global_step - 1)
        self._to_compile = is_compiled(self.trainer, self.compile_network)
        if self._to_compile and (batch := batch_of_known_shape(self.trainer)) is not None:
            self._compile(batch)
        awaited = any(config.reduce_on_plateau for config in self.trainer.lr_scheduler_configs)
        if self.trainer.enable_validation and (awaited or not self.global_step):
            self.validate_initial_weights(holds_whole_model(self.trainer) and self.network.logits_are_zero)

    def _compile(self, batch: tuple[Tensor, Tensor]) -> None:
        self._to_compile = False
        outcome = compile_network(self.trainer, self.network, self.compile_network, batch)
        if self.trainer.is_global_zero:
            print(outcome, file=sys.stderr)

    def on_train_epoch_start(self) -> None:
        self._epoch_start = self.global_step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout from (seed, step, micro-batch, rank), so that a resumed run draws the same masks.

        Before that, compile for batches of a DataLoader, whose shape the first one tells.
        """
        if self._to_compile:
            self._compile(batch)
        if self.gpt.draws_in_training:
            accumulate = self.trainer.accumulate_grad_batches
            micro_batch = self.global_step * accumulate + batch_idx % accumulate  # of the run, over all epochs
            seed_device(self.device, mix(self.seed, micro_batch, self.global_rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the training loss (nats per token) of a micro-batch: without teachers the mean cross-entropy."""
        inputs, targets = batch  # (B, T) each
        if self.compile_network == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # results of the last step may be overwritten from here on
        loss, shown = self._losses(inputs, targets)
        self._step.add(shown, last=completes_step(self.trainer))
        return loss

    def _losses(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss to minimise and the one to show: they differ with teachers."""
        if self.teachers is None:
            loss: Tensor = self.network(inputs, targets=targets)
            return loss, loss
        probabilities = self.teachers.probabilities(inputs)
        return distillation_loss(self.network(inputs), targets, probabilities, self.teacher_weight)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop before the weights change when the loss is not finite."""
        self._step.require_finite(self.global_step + 1)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm, of shards too, and keep the norm; other algorithms and strategies are left to Lightning.

        Without clipping the norm is computed only for steps that are logged or monitored.
        """
        step, name = self.global_step + 1, "train/grad_norm"
        needed = is_logged(self.trainer, step) or is_monitored(self.trainer, name)
        norm, clipped = clip_by_norm(self.trainer, optimizer, gradient_clip_val, gradient_clip_algorithm, needed)
        self._step.grad_norm = norm
        if not clipped:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.weights_step = step  # this is the last hook before the weights change

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Make one optimizer step at the learning rate of its number, which is a function of that number alone.

        With an lr_scheduler of a subclass, the rate is the one that it has set.
        """
        self._set_rates(optimizer, self.global_step)
        self._step.rates = learning_rates(self.trainer.optimizers[0])
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        set_metrics(self.trainer, self._step.tensors(optimizer))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log_step()

    def log_step(self) -> None:
        """Log the metrics of the last optimizer step once, when it is due.

        `MetricsLogger` calls this before other callbacks see the end of the step, since one may raise.
        """
        step = self.global_step
        if step != self._logged_step and is_logged(self.trainer, step):
            self._logged_step = step
            tensors = self._step.tensors(self.trainer.optimizers[0])
            publish(self.trainer, {name: value.item() for name, value in tensors.items()}, step)

    def on_train_epoch_end(self) -> None:
        """Refuse an epoch in which no optimizer step was made, since training would never end."""
        check_epoch(self.trainer, self._epoch_start)

    @property
    def _has_scheduler(self) -> bool:
        """Whether a subclass's `configure_optimizers` returned an lr_scheduler."""
        return bool(self.trainer.lr_scheduler_configs)

    def _set_rates(self, optimizer: Any, step: int) -> None:
        if self._has_scheduler:
            return
        factor = learning_rate_factor(step, steps_of_run(self.trainer), self.schedule)
        for group in optimizer.param_groups:
            if group.get("lr") is not None:  # checkpoints keep `initial_lr` with the group
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def configure_optimizers(self) -> Optimizer:
        """Return one optimizer over groups that hold every parameter exactly once.

        A subclass may return anything that Lightning takes. `schedule` scales the learning rates of its optimizer too,
        from the ones that it begins with; `ScheduleConfig(shape="constant")` leaves them as they are. They are logged
        as `lr/NAME`: the `name` of a parameter group, or the class of the optimizer in lower case. An lr_scheduler
        takes the place of the schedule, which must then be the default or constant; where a run is one epoch, as with
        a TextDataModule, its interval must be `step`.
        """
        return build_optimizer(self.network, self.optimizer_config, fused_step_works(self.trainer, self.device))
