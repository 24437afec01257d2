"""Compare two receipts: which part differs first, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from engine.receipts.receipt import Receipt

__all__ = ["Difference", "Part", "pair_receipts", "receipt_differences"]

Part = Literal["request", "prompt", "model", "environment", "token", "bits", "finish_reason"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two receipts differ. `where`: the field, the file, the part or `choice 0, token 12`."""

    part: Part
    where: str
    a: Any
    b: Any
    sentence: str


def receipt_differences(a: Receipt, b: Receipt, text_of: Callable[[int], str] | None = None) -> list[Difference]:
    """List the differences of two receipts, first parts first; empty if both record the same."""
    raise NotImplementedError


def pair_receipts(a: Iterable[Receipt], b: Iterable[Receipt]) -> Iterator[tuple[Receipt | None, Receipt | None]]:
    """Pair the receipts of two files: by id, else by the digest of their requests; None for one without a partner."""
    raise NotImplementedError
