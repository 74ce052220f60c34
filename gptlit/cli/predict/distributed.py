"""`gptlit predict` through the Lightning Trainer: several devices, strategies, precisions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from gptlit.checkpoint.run_dir import first_process
from gptlit.cli.fit.devices import check_strategy
from gptlit.cli.fit.precision import slow_precision
from gptlit.cli.fit.trainer_settings import check_accelerator
from gptlit.cli.messages import quiet_libraries, say
from gptlit.cli.predict.prompts import Prompt, in_batches
from gptlit.cli.predict.writer import TextWriter
from gptlit.device.processes import restored_environment
from gptlit.errors import UserError
from gptlit.generation.engine.small_weights import check_weights_dtype
from gptlit.generation.text import GenerationConfig
from gptlit.training.loading import load_model


def with_trainer(
    checkpoint: dict[str, Any], config: GenerationConfig, settings: Mapping[str, Any]
) -> Callable[[Sequence[Prompt], TextWriter], None]:
    """Return a function that generates with `Trainer.predict`; the first rank writes the samples of all ranks.

    Args:
        checkpoint: content of a checkpoint.
        config: what to generate.
        settings: arguments of the Trainer.

    Raises:
        UserError: if the machine or the Trainer does not support the settings.
    """
    quiet_libraries()
    true_half = settings["precision"] in ("bf16-true", "16-true")  # mixed precisions sample in float32
    if true_half and first_process() and (line := slow_precision(settings)):
        say(line, style="yellow")
    model = load_model(checkpoint)
    model.generation_config = config
    trainer = make_trainer(settings)
    check_weights_dtype(model.network, config.weights_dtype, trainer.strategy.root_device)

    def run(prompts: Sequence[Prompt], writer: TextWriter) -> None:
        model.text_sink, writer.ordered = writer, trainer.world_size == 1
        with restored_environment(lambda: trainer.world_size == 1):
            trainer.predict(model, datamodule=PromptData(prompts, config.num_samples), return_predictions=False)

    return run


def make_trainer(settings: Mapping[str, Any]) -> pl.Trainer:
    """Return a Trainer for prediction only.

    Raises:
        UserError: if the machine or the Trainer does not support the settings.
    """
    check_accelerator(settings["accelerator"])
    try:
        trainer = pl.Trainer(
            **settings,
            callbacks=[GatherTexts()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ModuleNotFoundError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"the Trainer does not take these trainer settings: {error}") from error
    check_strategy(trainer, settings["devices"])
    return trainer


class GatherTexts(pl.Callback):
    """Writes the samples of all ranks, at the end, on the first rank."""

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.world_size == 1:
            return
        writer: TextWriter = pl_module.text_sink
        gathered: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, writer.results)
        if trainer.is_global_zero:
            writer.write_all([result for part in gathered for result in part])


class PromptData(pl.LightningDataModule):
    """Batches of prompts, distributed over the ranks in turn."""

    def __init__(self, prompts: Sequence[Prompt], num_samples: int) -> None:
        super().__init__()
        self.prompts, self.num_samples = prompts, num_samples

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.prompts = self.trainer.strategy.broadcast(self.prompts)  # stdin can be read only once

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the batches of this rank; an empty one if there are fewer batches than ranks."""
        assert self.trainer is not None
        batches = in_batches(self.prompts, self.num_samples, self.trainer.world_size)
        own: Any = batches[self.trainer.global_rank :: self.trainer.world_size] or [[]]
        return DataLoader(own, batch_size=None, collate_fn=list)

    def transfer_batch_to_device(self, batch: list[Prompt], device: torch.device, dataloader_idx: int) -> list[Prompt]:
        return batch  # prompts are lists; `predict_step` puts them on its device
