"""The linear kernel compiled for GPUs that are not there: it fits each, spills nothing, and uses the matrix units."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels of the CUDA path are written in Triton")

import compiling
import linear_variants
from compiling import CAPABILITIES, LARGEST_SHARED, Compiled
from linear_variants import FAMILIES, named

from engine.compute.cuda import tiles
from engine.compute.cuda.tiles import tile_for

STACK = 16
"""Bytes of registers that may spill: two where a kernel just misses what it was given."""
INT4_FLOAT32_STACK = 256
"""With float32 inputs the numbers of a group do not fit the registers; checkpoints of 4 bits have 16-bit floats."""


def check(name: str, capability: int, needs: Compiled) -> None:
    """Compare what a variant needs with what a GPU has; the name says what it is."""
    case = f"{name} on sm_{capability}: {needs}"
    whole = name.startswith("int4") and " fp32 " in name
    assert needs.registers <= 255, case
    assert needs.stack <= (INT4_FLOAT32_STACK if whole else STACK), case
    assert needs.shared <= LARGEST_SHARED, case
    if " fp32 " in name:
        assert needs.mma == (), case
    else:
        wide = capability == 90 and " 16x" not in name
        expected = "HGMMA.64x" if wide else "HMMA.16816.F32"
        assert needs.mma, case
        assert all(instruction.startswith(expected) for instruction in needs.mma), case


def chosen(capability: int) -> list[str]:
    """Name the variants of an ordinary model: decode, prompts, the output layer; whole weights, int8, int4."""
    picks = (("exact", "bf16", 1, 4_096), ("exact", "bf16", 512, 4_096), ("exact", "fp32", 512, 4_096))
    picks += (("int8", "bf16", 512, 4_096), ("int4", "bf16", 1, 4_096), ("int4", "fp16", 512, 4_096))
    gpu = FAMILIES[capability]
    names = []
    for kind, number, rows, columns in picks:
        group = 128 if kind == "int4" else 0
        tile = tile_for(gpu, kind, linear_variants.SIZES[number], rows, columns, group)
        names.append(named(kind, number, group, tile, zeros=kind == "int4"))
    return names


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])  # the oldest, the one with wgmma, the newest; the sweep has all
def test_an_ordinary_model_compiles(capability: int, tmp_path: Path) -> None:
    names = chosen(capability)
    for (name, gpu), needs in compiling.compile_variants("linear_variants", names, [capability], tmp_path).items():
        check(name, gpu, needs)


@pytest.mark.sweep
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_whole_table_compiles(capability: int, tmp_path: Path) -> None:
    names = list(dict.fromkeys(case[1] for case in linear_variants.cases() if case[0] == FAMILIES[capability]))
    for (name, gpu), needs in compiling.compile_variants("linear_variants", names, [capability], tmp_path).items():
        check(name, gpu, needs)


def test_what_a_gpu_lacks_is_seen() -> None:
    """The check can fail: more shared memory than Ada's blocks have, spilled registers, no matrix unit."""
    fits = Compiled(registers=255, stack=0, shared=101_376, mma=("HMMA.16816.F32.BF16",))
    check("exact bf16 128x64x128 8 3", 89, fits)
    for change in ({"shared": 106_496}, {"stack": 88}, {"mma": ()}, {"mma": ("HGMMA.64x64x16.F32.BF16",)}):
        with pytest.raises(AssertionError, match="128x64x128"):
            check("exact bf16 128x64x128 8 3", 89, replace(fits, **change))
    with pytest.raises(AssertionError, match="128x64x128"):
        check("exact bf16 128x64x128 8 2", 90, fits)


def test_each_family_has_a_gpu_that_is_compiled_for() -> None:
    """All but data centre Blackwell (sm_100), whose instructions nobody here has seen run."""
    assert set(FAMILIES) == set(CAPABILITIES)
    assert set(tiles.TABLE) - set(FAMILIES.values()) == {"blackwell"}
