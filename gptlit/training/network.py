"""NetworkModule: a LightningModule that builds its GPT when the tokenizer is known, and generates text with it."""

from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from gptlit.device.seeds import seed_for_torch
from gptlit.errors import UserError
from gptlit.generation.text import GeneratedText, GenerationConfig, TextSink, generate_texts
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import Tokenizer, from_json
from gptlit.training.checks import check_vocabulary
from gptlit.training.initial_weights import InitialWeights
from gptlit.training.lightning_internals import datamodule_of, trainer_of


class NetworkModule(pl.LightningModule):
    """A GPT and its tokenizer as a LightningModule: initial weights, forward pass and prediction, but no training.

    Args:
        gpt: architecture.
        tokenizer: JSON of the tokenizer; None takes that of `init_from` or of the data.
        init_from: name of a model to start from, as `InitialWeights` takes it.
        seed: seed of the initial weights.
        checkpoint_activations: store only the input of each block.
        matmul_precision: as in torch.set_float32_matmul_precision, while the module trains or evaluates.
    """

    def __init__(
        self,
        gpt: GPTConfig,
        tokenizer: str | None,
        init_from: str | None,
        seed: int,
        checkpoint_activations: bool,
        matmul_precision: str,
    ) -> None:
        super().__init__()
        self.gpt = gpt
        self.tokenizer: Tokenizer | None = None if tokenizer is None else from_json(tokenizer)
        self.initial = None if init_from is None else InitialWeights(init_from, gpt)
        """What the network starts from; None once it is built."""
        if self.initial is not None:
            self.gpt = self.initial.gpt
            self.tokenizer = self.tokenizer or self.initial.tokenizer
        self.origin: dict[str, str | None] = {"init_from": None if init_from is None else str(init_from)}
        """Kept in the checkpoints, also of resumed runs; empty if the checkpoint that was loaded does not say it."""
        self.seed = seed
        self.checkpoint_activations = checkpoint_activations
        self.matmul_precision = matmul_precision
        self._precision_before: str | None = None
        self.net: GPT | None = None
        self.generation_config = GenerationConfig()
        self.text_sink: TextSink | None = None  # receives the text of predict_step while it is sampled

    def gpt_for(self, vocab_size: int) -> GPTConfig:
        """Return the architecture of the network for a tokenizer of so many tokens.

        Raises:
            UserError: when `model.gpt.vocab_size`, or the model to start from, contradicts it.
        """
        gpt = self.gpt if self.initial is None else self.initial.gpt_for(vocab_size)
        check_vocabulary(gpt, vocab_size)
        return replace(gpt, vocab_size=vocab_size)

    def configure_model(self) -> None:
        """Build the network once the tokenizer is known. Lightning calls this before it restores weights.

        Raises:
            UserError: when there is no tokenizer, or it contradicts the architecture.
        """
        if self.net is not None:
            return
        trainer = trainer_of(self)
        if self.tokenizer is None and trainer is not None:
            self.tokenizer = getattr(datamodule_of(trainer), "tokenizer", None)
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer: train it with a TextDataModule, or give it one as JSON")
        self.gpt = self.gpt_for(self.tokenizer.vocab_size)
        self.hparams["gpt"], self.hparams["tokenizer"] = asdict(self.gpt), self.tokenizer.to_json()
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed_for_torch(self.seed))
            self.net = GPT(self.gpt)
        self.net.checkpoint_activations = self.checkpoint_activations
        if self.initial is not None:
            self.initial.load_into(self.net)
            self.initial = None
        sizes = [self.tokenizer.chars_per_token(), self.tokenizer.bytes_per_token()]
        self.register_buffer("sizes_per_token", torch.tensor(sizes), persistent=False)  # (2, V)
        if self.device_mesh is not None:  # of ModelParallelStrategy: shards weights, gradients and optimizer state
            for part in (*self.net.blocks, self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Set the precision of float32 matrix multiplications for this stage; torch keeps it per process."""
        if stage != "predict":
            self._precision_before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(self.matmul_precision)

    def teardown(self, stage: str) -> None:
        if self._precision_before is not None:
            torch.set_float32_matmul_precision(self._precision_before)
            self._precision_before = None

    @property
    def network(self) -> GPT:
        """The GPT; a RuntimeError before `configure_model` has run."""
        if self.net is None:
            raise RuntimeError("the network is not built yet: Trainer.fit or configure_model() builds it")
        return self.net

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (B, T, V) of ids (B, T)."""
        return self.network(ids)

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
