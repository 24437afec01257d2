"""The matrix unit is tried in a child process: whatever happens there, this process goes on, and models load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.compute.cpu import matrix_unit
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.matrix_unit import NO_UNIT, MatrixUnit, choose_matrix_unit

_STUB = """
#include <signal.h>
#include <unistd.h>
static int used;
#define STUB(name) long verbatim_##name(void) { return 64; }
STUB(packed_bytes) STUB(scratch) STUB(attention) STUB(norm) STUB(activate) STUB(layer_scratch) STUB(layers)
STUB(experts_scratch) STUB(experts) STUB(lanes) STUB(target) STUB(pack) STUB(pack_groups) STUB(widen) STUB(round)
int verbatim_matrix_unit(int use) { used = use; return use ? REFUSED : 0; }
void verbatim_linear(const float *x, void *scratch, float *out, void *m, long rows, long depth, long n, int threads) {
    for (long i = 0; i < rows; i++) out[i] = x[i];
    if (used && rows >= 32) { FAULT; }
}
"""
"""A library that seems to have a unit: its products with it do as FAULT says."""


def _stub(folder: Path, fault: str, refused: int = 0) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    folder.mkdir(exist_ok=True)
    source, target = folder / "stub.c", folder / "kernels-stub.so"
    source.write_text(_STUB)
    flags = ("-w", "-shared", "-fPIC", f"-DFAULT={fault}", f"-DREFUSED={refused}")
    subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True, timeout=60)
    return target


class _Calls:
    """The library in this process; notes what it is told."""

    def __init__(self, announced: bool = True, refused: int = 0) -> None:
        self.told: list[int] = []
        self._announced, self._refused = announced, refused

    def matrix_unit(self, use: int) -> int:
        self.told.append(use)
        return (self._refused if use else 0) if self._announced else 38  # ENOSYS


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had said anything, whatever the environment of the tests says."""
    monkeypatch.delenv(matrix_unit.SWITCH, raising=False)


def _chosen(library: Path, calls: _Calls | None = None, said: list[str] | None = None) -> MatrixUnit:
    return choose_matrix_unit(calls or _Calls(), library, None if said is None else said.append)  # type: ignore[arg-type]


def test_a_unit_that_works_is_used_and_tried_once(tmp_path: Path) -> None:
    library, said, calls = _stub(tmp_path, ""), list[str](), _Calls()
    assert _chosen(library, calls, said) == MatrixUnit(used=True)
    assert calls.told == [0, 1]
    assert said == ["trying the processor's matrix unit"]
    assert _chosen(library, said=said) == MatrixUnit(used=True)
    assert len(said) == 1
    assert (tmp_path / "kernels-stub.matrix").stat().st_mode & 0o077 == 0


FAULTS: dict[str, tuple[str, str]] = {
    "traps, as some virtual machines do": ("__builtin_trap()", "ended by SIGILL"),
    "another signal": ("raise(SIGSEGV)", "ended by SIGSEGV"),
    "hangs": ("pause()", "no end after 1 seconds"),
    "a number is wrong": ("out[3] += 1", "a product of int8 has other bits on the matrix unit"),
    "leaves": ("_exit(3)", "?"),
}


@pytest.mark.parametrize(("fault", "why"), FAULTS.values(), ids=FAULTS)
def test_a_unit_that_fails_is_left_out_and_the_reason_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, why: str
) -> None:
    monkeypatch.setattr(matrix_unit, "_SECONDS", 1.0 if why.startswith("no end") else 120.0)
    library, said = _stub(tmp_path, fault), list[str]()
    for _ in range(2):
        calls = _Calls()
        unit = _chosen(library, calls, said)
        assert unit == MatrixUnit(used=False, fault=f"its trial failed: {why}")
        assert calls.told == [0]
        assert unit.describe("AVX-512") == f"AVX-512; not the matrix unit that is announced: its trial failed: {why}"
    assert len(said) == 1


@pytest.mark.parametrize(
    ("fault", "refused", "why"),
    [("", 1, "the system refuses it: Operation not permitted"), ("raise(SIGKILL)", 0, "ended by SIGKILL")],
    ids=["a refusal", "ended from outside"],
)
def test_what_may_be_otherwise_the_next_time_is_asked_again(tmp_path: Path, fault: str, refused: int, why: str) -> None:
    """A container may forbid what its host allows; memory may have run out."""
    library = _stub(tmp_path, fault, refused)
    assert _chosen(library) == MatrixUnit(used=False, fault=f"its trial failed: {why}")
    assert not (tmp_path / "kernels-stub.matrix").exists()


