"""The CPU's vendor."""

import platform
from functools import cache
from pathlib import Path


@cache
def is_amd() -> bool:
    """Return whether the CPU is from AMD; MKL (`torch.mm` on x86) has no fast kernels for it. False if unknown."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        return "AuthenticAMD" in listing.read_text(encoding="utf-8", errors="replace")
    return "AuthenticAMD" in platform.processor()  # Windows
