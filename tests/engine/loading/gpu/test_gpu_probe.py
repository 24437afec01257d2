"""The checks of a GPU, rehearsed on a CPU: whatever the child process does, there is a verdict that says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from engine.cache_folder import cache_folder
from engine.loading.gpu import probe as probing
from engine.loading.gpu.probe import CHECKS, FIRST, TRIALS, Probed, keep_verdict, kept_verdict, probe_gpu, verdict_of
from engine.types.gpu import DEVICE, GRAPH, GpuCheck, GpuVerdict


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)


def _probed(stand_in: str, seconds: float = 60.0) -> Probed:
    return probe_gpu("cpu", operations=f"faulty_operations:{stand_in}", seconds=seconds)


def _states(verdict: GpuVerdict) -> dict[str, str]:
    return {check.name: check.state for check in verdict.checks}


@pytest.mark.slow
def test_right_operations_are_found_right() -> None:
    told: list[str] = []
    probed = probe_gpu("cpu", operations="engine.compute.cuda.reference:TorchOperations", progress=told.append)
    states = _states(probed.verdict)
    assert tuple(states) == CHECKS
    assert {name for name, state in states.items() if state == "ok"} == {*TRIALS, "linear int8", "linear int4"}
    assert set(states.values()) == {"ok", "not tried"}, "a rehearsal leaves out the card"
    assert [f"GPU check: {name}" for name in TRIALS] == told[: len(TRIALS)]
    assert not probed.verdict.has_gpu
    assert not probed.verdict.is_well


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stand_in", "words", "lasting"),
    [
        ("Crashes", "ended its process by SIGSEGV; write gpu: no-kernels", True),
        ("Exits", "ended with status 3 (a library has its say); write gpu: no-kernels", True),
    ],
)
def test_a_child_that_ends_is_blamed_on_what_it_did(stand_in: str, words: str, lasting: bool) -> None:
    probed = _probed(stand_in)
    states = _states(probed.verdict)
    assert states["rms norm"] == "ok"
    assert states["silu_mul"] == "failed"
    assert states["linear"] == states["attention"] == states[GRAPH] == "not tried"
    assert words in probed.verdict.check("silu_mul").detail
    assert probed.lasting == lasting
    assert (probed.verdict.kernels_fault() or "").startswith("silu_mul: It")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stand_in", "failed", "words", "lasting"),
    [
        ("Raises", "silu_mul", "RuntimeError: Triton Error [CUDA]: invalid argument second line; write gpu:", True),
        ("NoMemory", "silu_mul", "end what else uses this GPU", False),
        ("WrongAttention", "attention", "Wrong numbers: attention over 300 keys (all keys before", True),
    ],
)
def test_a_fault_of_one_operation_leaves_the_others_to_be_tried(
    stand_in: str, failed: str, words: str, lasting: bool
) -> None:
    probed = _probed(stand_in)
    assert {name for name, state in _states(probed.verdict).items() if state == "failed"} == {failed}
    assert _states(probed.verdict)["linear int4"] == "ok"
    assert words in probed.verdict.check(failed).detail
    assert probed.lasting == lasting


@pytest.mark.slow
def test_what_libraries_print_is_no_answer() -> None:
    verdict = _probed("Talks").verdict
    assert _states(verdict)["silu_mul"] == _states(verdict)["attention"] == "ok"


def test_a_child_that_cannot_start_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing.sys, "executable", "/no/such/python")
    probed = _probed("Talks")
    assert probed.verdict.check(DEVICE).state == "failed"
    assert "does not start" in probed.verdict.check(DEVICE).detail
    assert not probed.lasting


def _listening(code: str, seconds: float) -> Probed:
    """A verdict about a child that runs `code` instead of the checks."""
    original = probing._START
    try:
        probing._START = code  # type: ignore[misc]
        return probe_gpu("cpu", seconds=seconds)
    finally:
        probing._START = original  # type: ignore[misc]


def test_a_compiler_that_hangs_under_the_child_is_ended_too(tmp_path: Path) -> None:
    """Triton starts compilers. They hold the child's pipe, and would be waited for, or left behind."""
    code = (
        "import subprocess, sys, time\n"
        "other = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(other.pid))\n"
        'print(\'{"begin": "linear"}\', flush=True); time.sleep(600)'
    )
    began = time.monotonic()
    probed = _listening(code, 5.0)
    assert time.monotonic() - began < 120
    assert "No end after 5 seconds" in probed.verdict.check("linear").detail
    assert not probed.lasting, "the card may have been busy"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(1200):
        if not _runs(pid):
            return
        time.sleep(0.05)
    pytest.fail("what the child started goes on")


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_only_silence_is_too_long() -> None:
    """The clock starts again with each line: all checks together take longer than one may."""
    code = (
        "import json, time\n"
        "for name in ('linear', 'store', 'attention'):\n"
        "    time.sleep(2.0); print(json.dumps({'begin': name}), flush=True)\n"
        "    print(json.dumps({'check': name, 'state': 'ok', 'detail': '', 'passing': False}), flush=True)\n"
        "print(json.dumps({'end': True}), flush=True)"
    )
    probed = _listening(code, 5.0)
    assert _states(probed.verdict)["attention"] == "ok"
    assert probed.lasting


