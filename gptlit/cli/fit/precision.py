"""`--trainer.precision auto`, and a warning where a precision is slow."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision

from gptlit.device.cpu import cpu_multiplies_bfloat16, cpu_multiplies_float16

PRECISION: Any = Literal["auto"] | inspect.signature(pl.Trainer).parameters["precision"].annotation
BFLOAT16_ON_A_CPU = ("bf16-mixed", "bf16-true", "bf16", "16-mixed", "16", 16)  # Lightning takes 16 for bf16 there


def fastest_precision(trainer: Mapping[str, Any]) -> str | None:
    """Return what `auto` means on this machine; None where one of the plugins is a precision.

    Args:
        trainer: settings of the Trainer; `accelerator` and `plugins` are used.
    """
    plugins = trainer.get("plugins")
    if any(is_precision(plugin) for plugin in (plugins if isinstance(plugins, list) else [plugins])):
        return None
    device = device_type(trainer["accelerator"])
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device == "cpu" and cpu_multiplies_bfloat16()
    return "bf16-mixed" if fast else "32-true"


def is_precision(plugin: Any) -> bool:
    """Return whether a plugin of the Trainer, a class with its arguments, is a precision."""
    module, _, name = str(getattr(plugin, "class_path", "")).rpartition(".")
    kind = getattr(import_module(module), name, None) if module else None
    return isinstance(kind, type) and issubclass(kind, Precision)


def slow_precision(trainer: Mapping[str, Any]) -> str | None:
    """Return a line that says that the precision is slow on this machine, and which one is not; else None."""
    precision = trainer["precision"]
    if device_type(trainer["accelerator"]) != "cpu":
        return None
    if precision in BFLOAT16_ON_A_CPU and not cpu_multiplies_bfloat16():
        kind = "bfloat16"
    elif precision == "16-true" and not cpu_multiplies_float16():
        kind = "float16"
    else:
        return None
    return (
        f"trainer.precision {precision} is several times slower here, where torch uses no CPU instructions for "
        f"{kind}: use --trainer.precision 32-true"
    )


def device_type(accelerator: Any) -> str:
    """Return `cpu`, `cuda` or `other`: what the Trainer will use for its setting `accelerator`.

    Args:
        accelerator: a name, or a class with its arguments.
    """
    name = str(accelerator).lower()
    if "cpu" in name:
        return "cpu"
    if any(kind in name for kind in ("auto", "gpu", "cuda")) and torch.cuda.is_available():
        return "cuda"
    return "cpu" if name == "auto" and not torch.backends.mps.is_available() else "other"
