"""`Recording`: becomes the receipt of one reply, while the reply is made. One receipt for each of its prompts."""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

from engine import (
    GenerationRequest,
    ModelInfo,
    PreparedRequest,
    ReceiptError,
    Recorder,
    RequestOutput,
    recorded,
)
from server.json_text import escape_line_breaks
from server.receipts.keeping import Written
from server.receipts.service import Receipts
from server.wire.bodies import SMALL, BodyMemory

__all__ = ["NO_RECEIPT", "FinishedRecording", "RecordedBody", "Recording", "begin_recording", "to_be_recorded"]

log = logging.getLogger("verbatim.server")


@dataclass(frozen=True, slots=True)
class FinishedRecording:
    """What a reply tells of its receipt.

    Attributes:
        member: name and value of a member of the reply's JSON object; empty if no receipt is sent.
        headers: of a reply in one piece.
    """

    member: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


NO_RECEIPT: Final = FinishedRecording()


@dataclass(frozen=True, slots=True)
class RecordedBody:
    """The body that asked for a reply: a recording holds its texts until the reply has ended.

    Attributes:
        memory: where as many bytes are reserved.
        group: for which group.
        size: bytes.
    """

    memory: BodyMemory
    group: str
    size: int


class Recording:
    """Collects the outputs of one reply, and finishes its receipts."""

    def __init__(
        self,
        receipts: Receipts,
        recorders: Sequence[Recorder],
        prepared: Sequence[PreparedRequest],
        body: RecordedBody,
        *,
        sent: bool,
    ) -> None:
        """`recorders`: one for each of the prepared requests; `sent`: whether the receipts go with the reply."""
        self._receipts, self._recorders, self._body, self._sent = receipts, recorders, body, sent
        n = prepared[0].params.n
        places = zip(prepared, recorders, strict=True)
        self._places = {one.request_id: (number * n, recorder) for number, (one, recorder) in enumerate(places)}

    @asynccontextmanager
    async def memory(self) -> AsyncIterator[None]:
        """Reserve the memory that the recording takes.

        Raises:
            BodiesFull: there is none at the moment.
        """
        body = self._body
        body.memory.take(body.size, body.group, small=body.size <= SMALL)
        try:
            yield
        finally:
            body.memory.give(body.size, body.group)

    def add(self, output: RequestOutput) -> None:
        """Add an output, whose choices are numbered across the reply's requests."""
        base, recorder = self._places[output.request_id]
        if base:
            own = tuple(dataclasses.replace(delta, index=delta.index - base) for delta in output.deltas)
            output = dataclasses.replace(output, deltas=own)
        recorder.add(output)

    async def finish(self) -> FinishedRecording:
        """Write and keep the receipts, once the last output was added. A fault is logged, and costs only a receipt."""
        name = "receipt" if len(self._recorders) == 1 else "receipts"
        try:
            written = await self._receipts.write(self._recorders)
        except Exception:
            log.exception("a receipt could not be written")
            return FinishedRecording(f'"{name}":null'.encode()) if self._sent else NO_RECEIPT
        kept = await self._receipts.keep(self._body.group, written)
        headers = {} if kept else {"x-receipt-kept": "false"}
        return FinishedRecording(_member(name, written) if self._sent else b"", headers)


def _member(name: str, written: Sequence[Written]) -> bytes:
    texts = [escape_line_breaks(one.body.decode()) for one in written]
    return f'"{name}":{texts[0] if name == "receipt" else "[" + ",".join(texts) + "]"}'.encode()


def to_be_recorded(request: GenerationRequest, info: ModelInfo) -> GenerationRequest:
    """Return a request as it must be prepared to be recorded: its template reads the clock of this moment."""
    return recorded(request, info, dt.datetime.now())


async def begin_recording(
    receipts: Receipts,
    asked: bool | Literal["digest"],
    requests: Sequence[tuple[GenerationRequest, PreparedRequest]],
    info: ModelInfo,
    created: int,
    body: RecordedBody,
) -> Recording | None:
    """Begin the receipts of a reply's requests, each as it was prepared. None if it gets none.

    Raises:
        ReceiptError: a receipt was asked for, and the request holds something that none can.
    """
    form = receipts.form(asked)
    if form is None:
        return None
    try:
        recorders = [await receipts.begin(request, made, info, created, form) for request, made in requests]
    except ReceiptError as error:
        if asked:
            raise
        log.error("a reply gets no receipt: %s", error.message)
        return None
    return Recording(receipts, recorders, [made for _, made in requests], body, sent=bool(asked))