def test_a_process_that_is_refused_goes_without_whatever_was_kept(tmp_path: Path) -> None:
    library = _stub(tmp_path, "")
    assert _chosen(library).used
    assert _chosen(library, _Calls(refused=1)).fault == "the system refuses it: Operation not permitted"


def test_where_none_is_announced_no_child_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_unit, "run_trial", lambda *given: pytest.fail("a child was started"))
    assert _chosen(tmp_path / "none.so", _Calls(announced=False)) == NO_UNIT
    assert NO_UNIT.describe("AVX2") == "AVX2"


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        ("off", "VERBATIM_MATRIX_UNIT=off"),
        ("no", "VERBATIM_MATRIX_UNIT is 'no'; it may be on or off"),
        ("", "VERBATIM_MATRIX_UNIT is ''; it may be on or off"),
    ],
)
def test_it_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str, why: str) -> None:
    monkeypatch.setattr(matrix_unit, "run_trial", lambda *given: pytest.fail("a child was started"))
    monkeypatch.setenv(matrix_unit.SWITCH, wish)
    calls = _Calls()
    assert _chosen(tmp_path / "none.so", calls) == MatrixUnit(used=False, fault=why)
    assert calls.told == [0]


def _cut(kept: Path) -> None:
    os.truncate(kept, kept.stat().st_size - 1)


def _open_to_all(kept: Path) -> None:
    kept.chmod(0o602)


def _other_text(kept: Path) -> None:
    matrix_unit.keep_sealed(b"[]", kept)


def _other_machine(kept: Path) -> None:
    matrix_unit.keep_sealed(json.dumps({"machine": "another", "fault": None}).encode(), kept)


@pytest.mark.parametrize("change", [_cut, _open_to_all, _other_text, _other_machine, Path.unlink])
def test_an_answer_that_is_damaged_or_of_another_start_is_not_believed(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """A cache may be copied to another machine; a virtual one may be started elsewhere."""
    library, said = _stub(tmp_path, ""), list[str]()
    _chosen(library)
    change(tmp_path / "kernels-stub.matrix")
    _stub(tmp_path, "__builtin_trap()")
    assert "SIGILL" in _chosen(library, said=said).fault
    assert len(said) == 1


def test_an_answer_holds_for_one_start_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "boot").write_text("first\n")
    monkeypatch.setattr(matrix_unit, "_BOOT", tmp_path / "boot")
    library, said = _stub(tmp_path, ""), list[str]()
    for boot, asked in (("first", 1), ("first", 1), ("second", 2), ("second", 2)):
        (tmp_path / "boot").write_text(boot)
        assert _chosen(library, said=said).used
        assert len(said) == asked


def test_an_answer_that_cannot_be_kept_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    library, said = _stub(tmp_path, ""), list[str]()
    monkeypatch.setattr(matrix_unit, "keep_sealed", full)
    assert _chosen(library, said=said).used
    assert _chosen(library, said=said).used
    assert len(said) == 2


def test_a_child_that_cannot_be_started_leaves_the_unit_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = _stub(tmp_path, "")
    monkeypatch.setattr("sys.executable", str(tmp_path / "nothing"))
    unit = _chosen(library)
    assert not unit.used
    assert "No such file" in unit.fault
    assert not (tmp_path / "kernels-stub.matrix").exists()


# -- the kernels themselves --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["works", "traps"])
def emulated(
    request: pytest.FixtureRequest, kernels: Kernels, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """Kernels with a unit that is written out, and that works, or traps."""
    if "AVX2" not in kernels.target and "AVX-512" not in kernels.target:
        pytest.skip("the unit is one of x86")
    fault = {"works": "", "traps": "=__builtin_trap()"}[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(matrix_unit.SWITCH, raising=False)
        folder = tmp_path_factory.mktemp("emulated")
        found = Kernels.load(folder, ("-O0", f"-DVERBATIM_EMULATE_MATRIX{fault}"))
    return SimpleNamespace(kernels=found, works=not fault)


def test_products_are_the_same_with_a_unit_that_works_and_with_one_that_traps(
    emulated: SimpleNamespace, kernels: Kernels
) -> None:
    unit = emulated.kernels.matrix_unit
    assert unit.used == emulated.works
    assert ("SIGILL" in unit.fault) != emulated.works
    weight = torch.randn(50, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    x = torch.randn(70, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    one, other = (k.group([k.pack(weight, None, "int8")]) for k in (kernels, emulated.kernels))
    for rows in (1, 31, 32, 33, 47, 70):
        assert torch.equal(one(x[:rows])[0], other(x[:rows])[0]), rows
