"""The log: lines for people, or an object a line for programs. Never what was said, never a key.

A line of text is `when LEVEL logger: message`, then ` name=value` for each field. A value that is not plain is quoted
as JSON quotes it, so that nothing from outside ends a value or a line, or gives a terminal orders. Lines of a trace
begin with spaces. They show where an exception was raised and of which class; its words may quote a request, and are
left out unless they are the system's.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from typing import Any, Final, Literal

__all__ = ["access", "configure", "printable"]

_ACCESS: Final = logging.getLogger("verbatim.access")
_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160))} | {
    # line ends, marks that turn the direction of text, and what has no width
    code: f"\\u{code:04x}"
    for code in (0x61C, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF)
}
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./:@+,~-]+")
_SECRET: Final = re.compile(r"vk-[A-Za-z0-9_-]{8,}")
"""A key, as server/ledger/keys.py makes them."""
_OUTER: Final = "    "


def configure(form: Literal["text", "json"], *, access_log: bool) -> None:
    """Set up the process's log, to standard error. Exceptions that nobody catches go there, too, and what libraries
    say: it may quote a file of a checkpoint, which is from outside."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _ACCESS.setLevel(logging.INFO if access_log else logging.WARNING)
    logging.captureWarnings(True)
    for name in list(logging.root.manager.loggerDict):
        _take_over(logging.getLogger(name))
    threading.excepthook = lambda given: _uncaught("a thread has ended", given.exc_value)
    sys.unraisablehook = lambda given: _uncaught("a fault that nobody could be told of", given.exc_value)


def access(**fields: Any) -> None:
    """Note a request that has ended. Fields without a value are left out."""
    if _ACCESS.isEnabledFor(logging.INFO):
        known = {name: value for name, value in fields.items() if value is not None}
        _ACCESS.info("request", extra={"fields": known})


def printable(text: str, keep: str = "") -> str:
    """Text with its control characters, and all that a terminal would obey, written out."""
    table = {code: shown for code, shown in _CONTROL.items() if chr(code) not in keep} if keep else _CONTROL
    return text.translate(table)


def _take_over(library: logging.Logger) -> None:
    """Have a library that writes to the terminal in its own form write to the log."""
    for handler in library.handlers[:]:
        if type(handler) is logging.StreamHandler:  # not into a file that somebody asked for
            library.removeHandler(handler)
            library.propagate = True


def _uncaught(what: str, error: BaseException | None) -> None:
    logging.getLogger("verbatim.server").error(what, exc_info=error)


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {printable(_message(record))}"
        told = "".join(f" {name}={_value(value)}" for name, value in getattr(record, "fields", {}).items())
        trace = "".join(f"\n{_OUTER}{printable(text)}" for text in _trace(record))
        return _without_keys(line + told + trace)


class _JsonFormatter(logging.Formatter):
    """An object a record. JSON has no line ends in it, whatever a name or a path holds."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        entry: dict[str, Any] = {
            "time": when,
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
            **getattr(record, "fields", {}),
        }
        if trace := _trace(record):
            entry["trace"] = "\n".join(trace)
        return _without_keys(_json(entry))


def _json(value: Any) -> str:
    return json.dumps(value, default=str).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else _json(text)


def _without_keys(text: str) -> str:
    return _SECRET.sub("vk-…", text)


def _message(record: logging.LogRecord) -> str:
    # asyncio writes an exception that nobody awaited into its message, words and all; the trace has the rest.
    text = record.getMessage().rstrip()
    return text.partition("\n")[0] if record.name == "asyncio" else text


def _trace(record: logging.LogRecord) -> list[str]:
    """Lines of a record's exception and those that led to it, the first one first."""
    error = record.exc_info[1] if record.exc_info else None
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    lines = [line for found in reversed(seen) for line in _lines(found)]
    return lines + (record.stack_info or "").splitlines()


def _lines(error: BaseException) -> list[str]:
    kind = type(error)
    lines = ["Traceback (most recent call last):"]
    lines += "".join(traceback.format_tb(error.__traceback__)).splitlines()
    lines.append(f"{kind.__module__}.{kind.__qualname__}: {_words(error)}".replace("builtins.", "", 1))
    if isinstance(error, BaseExceptionGroup):
        lines += [_OUTER + line for inner in error.exceptions for line in _lines(inner)]
    return lines


def _words(error: BaseException) -> str:
    """What an exception says, where it is the system that speaks: a request's text is in none of these."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"[Errno {error.errno}] {os.strerror(error.errno)}"
    if isinstance(error, MemoryError) or type(error).__module__.partition(".")[0] == "torch":
        return str(error)[:500]
    return "(its words are left out: they may quote a request)"
