"""A finding of `verbatim doctor`. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "fault", "ok", "warn"]

State = Literal["ok", "warn", "fault"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one thing.

    Attributes:
        state: `warn`: verbatim works, with less than it could; `fault`: something will not work.
        cure: what to do; empty if all is well.
    """

    name: str
    state: State
    detail: str
    cure: str = ""


def ok(name: str, detail: str) -> Finding:
    return Finding(name, "ok", detail)


def warn(name: str, detail: str, cure: str) -> Finding:
    return Finding(name, "warn", detail, cure)


def fault(name: str, detail: str, cure: str) -> Finding:
    return Finding(name, "fault", detail, cure)
