"""`Recorder`: collects what a request's outputs say and writes its receipt."""

from __future__ import annotations

import datetime as dt

from engine.receipts.receipt import Receipt, ServerRecord
from engine.types.model_info import ModelInfo
from engine.types.outputs import RequestOutput
from engine.types.requests import GenerationRequest, PreparedRequest

__all__ = ["Recorder", "recorded"]


def recorded(request: GenerationRequest, info: ModelInfo, now: dt.datetime) -> GenerationRequest:
    """Return the request as it must be prepared for a receipt: its outputs hold scores, and its clock is pinned.

    The clock is the request's own, else the one that the model's entry pins, else `now`.
    """
    raise NotImplementedError


class Recorder:
    """Collects the outputs of one request; `receipt` makes its receipt once the last output was added."""

    def __init__(
        self,
        request: GenerationRequest,
        prepared: PreparedRequest,
        info: ModelInfo,
        *,
        id: str,
        created: int,
        server: ServerRecord | None = None,
        text: bool = True,
        prompt_ids: bool = True,
    ) -> None:
        """Begin a receipt.

        Args:
            request: as `recorded` returned it, before it was prepared.
            id: the completion's id; created: Unix seconds.
            server: the program that writes it; None: this package.
            text: whether the receipt holds the request, the ids and the scores, or only their digests.
            prompt_ids: whether it holds the prompt's ids.

        Raises:
            ReceiptError: the request holds something that JSON cannot write.
        """
        raise NotImplementedError

    def add(self, output: RequestOutput) -> None:
        """Add the next output of the request."""
        raise NotImplementedError

    def receipt(self) -> Receipt:
        """Return the receipt. Called once the request has finished without an error."""
        raise NotImplementedError
