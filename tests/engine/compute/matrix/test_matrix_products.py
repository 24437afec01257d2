"""Products of many rows on a processor's matrix unit (AMX): the bits of every other instruction, within their buffers.

No machine at hand had one: its instructions are written out (`VERBATIM_EMULATE_MATRIX`) and trap where it would.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from engine.compute.cpu import kernels as source
from engine.compute.cpu.backend import CpuBackend
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.matrix_unit import MatrixUnit
from engine.compute.processor import processor_target

_TRIAL = Path(__file__).with_name("matrix_trial.c")
_X86 = ("-march=x86-64-v3", "-pthread", "-std=gnu11", "-ffp-contract=off")
_UNIT = ("-mamx-tile", "-mamx-int8")
_SANITIZED = ("-g1", "-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0")
_LAYOUTS = {
    "AVX2": (),
    "VNNI": ("-DVERBATIM_EMULATE_VNNI",),
    # It takes a minute to compile; the widest panels have the most tiles.
    "panels of AVX-512, every access checked": ("-DVERBATIM_EMULATE_WIDE", *_SANITIZED),
    "panels of AVX-512, VNNI": ("-DVERBATIM_EMULATE_WIDE", "-DVERBATIM_EMULATE_VNNI"),
}


def _compiled(target: Path, *flags: str) -> Path:
    if "avx2" not in processor_target().split():
        pytest.skip("this processor lacks AVX2")
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")
    folder = source._SOURCE.parent
    command = [compiler, *_X86, *flags, f"-I{folder}", str(_TRIAL), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    said = done.stderr
    if done.returncode and ("unrecognized command" in said or "cannot find" in said):
        pytest.skip(f"this gcc lacks what {' '.join(flags)} needs")
    assert done.returncode == 0, said[-2000:]
    return target


def _ran(program: Path, products: int, seed: int) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(products), str(seed)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", _LAYOUTS.values(), ids=_LAYOUTS)
def test_the_bits_are_those_without_the_unit_and_no_byte_beyond_a_buffer_is_touched(
    tmp_path: Path, layout: tuple[str, ...]
) -> None:
    """Random kinds of weights, one or two of a product, in shapes that are no whole tiles; on one to three threads."""
    program = _compiled(tmp_path / "trial", "-O0", "-DVERBATIM_EMULATE_MATRIX", *layout)
    done = _ran(program, products=150, seed=1)
    assert (done.returncode, done.stdout) == (0, "150\n"), done.stderr[-2000:]


@pytest.mark.slow
def test_a_difference_would_be_seen(tmp_path: Path) -> None:
    """One sum of one tile is wrong by one: the trial above must not pass."""
    program = _compiled(tmp_path / "trial", "-O0", "-DVERBATIM_EMULATE_MATRIX=unit.tiles[c][1][0] ^= 1")
    done = _ran(program, products=20, seed=1)
    assert done.returncode == 1
    assert "other bits" in done.stderr


@pytest.mark.slow
def test_the_real_instructions_compile_and_compute_where_there_is_a_unit(tmp_path: Path) -> None:
    """Without one the system refuses the tiles, and nothing is computed."""
    done = _ran(_compiled(tmp_path / "trial", "-O1", *_UNIT), products=300, seed=2)
    if "amx_int8" not in processor_target().split():
        assert done.returncode == 75, done
        assert done.stderr.startswith("the system refuses it: ")
    elif done.returncode == 75 or done.returncode < 0:
        pytest.skip(f"the unit is announced, and does not work here: {done}")
    else:
        assert (done.returncode, done.stdout) == (0, "300\n"), done.stderr[-2000:]


def test_the_fingerprint_does_not_tell_whether_the_unit_is_used(kernels: Kernels) -> None:
    """The bits are the same with it and without, so a receipt of one holds for the other."""
    used = Kernels.__new__(Kernels)
    used.__dict__.update(kernels.__dict__, matrix_unit=MatrixUnit(used=True))
    for quantization in (None, "int8", "int4", "stored"):
        assert CpuBackend(used, quantization).describe() == CpuBackend(kernels, quantization).describe()
