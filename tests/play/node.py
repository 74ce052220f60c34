"""Runs the page's JavaScript in Node."""

import json
import shutil
import subprocess
from typing import Any

import pytest
import torch
from conftest import DIALECTS, random_gpt

from gptlit.model import GPT, GPTConfig
from gptlit.play.pack import WeightType, pack_config, pack_weights
from gptlit.play.page_file import read_asset

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs node")
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
