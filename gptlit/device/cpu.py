"""The CPU's vendor, and whether it multiplies bfloat16."""

import platform
from functools import cache
from pathlib import Path

import torch


@cache
def is_amd() -> bool:
    """Return whether the CPU is from AMD; MKL (`torch.mm` on x86) has no fast kernels for it. False if unknown."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        return "AuthenticAMD" in listing.read_text(encoding="utf-8", errors="replace")
    return "AuthenticAMD" in platform.processor()  # Windows


def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for bfloat16 matmuls (AVX512_BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
