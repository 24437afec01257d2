"""Measure the memory of this machine and process, give freed memory back, and write sizes for people."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import psutil

__all__ = ["address_space", "format_bytes", "free_memory", "give_back_memory", "total_memory"]


def free_memory() -> int:
    """Count the bytes that this process may still take.

    That is what the system has available, or less in a container or under `ulimit -v`.
    """
    free = int(psutil.virtual_memory().available)
    space = address_space()
    if space is not None:
        free = min(free, max(space - int(psutil.Process().memory_info().vms), 0))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        allowed = limit.read_text().strip()
        if allowed != "max":
            free = min(free, max(int(allowed) - int(used.read_text()), 0))
    except (OSError, ValueError):
        pass
    return free


def total_memory() -> int:
    """Count the bytes that this process could have at most: the machine's, or less in a container or under a limit."""
    total = int(psutil.virtual_memory().total)
    space = address_space()
    if space is not None:
        total = min(total, space)
    with contextlib.suppress(OSError, ValueError):
        allowed = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if allowed != "max":
            total = min(total, int(allowed))
    return total


def address_space() -> int | None:
    """Return how many bytes of addresses this process may use (`ulimit -v`); None where there is no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def format_bytes(count: float) -> str:
    """Write a number of bytes for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def give_back_memory() -> None:
    """Return freed memory to the operating system. Does nothing with C libraries other than glibc.

    glibc keeps freed memory that lies between blocks still in use: a packed model would hold a third of its originals'
    memory for good.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
