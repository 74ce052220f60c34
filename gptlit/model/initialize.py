"""Initial weights."""

import math

import torch
import torch.nn as nn

from gptlit.model.config import GPTConfig


@torch.no_grad()
def initialize(model: nn.Module, config: GPTConfig) -> None:
    """Set the initial weights, with torch's global random generator.

    | `init` | token embedding | matrices in the blocks | output projections (`c_proj`) | head |
    |---|---|---|---|---|
    | torch: the lecture's first steps | N(0, 1) | U(±1/√fan_in) | U(±1/√fan_in) | U(±1/√fan_in) |
    | normal: the lecture's last steps | N(0, 0.02) | N(0, 0.02) | N(0, 0.02) | N(0, 0.02) |
    | scaled: GPT-2 and nanoGPT | N(0, 0.02) | N(0, 0.02) | N(0, 0.02 / √(2·n_layer)) | N(0, 0.02) |
    | zero: the modern dialect | N(0, 1) | U(±√(3 / n_embd)) | 0: a block starts as the identity | 0 |

    Learned positions are like the token embedding, except in `zero`: N(0, 0.02), as for an embedding tied to the head.
    Biases are 0 (in `torch` like their matrix); LayerNorm has weight 1 and bias 0.
    """
    if config.init == "torch":
        return  # set when the layers were made
    std, zero = 0.02, config.init == "zero"
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if name.endswith("c_proj") and config.init == "scaled":
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * config.n_layer))
        elif zero and (name.endswith("c_proj") or (name == "lm_head" and not config.tie_weights)):
            nn.init.zeros_(module.weight)
        elif zero and name.startswith("transformer.h."):
            bound = math.sqrt(3 / config.n_embd)  # standard deviation 1 / √n_embd
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            wide = zero and name == "transformer.wte" and not config.tie_weights
            nn.init.normal_(module.weight, std=1.0 if wide else std)
