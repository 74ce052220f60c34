"""Export to ONNX through torch's exporter, checked in ONNX Runtime."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from gptlit.convert.compare import Check, compare
from gptlit.convert.libraries import import_optional
from gptlit.convert.transformers_folder import save_backend
from gptlit.model.gpt import GPT
from gptlit.tokenizer import Tokenizer


class BoundedGPT(nn.Module):
    """A `GPT` whose graph fails on more than `block_size` tokens: it looks up a zero for every position.

    Without it, the graph of a model without positions accepts any length.
    """

    zeros: Tensor

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("zeros", torch.zeros(model.config.block_size), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits (B, T, V) of input_ids (B, T)."""
        positions = torch.arange(input_ids.size(1), device=input_ids.device)
        return self.model(input_ids) + self.zeros[positions][:, None]


def write_onnx(folder: Path, model: GPT, tokenizer: Tokenizer) -> Check:
    """Write model.onnx (`input_ids` (batch, length) int64 -> `logits` (batch, length, vocabulary) float32) and
    tokenizer.json; run the graph in ONNX Runtime at several lengths and compare.

    Raises:
        UserError: if onnx, onnxruntime or onnxscript is missing.
        RuntimeError: if the graph computes something else.
    """
    _, onnxruntime, _ = import_optional("onnx", "onnx", "onnxruntime", "onnxscript")
    block_size = model.config.block_size
    rows = torch.zeros(2, block_size, dtype=torch.int64)
    length = torch.export.Dim("length", min=1, max=block_size) if block_size > 1 else None
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            BoundedGPT(model).eval(),
            (rows,),
            dynamo=True,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": {0: torch.export.Dim("batch"), 1: length}},
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["block_size"] = str(block_size)
    program.save(folder / "model.onnx")
    save_backend(folder, tokenizer)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    lengths = (1, 2, block_size // 2 + 1) if length is not None else ()
    return compare(model, lambda ids: session.run(None, {"input_ids": ids.numpy()})[0], lengths)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the progress and the advice of torch's ONNX exporter inside the block."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
