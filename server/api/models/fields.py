"""The fields of bodies for `POST /models/{id}/load` and `/unload`; see `server/api/fields.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from engine import InvalidParameter
from server.api.fields import BodyFields, Field, declare
from server.api.parsing import FLAG
from server.json_text import load_body

__all__ = ["LOAD", "MOST_SECONDS", "UNLOAD", "parse_load", "parse_unload"]

MOST_SECONDS: Final = 3600.0

LOAD: Final = BodyFields(
    honoured={"wait": declare(FLAG, "Answer once the model is ready; otherwise at once, with 202.", default=True)}
)
"""`POST /models/{id}/load`; the body may be left out."""

UNLOAD: Final = BodyFields(
    honoured={
        "wait_seconds": Field(
            ((int, float), "a number"),
            {
                "type": "number",
                "minimum": 0,
                "maximum": MOST_SECONDS,
                "default": 0,
                "description": "Wait so long until the model has no requests. New ones are served meanwhile.",
            },
        )
    }
)
"""`POST /models/{id}/unload`; the body may be left out."""


def parse_load(raw: bytes, request_id: str) -> tuple[bool, tuple[str, ...]]:
    """Return whether to wait, and the names of unknown fields.

    Raises:
        InvalidFormat: not JSON, not an object, a field of the wrong type.
    """
    data, ignored = _read(LOAD, raw)
    return LOAD.given(data, "wait") is not False, ignored


def parse_unload(raw: bytes, request_id: str) -> tuple[float, tuple[str, ...]]:
    """Return for how many seconds to wait, and the names of unknown fields.

    Raises:
        InvalidFormat: not JSON, not an object, a field of the wrong type.
        InvalidParameter: it is too long, or less than nothing.
    """
    data, ignored = _read(UNLOAD, raw)
    seconds = float(UNLOAD.given(data, "wait_seconds") or 0)
    if not 0 <= seconds <= MOST_SECONDS:
        raise InvalidParameter(
            f"wait_seconds must be between 0 and {MOST_SECONDS:g}, not {seconds:g}.", param="wait_seconds"
        )
    return seconds, ignored


def _read(fields: BodyFields, raw: bytes) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    data = load_body(raw) if raw.strip() else {}
    return data, tuple(name for name in data if name not in fields.known)
