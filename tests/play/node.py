"""The page's JavaScript in Node, and what PyTorch says of the same text."""

import json
import math
import shutil
import subprocess
from typing import Any

import pytest
import torch
from conftest import DIALECTS, random_gpt

from gptlit.callbacks.pictures import attention_weights
from gptlit.model import GPT, GPTConfig
from gptlit.play.pack import WeightType, pack_config, pack_weights
from gptlit.play.page_file import read_asset

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs node")
POSITIONS = 200
CLOSE = 1e-4
DESCRIBE = """
const describe = (reading) => reading.ids.map((_, i) => ({
  logits: Array.from(reading.logits(i)),
  surprise: reading.surprises[i],
  rank: reading.ranks[i],
  start: reading.attention[i].start,
  attention: Array.from(reading.attention[i].weights),
}));
"""
PURE = ("model.js", "reading.js", "sampling.js", "tokenizer.js")  # the files that need no document
SMALL = {"vocab_size": 65, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
SWITCHES = {
    **DIALECTS,
    "no MLP": {**SMALL, "mlp_ratio": 0},
    "no positions": {**SMALL, "position": "none"},
    "exact gelu without residual": {**SMALL, "activation": "gelu", "residual": False, "norm": "layernorm"},
    "fast rotation": {**SMALL, "rope_base": 100.0, "qk_norm": False, "tie_weights": True},
    "all biases": {**SMALL, "bias": True, "qkv_bias": True, "norm": "layernorm", "position": "learned"},
    "one token back": {**SMALL, "token_shift": 1, "n_embd": 20, "vocab_size": 67},
    "context of one": {**SMALL, "block_size": 1},
}


def run_script(script: str, given: Any) -> Any:
    """Run the page's files without the document, then `script`, which reads `given` and assigns `result`."""
    assert NODE is not None
    source = "\n".join(read_asset(name) for name in PURE)
    wrapped = f"""'use strict';
    const given = JSON.parse(require('fs').readFileSync(0, 'utf8'));
    let result;
    {source}
    {script}
    process.stdout.write(JSON.stringify(result));
    """
    done = subprocess.run([NODE, "-e", wrapped], input=json.dumps(given), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def random_model(config: GPTConfig) -> GPT:
    """A model in float64 with weights that float32 holds exactly."""
    return random_gpt(config).float().double()


def packed(model: GPT, dtype: WeightType = "float32") -> dict[str, Any]:
    """The arguments of the script's `Model`."""
    tensors, data = pack_weights(model, dtype)
    return {"spec": {"config": pack_config(model.config), "dtype": dtype, "tensors": tensors}, "base64": data}


def random_ids(model: GPT, count: int) -> list[int]:
    """Token ids of a text."""
    return torch.randint(model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def window_starts(block_size: int, count: int) -> list[int]:
    """First token that each of `count` tokens sees when the newest half of a full window is read again."""
    starts, start = [], 0
    for i in range(count):
        if i - start == block_size:
            start = i + 1 - max(block_size // 2, 1)
        starts.append(start)
    return starts


@torch.no_grad()
def assert_equals_pytorch(model: GPT, ids: list[int], read: list[dict[str, Any]]) -> float:
    """Compare what the script's `describe` gives with PyTorch at every position; returns the largest logit difference.

    Attention is compared at every ninth position.
    """
    largest = 0.0
    for i, start in enumerate(window_starts(model.config.block_size, len(ids))):
        window = torch.tensor(ids[start : i + 1])
        logits = model(window[None])[0, -1]
        assert read[i]["start"] == start
        largest = max(largest, float((torch.tensor(read[i]["logits"]) - logits).abs().max()))
        if i + 1 < len(ids):
            logs = logits.log_softmax(0)
            assert read[i + 1]["surprise"] == pytest.approx(-float(logs[ids[i + 1]]) / math.log(2), abs=CLOSE)
            ahead = logs - logs[ids[i + 1]]  # of tokens that are as probable to within rounding, any may come first
            assert int((ahead > CLOSE).sum()) < read[i + 1]["rank"] <= int((ahead > -CLOSE).sum())
        if model.config.n_layer and i % 9 == 0:
            expected = attention_weights(model, window)[:, :, -1].flatten()  # (L · H · count,)
            assert torch.allclose(torch.tensor(read[i]["attention"], dtype=torch.float32), expected, atol=CLOSE)
    assert largest < CLOSE
    return largest
