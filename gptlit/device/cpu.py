"""The CPU's vendor, and whether torch uses its instructions for half precision."""

import os
import platform
from functools import cache
from pathlib import Path

import torch

# Values of ONEDNN_MAX_CPU_ISA with which oneDNN takes bfloat16, but computes in float32; with older ones it says so.
WITHOUT_BFLOAT16 = ("AVX512_CORE", "AVX512_CORE_VNNI")


@cache
def is_amd() -> bool:
    """Return whether the CPU is from AMD; MKL (`torch.mm` on x86) has no fast kernels for it. False if unknown."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        return "AuthenticAMD" in listing.read_text(encoding="utf-8", errors="replace")
    return "AuthenticAMD" in platform.processor()  # Windows


def cpu_multiplies_bfloat16() -> bool:
    """Return whether torch's matmuls use instructions of this CPU for bfloat16 (AVX512_BF16 or AMX).

    These matmuls are oneDNN's, which ONEDNN_MAX_CPU_ISA limits to older instructions: a matmul then takes ten times as
    long. ATEN_CPU_CAPABILITY does not limit them; it chooses ATen's other kernels.
    """
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
    return has_instructions and onednn_uses_bfloat16()


def onednn_uses_bfloat16() -> bool:
    """Return whether oneDNN may use bfloat16 instructions: as torch reports, and as the environment limits it."""
    if not torch.backends.mkldnn.is_available():
        return False
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001
    return supported and limit.upper() not in WITHOUT_BFLOAT16


def cpu_multiplies_float16() -> bool:
    """Return whether torch's matmuls use instructions of this CPU for float16 (AVX512_FP16); they are oneDNN's too."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()  # noqa: SLF001
