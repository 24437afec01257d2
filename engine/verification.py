"""Check a receipt with an engine, in the caller's own thread. The rules are in `engine.receipts`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from engine.engine import Engine
from engine.errors import VerbatimError
from engine.faults import reply_fault
from engine.llm import LLM
from engine.receipts.check import ReceiptCheck
from engine.receipts.receipt import Receipt
from engine.receipts.verdict import TOLERANCE, CheckReport, Mode
from engine.types.model_info import ModelInfo

__all__ = ["check_receipt"]

_REQUEST_ID: Final = "receipt"


def check_receipt(
    engine: Engine | LLM,
    receipt: Receipt,
    *,
    mode: Mode = "verify",
    tolerance: float = TOLERANCE,
    adapter: str | None = None,
) -> CheckReport:
    """Compute a receipt's reply again and compare. The engine must have no other work.

    Args:
        mode: `verify` computes the receipt's tokens as drafts, at the speed of a prompt; `replay` generates them. Where
            a replay in another environment draws another token, the receipt's own tokens are followed in addition.
        tolerance: see `engine.receipts.verdict.TOLERANCE`.
        adapter: the name of the adapter that computes, or an empty name; None: whichever has the receipt's files.
    """
    engine = engine.engine if isinstance(engine, LLM) else engine
    if adapter is None:
        adapter = _adapter_of(receipt, engine.info)
    info = engine.info.with_adapter(adapter)
    check = ReceiptCheck(receipt, info, mode=mode, tolerance=tolerance, text_of=_text_of(engine))
    report = _run(engine, check, adapter)
    if check.differs_elsewhere:
        follow = ReceiptCheck(receipt, info, tolerance=tolerance, text_of=_text_of(engine))
        report = dataclasses.replace(_run(engine, follow, adapter), mode=mode)
    return report


def _adapter_of(receipt: Receipt, info: ModelInfo) -> str:
    """Return the name of the adapter that a receipt's reply was made with, by the files; else an empty name."""
    names = (name for name, one in info.adapters.items() if one.manifest.files == receipt.model.files)
    return next(names, "")


def _text_of(engine: Engine) -> Callable[[int], str]:
    return engine.model.vocabulary.token_text


def _run(engine: Engine, check: ReceiptCheck, adapter: str) -> CheckReport:
    if engine.has_work:
        raise ValueError("the engine has other work, whose outputs a check would take")
    request = check.request(_REQUEST_ID)
    try:
        prepared = (
            None if request is None else check.prepared(engine.prepare(dataclasses.replace(request, adapter=adapter)))
        )
    except VerbatimError as error:
        return check.refused(error)
    if prepared is None:
        return check.report()
    try:
        engine.add(prepared)
    except Exception as error:  # its grammar does not start
        return check.refused(reply_fault(_REQUEST_ID, error))
    while engine.has_work:
        for output in engine.step():
            check.add(output)
    return check.report()
