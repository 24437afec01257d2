"""Look at the machine: Python and libraries, compiler and kernels, GPU, memory, folders. Changes nothing that matters:
kernels that are compiled for the look are kept for the next start."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from engine import (
    ConfigError,
    LoadError,
    cpu_kernels,
    format_bytes,
    free_memory,
    keep_verdict,
    kernel_folder,
    probe_gpu,
    tried,
    untried,
)
from server.commands.doctor.finding import Finding, fault, ok, warn
from server.configuration import before_anything_heavy

__all__ = ["look_at_machine"]

_PYTHON: Final = ((3, 11), (3, 15))
_COMPILERS: Final = ("cc", "gcc", "clang")
_LITTLE_MEMORY: Final = 2 << 30
_LITTLE_DISK: Final = 1 << 30
_LOCK: Final = "install the lock, with: make install"


def look_at_machine(say: Callable[[str], None]) -> Iterator[Finding]:
    """Yield the findings, the quick ones first. `say`: told what takes long."""
    yield _python()
    yield from _libraries()
    yield _memory()
    yield _cache()
    yield _compiler()
    say("kernels")
    yield _kernels(say)
    yield _gpu(say)


def _python() -> Finding:
    version, oldest = platform.python_version(), ".".join(map(str, _PYTHON[0]))
    newest = f"{_PYTHON[1][0]}.{_PYTHON[1][1] - 1}"
    told = f"{version}, {sys.executable}"
    if not _PYTHON[0] <= sys.version_info[:2] < _PYTHON[1]:
        return fault("python", told, f"use Python {oldest} to {newest}")
    return ok("python", told)


def _libraries() -> Iterator[Finding]:
    known, others = tried(), untried()
    missing = [name for name in known if importlib.util.find_spec(name.replace("-", "_")) is None]
    missing = [name for name in missing if name != "gguf"]  # an extra; asked for where an entry needs it
    if missing:
        yield fault("libraries", f"not installed: {', '.join(missing)}", _LOCK)
    elif others:
        told = ", ".join(f"{name} {version} (tried: {' '.join(known[name])})" for name, version in others.items())
        yield warn("libraries", f"outside the versions that were tried: {told}", _LOCK)
    else:
        yield ok("libraries", f"{len(known)} libraries have the versions that were tried")


def _memory() -> Finding:
    free = free_memory()
    try:
        before_anything_heavy(pull=False)
    except ConfigError as error:
        return fault("memory", error.message.partition(". ")[0], "ulimit -v unlimited")
    told = f"{format_bytes(free)} free, {os.cpu_count()} processors"
    if free < _LITTLE_MEMORY:
        return warn("memory", told, "end other programs, or take a small model: a model needs its files' size and more")
    return ok("memory", told)


def _cache() -> Finding:
    folder = kernel_folder()
    cure = "set XDG_CACHE_HOME to a folder that this user can write"
    if folder is None:
        return warn("cache", "this user has no home for compiled kernels; they are compiled at every start", cure)
    base = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(base, os.W_OK):
        return warn("cache", f"{base} cannot be written; kernels are compiled at every start", cure)
    free = shutil.disk_usage(base).free
    if free < _LITTLE_DISK:
        return warn("cache", f"{folder}: {format_bytes(free)} free on its disk", "make room on that disk")
    kept = _size_of_kept(folder)
    told = f", {format_bytes(kept)} of packed weights" if kept else ""
    return ok("cache", f"{folder}{told}, {format_bytes(free)} free on its disk")


def _size_of_kept(folder: Path) -> int:
    """Count the bytes of packed weights that are kept for next starts."""
    size = 0
    for path in folder.glob("packed/*.weights"):
        with contextlib.suppress(OSError):  # it has just left
            size += path.lstat().st_size
    return size


def _compiler() -> Finding:
    named = os.environ.get("CC")
    for name in (*filter(None, (named,)), *_COMPILERS):
        if found := shutil.which(name):
            return ok("compiler", found)
    told = f"none found: neither {', '.join(filter(None, (named, *_COMPILERS)))}"
    return warn("compiler", told, "install gcc or clang: on a CPU, replies then come about three times as fast")


def _kernels(say: Callable[[str], None]) -> Finding:
    if importlib.util.find_spec("torch") is None:
        return fault("kernels", "torch is not installed", _LOCK)
    try:
        return ok("kernels", f"compiled and tried; they use {cpu_kernels(say)}")
    except LoadError as error:
        cure = "see above" if "compiler" in error.message else "models are computed by torch: slower"
        return warn("kernels", error.message.rstrip("."), cure)


def _gpu(say: Callable[[str], None]) -> Finding:
    if not any(Path(place).exists() for place in ("/dev/nvidia0", "/dev/nvidiactl", "/proc/driver/nvidia/version")):
        return ok("gpu", "no NVIDIA GPU; the CPU computes")
    probed = probe_gpu("cuda:0", progress=say)
    keep_verdict(probed)
    verdict = probed.verdict
    if verdict.is_well:
        return ok("gpu", f"{verdict.gpu}: all checks passed")
    if not verdict.has_gpu:
        return warn("gpu", "there is an NVIDIA driver, but torch sees no GPU", "make install TORCH=cu130")
    return warn("gpu", f"{verdict.gpu}: not all checks passed", "verbatim gpu-probe says what failed and what to do")
