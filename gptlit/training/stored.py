"""The contents of a checkpoint apart from the weights, and how a module is read from one."""

import pickle
from pathlib import Path
from typing import IO, Any, Self

from gptlit.checkpoint.files import read_checkpoint
from gptlit.checkpoint.torch_file import untrusted
from gptlit.training.distillation import Teachers
from gptlit.training.lightning_internals import (
    averaged_state,
    datamodule_of,
    forget_elapsed_time,
    is_one_epoch,
    restricted_classmethod,
    set_progress_to_step_boundary,
    trainer_of,
    use_trained_weights,
)
from gptlit.training.network import NetworkModule
from gptlit.version import __version__


class StoredModule(NetworkModule):
    """A NetworkModule whose checkpoints hold everything that sampling and resuming need, and execute nothing."""

    run_config: str | None = None
    """YAML of all settings of the run, kept in the checkpoint."""
    teachers: Teachers | None = None
    """Models that predict next to this one while it trains."""
    teacher_weight: float

    @restricted_classmethod
    def load_from_checkpoint(
        cls,  # noqa: N805
        checkpoint_path: str | Path | IO[Any],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """Return the model of a checkpoint. Nothing in the file is executed, unless `weights_only` is False.

        Args:
            checkpoint_path: path, URL or open file.
            map_location: as for `torch.load`.
            hparams_file: YAML or CSV file that replaces the hyper-parameters of the checkpoint.
            strict: whether the weights must fit exactly.
            weights_only: False reads any pickle, and so executes code that is in the file. None means True.
            **kwargs: override hyper-parameters of the checkpoint.

        Raises:
            UserError: if the file is damaged, is not a gptlit checkpoint, or holds more than tensors and plain types.
        """
        safe = weights_only is not False
        if safe and isinstance(checkpoint_path, str | Path) and "://" not in str(checkpoint_path):
            read_checkpoint(Path(checkpoint_path), setting="")
        try:
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only=safe, **kwargs
            )
        except pickle.UnpicklingError as error:
            raise untrusted(checkpoint_path, "") from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the configuration of the run and the fingerprint of its text, so that the file alone can be resumed.

        Also add the names of the models that the run learns from: its initial weights and its teachers.
        """
        fingerprint = getattr(datamodule_of(self.trainer), "fingerprint", None)
        corpus = None if fingerprint is None else fingerprint()
        checkpoint["gptlit"] = {"version": __version__, "config": self.run_config, "corpus": corpus, **self.origin}
        if self.teachers is not None:
            checkpoint["gptlit"] |= {"teachers": dict(self.teachers.digests), "teacher_weight": self.teacher_weight}
        if "optimizer_states" not in checkpoint:  # weights only: Lightning does not ask the averaging callback then
            checkpoint["state_dict"] = averaged_state(self.trainer) or checkpoint["state_dict"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Set Lightning's loops to the boundary after the last complete step, whatever moment the file was written at.

        The epoch is kept, unless the run is one epoch. A time limit counts from this start.
        """
        stored = checkpoint.get("gptlit") or {}
        self.origin = {"init_from": stored["init_from"]} if "init_from" in stored else {}
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == "fit":
            use_trained_weights(trainer, checkpoint)
            forget_elapsed_time(trainer, checkpoint)
            if self.teachers is not None:
                self.load_teachers(self.teachers)
                self.teachers.require_those_of(checkpoint)
            set_progress_to_step_boundary(checkpoint, trainer.accumulate_grad_batches, is_one_epoch(trainer))

    def load_teachers(self, teachers: Teachers) -> None:
        """Read the teachers, for the tokenizer and the context of this model."""
        assert self.tokenizer is not None
        teachers.load(self.gpt, self.tokenizer)
