"""The log: lines for people, or one JSON object per line for programs. Never logs a prompt, a reply or a key.

A line of text is `when LEVEL logger: message`, then ` name=value` for each field. Values with special characters are
quoted as in JSON, so that nothing from outside can end a value or a line, or control a terminal. Lines of a traceback
begin with spaces. A traceback shows where an exception was raised and its class; its message may quote a request, so it
is left out unless it comes from the operating system.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from typing import Any, Final, Literal, TextIO

from engine import trace_lines

__all__ = ["access", "configure", "printable"]

_ACCESS: Final = logging.getLogger("verbatim.access")
_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160))} | {
    # line ends, characters that change the direction of text, and characters without width
    code: f"\\u{code:04x}"
    for code in (0x61C, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF)
}
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./:@+,~-]+")
_SECRET: Final = re.compile(r"vk-[A-Za-z0-9_-]{8,}")
"""A key, as server/ledger/keys.py makes them."""
_OUTER: Final = "    "


def configure(form: Literal["text", "json"], *, access_log: bool, stream: TextIO | None = None) -> None:
    """Set up the process's log on standard error, or on another stream that leads there.

    Uncaught exceptions are logged, too, and so are the messages of libraries, which may quote a checkpoint's files.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _ACCESS.setLevel(logging.INFO if access_log else logging.WARNING)
    logging.captureWarnings(True)
    take_over_libraries()
    threading.excepthook = lambda given: _uncaught("a thread has ended", given.exc_value)
    sys.unraisablehook = lambda given: _uncaught("a fault that nobody could be told of", given.exc_value)


def take_over_libraries() -> None:
    """Let libraries that log to the terminal in their own form use this log; again after others were imported."""
    for name in list(logging.root.manager.loggerDict):
        _take_over(logging.getLogger(name))


def access(**fields: Any) -> None:
    """Log a request that has ended. Fields that are None are left out."""
    if _ACCESS.isEnabledFor(logging.INFO):
        known = {name: value for name, value in fields.items() if value is not None}
        _ACCESS.info("request", extra={"fields": known})


def printable(text: str, keep: str = "") -> str:
    """Escape control characters and everything else that a terminal would interpret. `keep`: left as they are."""
    table = {code: shown for code, shown in _CONTROL.items() if chr(code) not in keep} if keep else _CONTROL
    return text.translate(table)


def _take_over(library: logging.Logger) -> None:
    """Make a library that logs to the terminal in its own form use this log."""
    for handler in library.handlers[:]:
        if type(handler) is logging.StreamHandler:  # a handler for a file was asked for by somebody
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
    """Formats a record as one JSON object. JSON has no line ends, whatever a name or a path contains."""

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
    # asyncio puts an exception that nobody awaited into its message; the traceback has what may be logged of it.
    text = record.getMessage().rstrip()
    return text.partition("\n")[0] if record.name == "asyncio" else text


def _trace(record: logging.LogRecord) -> list[str]:
    """Return the traceback lines of a record's exception and of those that caused it, the earliest first."""
    error = record.exc_info[1] if record.exc_info else None
    return [*trace_lines(error), *(record.stack_info or "").splitlines()]
