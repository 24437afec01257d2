"""Decide whether products of many rows use the processor's matrix unit (AMX), by trying it in a child process.

What a processor announces is not enough: some virtual machines announce the unit and trap on its first instruction,
which ends a process. So no process uses it before a child has, with the bits of the other instructions; a crash,
another bit, a hang and a refusal of the system all mean no. Where the kernels were compiled without it, no child is
started. The answer is kept beside the compiled kernels, for this start of this machine.
Knows processes and files; no tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from engine.compute.cpu.kernel_calls import Calls
from engine.compute.cpu.kernel_file import Distrusted, Trial, keep_sealed, read_sealed, run_trial
from engine.compute.processor import processor_target

__all__ = ["NO_UNIT", "SWITCH", "MatrixUnit", "choose_matrix_unit"]

SWITCH: Final = "VERBATIM_MATRIX_UNIT"
"""The environment variable that says `off`, or `on`, which is the default: use the unit where it works."""

_SECONDS: Final = 60.0  # for a trial that takes a tenth of one; a busy machine must not look like one that hangs
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


class MatrixUnit(NamedTuple):
    """Whether the matrix unit is used, and why not.

    Attributes:
        used: by products of many rows; the bits are the same without it.
        fault: why a unit that is announced is not used; empty where it is used, or none is announced.
    """

    used: bool
    fault: str = ""

    def describe(self, target: str) -> str:
        """Return what the kernels use, for people: `target`, and the matrix unit or why it is left out."""
        if self.used:
            return f"{target}, AMX"
        return f"{target}; not the matrix unit that is announced: {self.fault}" if self.fault else target


NO_UNIT: Final = MatrixUnit(used=False)


def choose_matrix_unit(calls: Calls, library: Path, progress: Callable[[str], None] | None = None) -> MatrixUnit:
    """Let the kernels use the matrix unit if there is one that works. Raises nothing.

    Args:
        calls: of the library, which uses no unit before that.
        library: its file; the answer is kept beside it.
        progress: told when the unit is tried.
    """
    if calls.matrix_unit(0):  # not compiled for a processor that announces one
        return NO_UNIT
    wish = os.environ.get(SWITCH, "on")
    if wish == "off":
        return MatrixUnit(False, f"{SWITCH}=off")
    if wish != "on":
        return MatrixUnit(False, f"{SWITCH} is {wish!r}; it may be on or off")
    fault = _tried(library, progress or (lambda text: None))
    if fault is not None:
        return MatrixUnit(False, f"its trial failed: {fault}")
    if refused := calls.matrix_unit(1):
        return MatrixUnit(False, f"the system refuses it: {os.strerror(refused)}")
    return MatrixUnit(True)


def _tried(library: Path, say: Callable[[str], None]) -> str | None:
    """Return what went wrong when the unit was tried with this library on this machine, since it was started."""
    kept, machine = library.with_suffix(".matrix"), _machine()
    with contextlib.suppress(Distrusted, ValueError, KeyError, TypeError):
        told = json.loads(read_sealed(kept))
        fault: str | None = told["fault"]
        if told["machine"] == machine:
            return fault
    say("trying the processor's matrix unit")
    trial: Trial = run_trial(library, "matrix", _SECONDS)
    if trial.lasting:
        with contextlib.suppress(OSError):  # then the next start tries again
            keep_sealed(json.dumps({"machine": machine, "fault": trial.fault}).encode(), kept)
    return trial.fault


def _machine() -> str:
    """Name what an answer holds for: this processor, its kernel, and its last start. A virtual machine may be moved."""
    try:
        boot = _BOOT.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        boot = ""
    return " ".join((boot, platform.release(), processor_target()))