def test_every_operation_is_a_sign_of_life() -> None:
    """A check compiles many kernels, and takes longer than a single one may."""
    from engine.compute.cuda.reference import TorchOperations
    from engine.loading.gpu.kernel_probe import _Beating

    beats: list[int] = []
    operations = _Beating(TorchOperations(), lambda: beats.append(1))
    assert operations.tile_rows == TorchOperations().tile_rows
    assert not beats
    x = torch.ones(3, 8)
    assert torch.equal(operations.silu_mul(x), TorchOperations().silu_mul(x))
    assert len(beats) == 1


def test_a_child_that_dies_before_it_says_anything_is_blamed_on_the_first_check() -> None:
    probed = _listening("import os; os.abort()", 20.0)
    assert "SIGABRT" in probed.verdict.check(DEVICE).detail
    assert not probed.verdict.has_gpu


def test_a_kill_from_outside_is_not_kept() -> None:
    probed = _listening("import os; os.kill(os.getpid(), 9)", 20.0)
    assert "SIGKILL" in probed.verdict.check(DEVICE).detail
    assert not probed.lasting


# -- the kept verdict -------------------------------------------------------------------------------------------------


def _verdict(**fields: str) -> GpuVerdict:
    given = {"gpu": "NVIDIA Made Up 1", "capability": "8.9", "driver": "580.1", "torch": "2", "triton": "3", **fields}
    checks = tuple(GpuCheck(name, "failed" if name == "attention" else "ok", f"about {name}") for name in CHECKS)
    return GpuVerdict(**given, kernels="5 abc", checks=checks)


def _card(verdict: GpuVerdict) -> GpuVerdict:
    return GpuVerdict(
        gpu=verdict.gpu, capability=verdict.capability, driver=verdict.driver, torch=verdict.torch,
        triton=verdict.triton, kernels=verdict.kernels,
    )  # fmt: skip


def test_a_verdict_is_kept_and_found_again() -> None:
    verdict = _verdict()
    path = keep_verdict(Probed(verdict, lasting=True))
    assert path is not None
    assert path.parent == cache_folder()
    assert kept_verdict(_card(verdict)) == verdict
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("field", ["gpu", "capability", "driver", "torch", "triton"])
def test_it_is_about_this_card_driver_and_release_alone(field: str) -> None:
    keep_verdict(Probed(_verdict(), lasting=True))
    assert kept_verdict(_card(_verdict(**{field: "another"}))) is None


def _without(name: str) -> GpuVerdict:
    """A verdict whose checks failed at `name`."""
    verdict = _verdict()
    at = CHECKS.index(name)
    checks = (
        *verdict.checks[:at],
        GpuCheck(name, "failed", "gone"),
        *(GpuCheck(n, "not tried") for n in CHECKS[at + 1 :]),
    )
    return GpuVerdict(gpu=verdict.gpu, kernels="5 abc", checks=checks)


@pytest.mark.parametrize(
    "probed",
    [
        Probed(_verdict(), lasting=False),
        *(Probed(_without(name), lasting=True) for name in (DEVICE, "triton", "C compiler", "Python.h", FIRST)),
    ],
)
def test_what_may_be_another_thing_next_time_is_not_kept(probed: Probed) -> None:
    """Somebody installs a compiler and starts again."""
    assert keep_verdict(probed) is None
    assert kept_verdict(_card(probed.verdict)) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"checks": 7}', '{"checks": [{"state": "fine"}]}', "extra"])
def test_a_damaged_file_is_no_verdict(damage: str) -> None:
    verdict = _verdict()
    path = keep_verdict(Probed(verdict, lasting=True))
    assert path is not None
    if damage == "extra":
        damage = json.dumps({**json.loads(path.read_text()), "more": 1})
    path.write_text(damage)
    assert kept_verdict(_card(verdict)) is None


def test_a_verdict_of_other_checks_is_none() -> None:
    """A release with one more check must make it."""
    verdict = _verdict()
    path = keep_verdict(Probed(verdict, lasting=True))
    assert path is not None
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "checks": said["checks"][:-1]}))
    assert kept_verdict(_card(verdict)) is None


def test_a_folder_that_cannot_be_written_costs_a_probe_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert keep_verdict(Probed(_verdict(), lasting=True)) is None


def test_once_for_each_card(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, calls = _verdict(), []

    def fake(device: str, **_: object) -> Probed:
        calls.append(device)
        return Probed(verdict, lasting=True)

    monkeypatch.setattr(probing, "card_of", lambda device: _card(verdict))
    monkeypatch.setattr(probing, "probe_gpu", fake)
    told: list[str] = []
    assert verdict_of("cuda:1", told.append) == verdict_of("cuda:1", told.append) == verdict
    assert calls == ["cuda:1"]
    assert len(told) == 1


def test_the_parent_imports_no_torch() -> None:
    """It has to end a child that hangs while it imports torch or starts CUDA."""
    code = "import sys, engine.loading.gpu.probe; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    done = subprocess.run(
        [probing.sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=os.environ
    )
    assert done.stdout.strip() == "[]"
