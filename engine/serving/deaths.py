"""Say in words how an engine, or its process, came to its end. Words that may quote a request are left out."""

from __future__ import annotations

import os
import signal
from typing import Final

from engine.errors import EngineDead, VerbatimError

__all__ = ["ended_words", "engine_dead"]

_PERHAPS: Final = {
    "SIGKILL": ", perhaps because memory ran out",
    "SIGSEGV": ", a fault in compiled code",
    "SIGBUS": ", a fault in compiled code, or a file that became shorter while it was read",
    "SIGFPE": ", a fault in compiled code",
    "SIGILL": ", compiled code for another processor",
    "SIGABRT": ": a library gave up; its last words are on the server's standard error",
}
"""What a signal most often means."""


def engine_dead(model_id: str, cause: BaseException) -> VerbatimError:
    """What every client may be told of a death: words of the system, in one line. Other words may quote a request."""
    return EngineDead(f"the engine of {model_id} has stopped: {_words(cause)}")


def ended_words(status: int) -> str:
    """Say how a process ended: `was ended by signal 9 (SIGKILL), perhaps because memory ran out`.

    Args:
        status: as `subprocess.Popen.returncode`: the exit status, or minus the number of the signal.
    """
    if status >= 0:
        return f"ended by itself with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time signal
        return f"was ended by signal {-status}"
    return f"was ended by signal {-status} ({name}){_PERHAPS.get(name, '')}"


def _words(cause: BaseException) -> str:
    name = type(cause).__name__
    if isinstance(cause, OSError):
        words = os.strerror(cause.errno) if cause.errno is not None else ""
    elif type(cause) in (RuntimeError, MemoryError) or type(cause).__module__.partition(".")[0] == "torch":
        words = (str(cause).splitlines() or [""])[0][:200]
    else:
        words = ""
    return words if type(cause) is RuntimeError and words else f"{name}: {words}" if words else f"{name}; see the log"
