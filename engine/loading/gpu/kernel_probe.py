"""Make the checks of a GPU, in a process that may crash. Started by `engine.loading.gpu.probe`, which listens.

It says what it begins and what it found in lines of JSON on standard output; libraries print to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from engine.errors import one_line, out_of_memory
from engine.loading.gpu.card import card_of, driver_version
from engine.loading.gpu.probe import CAPABILITY, CHECKS, FIRST, REPORT
from engine.loading.gpu.surroundings import SURROUNDINGS, Missing, package
from engine.types.gpu import DEVICE, GRAPH, LINEAR

__all__ = ["main"]

LEAST_CAPABILITY: Final = (8, 0)
"""Ampere: the first with bfloat16 in its matrix units."""
LEAST_DRIVER: Final = 580
"""The first that CUDA 13 runs with."""
_REHEARSAL: Final = "left out in a rehearsal on a CPU"

Say = Callable[..., None]


def main() -> None:
    """Make the checks of the device that the arguments name."""
    arguments = json.loads(sys.argv[1])
    out = os.dup(1)
    os.dup2(2, 1)  # so that no library prints between the lines
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it may crash, and a core dump would be of no use

    def say(**message: Any) -> None:
        os.write(out, json.dumps(message).encode() + b"\n")

    _Checks(arguments["device"], arguments["operations"], say).run()
    say(end=True)


class _Checks:
    """The checks in their order. A trial is made only if everything before it is well."""

    def __init__(self, device: str, operations: str, say: Say) -> None:
        self._device, self._operations, self._say = device, operations, say
        self._rehearsal = device == "cpu"
        self._well = True
        self._usable = True

    def run(self) -> None:
        surroundings: dict[str, Callable[[], object]] = {
            DEVICE: partial(find_device, self._device),
            CAPABILITY: partial(check_capability, self._device),
            "triton": check_triton,
            **dict(SURROUNDINGS),
            FIRST: partial(run_first_kernel, self._device),
        }
        for name, check in surroundings.items():
            needs_card = name in (CAPABILITY, FIRST)
            if self._rehearsal:
                self._tell(name, "not tried", _REHEARSAL)
            elif not needs_card or self._well:
                self._make(name, check)
        if not self._well:
            return
        trials = dict(self._trials())
        for name in CHECKS:
            if name in trials and self._usable:
                self._make(name, trials[name])

    def _trials(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Name the trials of the operations. They are imported here: before, something may be missing."""
        import torch

        from engine.loading.gpu import attention_steps, graph_trial, kernel_trials

        module, _, name = self._operations.partition(":")
        operations = _Beating(getattr(importlib.import_module(module), name)(), partial(self._say, alive=True))
        device = torch.device(self._device)
        sizes = kernel_trials.SMALL if self._rehearsal else kernel_trials.FULL
        tiled = None if self._rehearsal else graph_trial.tiled(device)
        for kind, name in LINEAR.items():
            yield name, partial(kernel_trials.linear, operations, device, sizes, kind, tiled)
        for name, trial in (
            ("rms norm", kernel_trials.rms_norm),
            ("silu_mul", kernel_trials.silu_mul),
            ("store", kernel_trials.store),
            ("copy blocks", kernel_trials.copy_blocks),
            ("attention", attention_steps.attention),
        ):
            yield name, partial(trial, operations, device, sizes)
        if not self._rehearsal:
            yield GRAPH, partial(graph_trial.replays, operations, device, sizes)

    def _make(self, name: str, check: Callable[[], object]) -> None:
        self._say(begin=name)
        try:
            found = check()
        except Missing as error:
            self._fail(name, str(error))
        except Exception as error:  # whatever a kernel, a compiler or a driver does
            self._fail(name, _told(name, error), passing=out_of_memory(error))
            self._look_after()
        else:
            self._tell(name, "ok", found if isinstance(found, str) else "")
            if name == DEVICE:
                self._say(card={k: v for k, v in dataclasses.asdict(card_of(self._device)).items() if k != "checks"})

    def _look_after(self) -> None:
        """Make no further trial where the device can no longer be used: all would fail, for the same reason."""
        if self._rehearsal:
            return
        try:
            import torch

            torch.cuda.synchronize(self._device)
        except Exception:
            self._usable = False

    def _fail(self, name: str, detail: str, *, passing: bool = False) -> None:
        self._well = self._well and name in CHECKS[CHECKS.index(FIRST) + 1 :]
        self._tell(name, "failed", detail, passing=passing)

    def _tell(self, name: str, state: str, detail: str, *, passing: bool = False) -> None:
        self._say(check=name, state=state, detail=detail, passing=passing)


