"""Check a receipt with an engine, in the caller's own thread. The rules are in `engine.receipts`."""

from __future__ import annotations

from engine.engine import Engine
from engine.llm import LLM
from engine.receipts.receipt import Receipt
from engine.receipts.verdict import TOLERANCE, CheckReport, Mode

__all__ = ["check_receipt"]


def check_receipt(
    engine: Engine | LLM, receipt: Receipt, *, mode: Mode = "verify", tolerance: float = TOLERANCE
) -> CheckReport:
    """Compute a receipt's reply again and compare.

    Args:
        mode: `verify` computes the receipt's tokens as drafts, at the speed of a prompt; `replay` generates them.
        tolerance: see `engine.receipts.verdict.TOLERANCE`.
    """
    raise NotImplementedError
