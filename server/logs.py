"""The log: lines for people, or an object a line for programs. Never what was said, never a key."""

from __future__ import annotations

import json
import logging
import time
from typing import Any, Final, Literal

__all__ = ["access", "configure"]

_ACCESS: Final = logging.getLogger("verbatim.access")
_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


def configure(form: Literal["text", "json"], *, access_log: bool) -> None:
    """Set up the process's log, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _ACCESS.setLevel(logging.INFO if access_log else logging.WARNING)


def access(**fields: Any) -> None:
    """Note a request that has ended. Fields without a value are left out."""
    if _ACCESS.isEnabledFor(logging.INFO):
        known = {name: value for name, value in fields.items() if value is not None}
        _ACCESS.info("request", extra={"fields": known})


class _TextFormatter(logging.Formatter):
    """A line a record; what came from outside cannot begin another. Traces keep their lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        told = "".join(f" {name}={value}" for name, value in fields.items())
        return (super().formatMessage(record) + told).translate(_CONTROL)


class _JsonFormatter(logging.Formatter):
    """An object a record. JSON has no line ends in it, whatever a name or a path holds."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        entry: dict[str, Any] = {
            "time": when,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)
