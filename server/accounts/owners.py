"""Who holds: a name for this process, and whether the process of another name is surely gone. Knows no ledger.

Containers share host names, process ids and the kernel's boot. So a name has random bits, by which no two are alike,
and, to judge by, a digest of the boot and the PID namespace, the id in it, and the tick at which the process began.
Only a process that would be seen here, were it alive, is surely gone. Of any other nothing is known here: whether it
goes on counting in the ledger decides (`server/accounts/settling.py`).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import sys
import uuid
from pathlib import Path

import psutil

__all__ = ["name_of_this_process", "surely_gone"]

_UNKNOWN = "unknown"


def name_of_this_process() -> str:
    """A name that no other process has or has had."""
    return f"{secrets.token_hex(16)}:{_place()}:{os.getpid()}:{_began(os.getpid())}"


def surely_gone(owner: str) -> bool:
    """Whether the process of this name has ended. False: it runs, or nobody here can know."""
    parts = owner.split(":")
    if len(parts) != 4 or parts[1] == _UNKNOWN or parts[1] != _place() or not parts[2].isdecimal():
        return False
    if not psutil.pid_exists(int(parts[2])):
        return True
    began = _began(int(parts[2]))
    return began not in (_UNKNOWN, parts[3])


def _place() -> str:
    """Where a process id means one process: a boot of a kernel and a PID namespace in it."""
    try:
        if sys.platform == "linux":
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            where = f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
        else:  # no PID namespaces there
            where = f"{socket.gethostname()} {uuid.getnode():x}"
    except OSError:
        return _UNKNOWN
    return hashlib.sha256(where.encode()).hexdigest()[:16]


def _began(pid: int) -> str:
    """When a process began, by a clock that nobody sets; `ended` for one that only its parent still knows."""
    try:
        if sys.platform != "linux":
            return f"{psutil.Process(pid).create_time():.2f}"
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "ended" if state in "ZX" else rest[18]
    except (OSError, IndexError, ValueError, psutil.Error):
        return _UNKNOWN
