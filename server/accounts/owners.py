"""Names this process among those that hold, and tells whether another named process has ended. Knows no ledger.

Containers share host names, process ids and the kernel's boot id. So a name has random bits, which make it unique, and
parts to compare: a digest of the boot and the PID namespace, the process id in it, and the tick at which the process
began. A process of the same boot and namespace that does not exist has surely ended. Of any other process nothing is
known here; whether its count in the ledger rises decides (`server/accounts/settling.py`).
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
    """Return a name that no other process has or has ever had."""
    return f"{secrets.token_hex(16)}:{_place()}:{os.getpid()}:{_began(os.getpid())}"


def surely_gone(owner: str) -> bool:
    """Return whether the process with this name has ended. False: it runs, or that cannot be known here."""
    parts = owner.split(":")
    if len(parts) != 4 or parts[1] == _UNKNOWN or parts[1] != _place() or not parts[2].isdecimal():
        return False
    if not psutil.pid_exists(int(parts[2])):
        return True
    began = _began(int(parts[2]))
    return began not in (_UNKNOWN, parts[3])


def _place() -> str:
    """Return a digest of the kernel's boot and the PID namespace: there a process id means one process."""
    try:
        if sys.platform == "linux":
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            where = f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
        else:  # other systems have no PID namespaces
            where = f"{socket.gethostname()} {uuid.getnode():x}"
    except OSError:
        return _UNKNOWN
    return hashlib.sha256(where.encode()).hexdigest()[:16]


def _began(pid: int) -> str:
    """Return when a process began, by a clock that cannot be set; `ended` for a zombie."""
    try:
        if sys.platform != "linux":
            return f"{psutil.Process(pid).create_time():.2f}"
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "ended" if state in "ZX" else rest[18]
    except (OSError, IndexError, ValueError, psutil.Error):
        return _UNKNOWN
