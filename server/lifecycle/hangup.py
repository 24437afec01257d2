"""SIGHUP: read the configuration again, or stop in order because the terminal has gone. Knows neither in detail.

A shell sends the same signal when its terminal is closed that people send to have a configuration read. It is the
terminal if the process had a controlling one when it started, which is gone now: then opening /dev/tty fails. Under
`nohup` a process is not to stop with its terminal; there, the signal always has the configuration read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable

__all__ = ["Hangup", "has_terminal"]

log = logging.getLogger("verbatim.server")


class Hangup:
    """Owns the signal, and the thread on which configurations are read.

    Args:
        reload: called on a thread of its own, for one signal at a time.
        stop: called within the signal's handler.
    """

    def __init__(self, reload: Callable[[], None], stop: Callable[[], None]) -> None:
        self._reload, self._stop = reload, stop
        self._signals: queue.SimpleQueue[bool] = queue.SimpleQueue()  # may be put into from within a handler
        self._terminals = [number for number in (0, 1, 2) if _is_terminal(number)]
        self._stops_with_terminal = False

    def install(self) -> None:
        """Take over the signal. On the main thread. Does nothing where there is none: on Windows."""
        if not hasattr(signal, "SIGHUP"):
            return
        self._stops_with_terminal = has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
        threading.Thread(target=self._serve, name="reload", daemon=True).start()
        signal.signal(signal.SIGHUP, lambda *_: self._handle())

    def _handle(self) -> None:
        if self._stops_with_terminal and not has_terminal():
            self._write_nowhere()
            self._stop()
        else:
            self._signals.put(True)

    def _write_nowhere(self) -> None:
        """Let what is still printed go nowhere: writing to a terminal that is gone is an error."""
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_RDWR)
            for number in self._terminals:
                os.dup2(nowhere, number)

    def _serve(self) -> None:
        while self._signals.get():
            try:
                self._reload()
            except Exception:
                log.exception("the configuration could not be read again, and nothing has changed")


def has_terminal() -> bool:
    """Return whether the process has a controlling terminal that is still there."""
    if sys.platform == "win32":
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _is_terminal(number: int) -> bool:
    try:
        return os.isatty(number)
    except OSError:
        return False
