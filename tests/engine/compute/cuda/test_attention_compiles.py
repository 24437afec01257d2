"""The attention and row kernels fit every architecture they are made for, and use its matrix units."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with a CUDA build of torch, or with the development tools")

import attention_variants
from compiling import CAPABILITIES, LARGEST_SHARED, Compiled, compile_variants

LARGEST_STACK = 64
"""Bytes per thread: a few registers spilled outside the inner loop, of the 1,020 bytes that 255 registers are."""


def check(name: str, capability: int, needs: Compiled) -> None:
    assert needs.registers <= 255, (name, capability, needs)
    assert needs.stack <= LARGEST_STACK, (name, capability, needs)
    assert needs.shared <= LARGEST_SHARED, (name, capability, needs)
    multiplies = "bf16" in name or "fp16" in name
    assert bool(needs.mma) == multiplies, (name, capability, needs)
    assert all(instruction.startswith(("HMMA.16816.F32", "HGMMA.64x")) for instruction in needs.mma), needs


@pytest.mark.slow
def test_the_usual_kernels_compile(tmp_path: Path) -> None:
    """For the oldest architecture, the one with wgmma and the newest; the sweep has all."""
    compiled = compile_variants("attention_variants", attention_variants.USUAL, (80, 90, 120), tmp_path)
    for (name, capability), needs in compiled.items():
        check(name, capability, needs)
    assert any(i.startswith("HGMMA.64x") for i in compiled["wide bf16 4x128", 90].mma), "Hopper's own instruction"


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_kernels_compile(capability: int, tmp_path: Path) -> None:
    names = [variant.name for variant in attention_variants.variants()]
    assert len(set(names)) == len(names)
    for (name, of), needs in compile_variants("attention_variants", names, [capability], tmp_path).items():
        check(name, of, needs)