class _Beating:
    """Operations that give a sign of life before each of them: only one that is silent for long is taken to hang."""

    def __init__(self, operations: Any, beat: Callable[[], None]) -> None:
        self._operations, self._beat = operations, beat

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._operations, name)
        if not callable(found):
            return found

        def operation(*arguments: Any) -> Any:
            self._beat()
            return found(*arguments)

        return operation


def _told(name: str, error: Exception) -> str:
    """Return a sentence about a failed check that says what to do."""
    said, kind = one_line(error, 300).rstrip("."), type(error).__name__
    said = f"{said[:1].upper()}{said[1:]}" if kind == "KernelFault" else f"{kind}: {said}"
    if out_of_memory(error):
        return f"{said}; end what else uses this GPU, and try again."
    if name == FIRST:
        command = package("compiler")
        return f"Triton cannot build or run a kernel here: {said}{f'; as root: {command}' if command else ''}."
    return f"{said}; {REPORT}."


def find_device(device: str) -> str:
    """Return the card's name.

    Raises:
        Missing: torch sees no such device.
    """
    import torch

    if torch.version.cuda is None:
        raise Missing(f"torch {torch.__version__} is built without CUDA; run: make install TORCH=cu130.")
    driver = driver_version()
    if not torch.cuda.is_available():
        if not driver:
            raise Missing(f"There is no NVIDIA driver here, or no card; install the driver, {LEAST_DRIVER} or newer.")
        if int(driver.split(".")[0]) < LEAST_DRIVER:
            raise Missing(
                f"The NVIDIA driver {driver} is too old for CUDA {torch.version.cuda}: {LEAST_DRIVER} is needed."
            )
        raise Missing(
            f"torch for CUDA {torch.version.cuda} sees no GPU, though there is a driver ({driver}); see what "
            f"nvidia-smi says, and whether CUDA_VISIBLE_DEVICES hides the card."
        )
    at, count = torch.device(device), torch.cuda.device_count()
    if (at.index or 0) >= count:
        raise Missing(f"There is no {device}: torch sees {count} GPU(s), from cuda:0 on.")
    return torch.cuda.get_device_name(at)


def check_capability(device: str) -> str:
    """Return the compute capability.

    Raises:
        Missing: it is too low for the kernels.
    """
    import torch

    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        raise Missing(
            f"Compute capability {found[0]}.{found[1]} is below 8.0, which the kernels need; torch serves models here, "
            f"without the promise that bits are the same."
        )
    return f"{found[0]}.{found[1]}"


def check_triton() -> str:
    """Return Triton's version.

    Raises:
        Missing: it cannot be imported, or would interpret kernels on the CPU.
    """
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y"):
        raise Missing("TRITON_INTERPRET is set, with which kernels do not run on the GPU; unset it.")
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        raise Missing(f"Triton cannot be imported ({one_line(error, 200)}); run: make install TORCH=cu130.") from error
    return str(triton.__version__)


def run_first_kernel(device: str) -> None:
    """Compile and run a tiny kernel."""
    import torch

    from engine.compute.cuda.kernels.first import add_one

    with torch.cuda.device(device):
        found = add_one(torch.arange(1000, dtype=torch.float32, device=device))
    if found.tolist() != [float(i + 1) for i in range(1000)]:
        raise RuntimeError("the first kernel computes wrong numbers")
