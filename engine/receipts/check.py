"""`ReceiptCheck`: everything of a check but the engine's work. Its caller prepares, runs and hands over the outputs.

    check = ReceiptCheck(receipt, info)
    request = check.request(request_id)         None: decided already, see check.report()
    prepared = check.prepared(engine.prepare(request))      None: the same
    … run it …  check.add(output)
    check.report()

An error on the way goes to `check.refused`.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.errors import VerbatimError
from engine.receipts.receipt import Receipt
from engine.receipts.verdict import TOLERANCE, CheckReport, Mode
from engine.types.model_info import ModelInfo
from engine.types.outputs import RequestOutput
from engine.types.requests import GenerationRequest, PreparedRequest

__all__ = ["ReceiptCheck"]


class ReceiptCheck:
    """Checks one receipt against one model."""

    def __init__(
        self,
        receipt: Receipt,
        info: ModelInfo,
        *,
        mode: Mode = "verify",
        tolerance: float = TOLERANCE,
        text_of: Callable[[int], str] | None = None,
    ) -> None:
        """Begin a check.

        Args:
            info: of the model that computes.
            mode: `verify` computes the receipt's tokens as drafts; `replay` generates them again.
            tolerance: see `TOLERANCE`.
            text_of: a token's text, for the report; None to name tokens by their ids alone.
        """
        raise NotImplementedError

    def request(self, request_id: str, *, group: str = "") -> GenerationRequest | None:
        """Return the receipt's request; None if the receipt cannot be checked with this model: see `report`."""
        raise NotImplementedError

    def prepared(self, prepared: PreparedRequest) -> PreparedRequest | None:
        """Return what the engine must run, from the request as it was prepared; None if its prompt decides already."""
        raise NotImplementedError

    def refused(self, error: VerbatimError) -> CheckReport:
        """Report that the request was refused, or ended with an error."""
        raise NotImplementedError

    def add(self, output: RequestOutput) -> None:
        """Add the next output of the request."""
        raise NotImplementedError

    def report(self) -> CheckReport:
        """Return the report, once it is decided: the last output was added, or a step before returned None."""
        raise NotImplementedError
