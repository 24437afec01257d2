"""Carry a child's log into its parent's: as records, so that there is one form and one place. No exception crosses."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable

from engine.errors import trace_lines
from engine.serving.process.messages import Logged

__all__ = ["log_again", "log_level", "log_through"]

_SERVER = "verbatim.engine"


def log_level() -> int:
    """Return the least level that this process writes into its log."""
    return min(logging.getLogger(name).getEffectiveLevel() for name in (None, _SERVER))


def log_again(record: Logged) -> None:
    """Write a child's record into this process's log, as if it had been made here."""
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.level):
        made = logging.LogRecord(record.name, record.level, "", 0, record.message, None, None)
        made.created, made.msecs = record.created, record.created % 1 * 1000
        made.fields = dict(record.fields)
        made.stack_info = "\n".join(record.trace) or None
        logger.handle(made)


def log_through(send: Callable[[Logged], None], level: int) -> None:
    """Send everything that this process logs, warnings and uncaught exceptions included, somewhere else.

    To be called again once libraries are imported that add handlers of their own.
    """
    logging.basicConfig(level=level, handlers=[_Through(send)], force=True)
    logging.getLogger(_SERVER).setLevel(level)
    logging.captureWarnings(True)
    for name in list(logging.root.manager.loggerDict):
        library = logging.getLogger(name)
        for handler in library.handlers[:]:
            if type(handler) is logging.StreamHandler:
                library.removeHandler(handler)
                library.propagate = True
    threading.excepthook = lambda given: _uncaught("a thread has ended", given.exc_value)
    sys.unraisablehook = lambda given: _uncaught("a fault that nobody could be told of", given.exc_value)


def _uncaught(what: str, error: BaseException | None) -> None:
    logging.getLogger(_SERVER).error(what, exc_info=error)


class _Through(logging.Handler):
    def __init__(self, send: Callable[[Logged], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        trace = (*trace_lines(error), *(record.stack_info or "").splitlines())
        fields = {name: str(value) for name, value in getattr(record, "fields", {}).items()}
        try:
            message = record.getMessage()
        except Exception:  # a library's own mistake, as `Handler.handleError` treats it
            message = str(record.msg)
        self._send(Logged(record.name, record.levelno, record.created, message, fields, trace))
