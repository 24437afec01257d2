"""`Facts`: what this machine is. Read once; only its free memory changes. Asks no driver and no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine import free_memory, processor_name, total_memory

__all__ = ["Facts", "gpu_names"]

_NVIDIA: Final = Path("/proc/driver/nvidia/gpus")
_GPU: Final = re.compile(r"^Model:\s*(.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Facts:
    """What this machine is.

    Attributes:
        cores: processors that this process may use.
        memory_bytes: what this process could have at most, in a container or under a limit as well.
    """

    processor: str
    cores: int
    memory_bytes: int
    gpus: tuple[str, ...]

    @classmethod
    def of_this_machine(cls) -> Facts:
        """Read them."""
        allowed = getattr(os, "sched_getaffinity", None)
        cores = len(allowed(0)) if allowed else os.cpu_count() or 1
        return cls(processor_name(), cores, total_memory(), gpu_names())

    @property
    def free_memory_bytes(self) -> int:
        """What this process may still take, now."""
        return free_memory()


def gpu_names(folder: Path = _NVIDIA) -> tuple[str, ...]:
    """Return the names of NVIDIA's GPUs as their driver tells them in `/proc`; empty where it tells none."""
    try:
        files = sorted(folder.glob("*/information"))
        texts = [file.read_text(encoding="utf-8", errors="replace")[:4096] for file in files]
    except OSError:
        return ()
    return tuple(found[1] for text in texts if (found := _GPU.search(text)))
