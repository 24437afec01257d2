"""The machine a number was measured on, and its memory bandwidth. Says nothing of paths, names or users."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common import ROOT

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def describe(threads: int) -> dict[str, Any]:
    """What must stand beside a number: hardware, library versions, and how busy the machine was before the run."""
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "isa_flags": _cpu_flags(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": threads,
        "load_average_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def commit() -> tuple[str, bool]:
    """The short commit of this checkout and whether tracked files differ from it; `unknown` outside of git."""
    head = _git("rev-parse", "--short=10", "HEAD")
    return (head or "unknown", bool(_git("status", "--porcelain", "--untracked-files=no")))


def utc_now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class ReadBandwidth:
    """Measures how fast this machine reads memory: the limit of decoding, which reads every weight once a step.

    How: a float32 tensor far larger than the last-level cache is reduced by torch with the given threads, once by its
    sum and once by its maximum, several passes each; bytes ÷ seconds of the fastest pass. Both kernels do next to no
    arithmetic per byte. The fastest counts, so that a share of this figure is never flattered.
    """

    def __init__(self, threads: int, size: int = 2**29) -> None:
        """`size`: bytes of the tensor, kept as long as this object."""
        self.threads = threads
        self._data = torch.ones(size // 4, dtype=torch.float32)  # written, so that its pages are real

    def measure(self, passes: int = 3) -> float:
        """Bytes per second."""
        torch.set_num_threads(self.threads)
        best = 0.0
        for reduce in (torch.sum, torch.amax):
            for _ in range(passes):
                start = time.perf_counter()
                reduce(self._data).item()
                best = max(best, self._data.nbytes / (time.perf_counter() - start))
        return best


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    present = set(_cpuinfo("flags").split())
    return [flag for flag in _FLAGS if flag in present]


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
