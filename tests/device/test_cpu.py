"""What torch does with the instructions of the CPU."""

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from command import REPOSITORY

from gptlit.device import cpu

QUESTION = "from gptlit.device.cpu import cpu_multiplies_bfloat16; print(cpu_multiplies_bfloat16())"
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def answer(environment: Mapping[str, str]) -> str:
    """What a new process says: oneDNN and ATen read the environment once."""
    clean = {name: value for name, value in os.environ.items() if name not in LIMITS}
    command = [sys.executable, "-c", QUESTION]
    return subprocess.run(
        command, env=clean | environment, cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.slow
def test_the_environment_limits_the_instructions() -> None:
    """Each of the two variables, in upper or lower case; the first one wins."""
    assert answer({"ATEN_CPU_CAPABILITY": "avx2"}) == answer({})
    limits = zip(LIMITS, ("avx512_core", "AVX512_CORE_VNNI"), strict=True)
    assert [answer({limit: value}) for limit, value in limits] == ["False"] * 2
    assert answer({LIMITS[0]: "AVX2", LIMITS[1]: "DEFAULT"}) == "False"


@pytest.mark.parametrize(
    ("avx512", "amx", "onednn", "expected"),
    [(True, False, True, True), (False, True, True, True), (False, False, True, False), (True, True, False, False)],
)
def test_the_cpu_and_onednn_must_both_have_them(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, onednn: bool, expected: bool
) -> None:
    for limit in LIMITS:
        monkeypatch.delenv(limit, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(cpu, "onednn_uses_bfloat16", lambda: onednn)
    assert cpu.cpu_multiplies_bfloat16() == expected


def test_a_build_without_onednn_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not cpu.onednn_uses_bfloat16()
