"""`Recorder`: collects what a request's outputs say and writes its receipt."""

from __future__ import annotations

import dataclasses
import datetime as dt
import struct
from dataclasses import dataclass, field
from typing import Final

from engine.receipts.canonical import canonical, digest_of_ids, sha256
from engine.receipts.receipt import (
    ChoiceRecord,
    Environment,
    PromptRecord,
    Receipt,
    ServerRecord,
    Stability,
    recorded_margins,
)
from engine.receipts.request_record import to_record
from engine.types.model_info import ModelInfo
from engine.types.outputs import ChoiceDelta, FinishReason, RequestOutput
from engine.types.requests import GenerationRequest, PreparedRequest
from engine.types.versions import PROJECT_VERSION

__all__ = ["THIS_PROGRAM", "Recorder", "recorded", "timed"]

THIS_PROGRAM: Final = ServerRecord("verbatim", PROJECT_VERSION)


def recorded(request: GenerationRequest, info: ModelInfo, now: dt.datetime) -> GenerationRequest:
    """Return the request as it must be prepared for a receipt: its outputs hold scores, and its clock is pinned.

    The clock is that of `timed`.
    """
    return dataclasses.replace(timed(request, info, now), record=True)


def timed(request: GenerationRequest, info: ModelInfo, now: dt.datetime) -> GenerationRequest:
    """Return the request with a clock: its own, else the one that the model's entry pins, else `now`."""
    pinned = info.default_parts.get("template_clock")
    clock = request.clock or (dt.datetime.fromisoformat(pinned) if isinstance(pinned, str) else now)
    # The name of a time zone is not written, so a template must not see it.
    return dataclasses.replace(request, clock=dt.datetime.fromisoformat(clock.isoformat()))


@dataclass(slots=True)
class _Choice:
    """What the outputs have said of one choice so far."""

    token_ids: list[int] = field(default_factory=list)
    scores: bytearray = field(default_factory=bytearray)
    margins: list[float | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: ChoiceDelta) -> None:
        self.token_ids.extend(delta.token_ids)
        for pair in delta.scores:
            self.scores += struct.pack("<ff", *pair)
        self.margins.extend(recorded_margins(delta))
        self.finish_reason = delta.finish_reason or self.finish_reason

    def record(self, index: int, *, text: bool, margins: bool) -> ChoiceRecord:
        """Return the finished choice; `text`: with its ids, `margins`: they were asked for."""
        assert self.finish_reason is not None, "the choice has not ended"
        found = tuple(self.margins) if margins else None
        return ChoiceRecord(
            index=index,
            finish_reason=self.finish_reason,
            tokens=len(self.token_ids),
            sha256=digest_of_ids(self.token_ids),
            bits=sha256(bytes(self.scores)),
            token_ids=tuple(self.token_ids) if text else None,
            scores=bytes(self.scores) if text else None,
            margins=found if text else None,
            stability=None if found is None else Stability.of(found),
        )


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
        server: ServerRecord = THIS_PROGRAM,
        text: bool = True,
        prompt_ids: bool = True,
    ) -> None:
        """Begin a receipt.

        Args:
            request: as `recorded` returned it, before it was prepared.
            id: the completion's id; created: Unix seconds.
            server: the program that writes it.
            text: whether the receipt holds the request, the ids and the scores, or only their digests. Scores are left
                out as well: with the seed, a perturbed score may tell its token.
            prompt_ids: whether it holds the prompt's ids.

        Raises:
            ReceiptError: the request holds something that JSON cannot write.
        """
        assert request.record, "the request was not prepared for a receipt"
        record = to_record(request, prepared.params)
        self._request = record if text else {"sha256": sha256(canonical(record))}
        ids = prepared.prompt_token_ids
        self._prompt = PromptRecord(len(ids), digest_of_ids(ids), ids if text and prompt_ids else None)
        self._info = info
        self._id, self._created, self._server, self._text = id, created, server, text
        self._margins = prepared.params.margins
        self._choices = [_Choice() for _ in range(prepared.params.n)]

    def add(self, output: RequestOutput) -> None:
        """Add the next output of the request."""
        for delta in output.deltas:
            self._choices[delta.index].add(delta)

    def receipt(self) -> Receipt:
        """Return the receipt. Called once the request has finished without an error."""
        info = self._info
        return Receipt(
            id=self._id,
            created=self._created,
            server=self._server,
            request=self._request,
            prompt=self._prompt,
            model=info.manifest,
            environment=Environment(info.system_fingerprint, info.fingerprint_parts),
            law=info.law,
            choices=tuple(
                choice.record(i, text=self._text, margins=self._margins) for i, choice in enumerate(self._choices)
            ),
        )
