"""Reads a report that another server has sent: every field has its type, and it is about the receipt that was sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from engine import Receipt, ReceiptError, VerbatimError
from server.json_text import load_text

__all__ = ["VERDICTS", "report_of"]

VERDICTS: Final = ("identical", "reproduced", "consistent", "refuted", "not_checkable")
"""From the best to the worst."""

_Fields = Mapping[str, Callable[[Any], bool]]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_verdict(value: Any) -> bool:
    return isinstance(value, str) and value in VERDICTS


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _object_of(fields: _Fields) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and value.keys() == fields.keys() and all(fields[name](value[name]) for name in fields)
    )


_FIRST: Final[_Fields] = {
    "position": _is_count,
    "expected": _or_none(_is_count),
    "drawn": _or_none(_is_count),
    "expected_text": _or_none(_is_text),
    "drawn_text": _or_none(_is_text),
    "closeness": _or_none(_is_number),
}
_CHOICE: Final[_Fields] = {
    "index": _is_count,
    "verdict": _is_verdict,
    "sentence": _is_text,
    "tokens": _is_count,
    "drawn": _is_count,
    "different": _is_count,
    "largest_difference": _or_none(_is_number),
    "score": _or_none(_is_number),
    "first": _or_none(_object_of(_FIRST)),
}
_REPORT: Final[_Fields] = {
    "id": _is_text,
    "digest": _is_text,
    "verdict": _is_verdict,
    "sentence": _is_text,
    "mode": lambda value: value in ("verify", "replay"),
    "model": _is_text,
    "fingerprint": _is_text,
    "tolerance": _is_number,
    "environment": _list_of(_is_text),
    "choices": _list_of(_object_of(_CHOICE)),
    "signed_by": _or_none(_is_text),
    "expected_score": _is_number,
}


def report_of(data: bytes, receipt: Receipt) -> dict[str, Any]:
    """Return the report about a receipt that a server has sent.

    Raises:
        ReceiptError: it is no report, is about something else, or contradicts itself.
    """
    fault = "it is not JSON that is read here"
    try:
        report = load_text(data.decode())
        fault = _fault(report, receipt)
    except (ValueError, RecursionError, VerbatimError):
        report = {}
    if fault:
        raise ReceiptError(f"the server's answer is no report about a receipt that was sent: {fault}.")
    found: dict[str, Any] = report
    return found


def _fault(report: Any, receipt: Receipt) -> str:
    """Say what is wrong with a report; empty if nothing is."""
    if not isinstance(report, dict):
        return "it is no object"
    for name in sorted(report.keys() ^ _REPORT.keys()):
        return f"it lacks {name}" if name in _REPORT else f"{name!r:.60} is not known"
    for name, check in _REPORT.items():
        if not check(report[name]):
            return f"{name} is not as it should be"
    for name, expected in (("id", receipt.id), ("digest", receipt.digest)):
        if report[name] != expected:
            return f"its {name} is another"
    verdict, choices = report["verdict"], report["choices"]
    if not choices:  # decided before any choice was computed
        return "" if verdict in ("refuted", "not_checkable") else f"it says {verdict}, but nothing was compared"
    if [(one["index"], one["tokens"]) for one in choices] != [(one.index, one.tokens) for one in receipt.choices]:
        return "its choices are not those of the receipt"
    if any(one["different"] > one["drawn"] or one["drawn"] > one["tokens"] + 1 for one in choices):
        return "it counts more tokens than there are"
    if verdict != max((one["verdict"] for one in choices), key=VERDICTS.index):
        return "its verdict is not the worst of its choices'"
    return ""
