"""Runs the requests of one reply and sends it over HTTP, whole or streamed. Owns their places in the engine.

    hold ──▶ submit ──▶ outputs ──▶ body / events        one lease: whatever happens (success, error, disconnect,
               └─────── disconnect ──▶ abort             cancellation), leaving it frees the places and settles

Knows no shape of a reply: an `Endpoint` brings the writers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from engine import (
    EngineProtocol,
    JoinedStreams,
    ModelInfo,
    PreparedRequest,
    RequestOutput,
    RequestStream,
    SamplingParams,
    Usage,
    VerbatimError,
)
from server.accounts.account import Account
from server.api.parsing import ParsedRequest
from server.api.receipts.recording import NO_RECEIPT, FinishedRecording, Recording
from server.errors import ClientGone, error_response
from server.json_text import to_json
from server.metrics.replies import ReplyWatch
from server.settings import ServerSettings

T = TypeVar("T")

KEEPALIVE = b": keep-alive\n\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """What is the same in every part of one reply."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    requests: tuple[PreparedRequest, ...]
    """The engine's requests that it is made of, one per prompt."""
    prompt_logprobs: int | None = None
    """As in `ParsedRequest`."""
    repeated: Mapping[str, Any] = field(default_factory=dict)
    """The same."""

    @property
    def params(self) -> SamplingParams:
        """The parameters of every request, `max_tokens` aside: a prompt may leave less room than another."""
        return self.requests[0].params

    @property
    def num_choices(self) -> int:
        return len(self.requests) * self.params.n


class BodyWriter(Protocol):
    """Writes a reply as one JSON object."""

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""

    def add(self, output: RequestOutput) -> None:
        """Take in what one step has generated."""

    def body(self) -> dict[str, Any]:
        """Return the whole reply."""


class EventWriter(Protocol):
    """Writes a reply as server-sent events. Each method returns the bytes of some events."""

    def start(self) -> bytes: ...

    def add(self, output: RequestOutput) -> bytes: ...

    def end(self, usage: Usage, receipt: bytes) -> bytes:
        """`receipt`: the member of a JSON object that holds the reply's receipt; empty if it is not sent."""

    def fail(self, error: BaseException) -> bytes:
        """End the stream of a reply that an error has ended, whatever was written before."""


def _same(name: str | None) -> str | None:
    return name


def _as_it_is(parsed: ParsedRequest, info: ModelInfo) -> ParsedRequest:
    return parsed


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint for completions: how it reads a body, and how it writes a reply.

    Attributes:
        id_prefix: the start of every reply's id.
        parse: a body and the reply's id → the request.
        body: makes the writer of a reply in one piece.
        events: makes the writer of a streamed reply; the second argument says whether usage is included.
        own_name: what the engine calls a field, in its errors and among what it ignored → where the body has it.
        fitted: a request and what is known of its model → the request without what clients ask of all models alike
            and this one does not have. What is left out is named in `ignored`.
    """

    id_prefix: str
    parse: Callable[[bytes, str], ParsedRequest]
    body: Callable[[Reply], BodyWriter]
    events: Callable[[Reply, bool], EventWriter]
    own_name: Callable[[str | None], str | None] = _same
    fitted: Callable[[ParsedRequest, ModelInfo], ParsedRequest] = _as_it_is


@dataclass(frozen=True, slots=True)
class Job:
    """The prepared requests of a reply, and what the reply needs. `headers`: go with the response, whatever it is."""

    engine: EngineProtocol
    account: Account
    reply: Reply
    stream: bool
    include_usage: bool
    headers: dict[str, str]
    watch: ReplyWatch
    recording: Recording | None = None
    """What becomes the receipt; None if there will be none."""


@asynccontextmanager
async def lease(
    engine: EngineProtocol,
    requests: Sequence[PreparedRequest],
    account: Account,
    watch: ReplyWatch,
    told: dict[str, Any] | None = None,
) -> AsyncIterator[JoinedStreams]:
    """Hold the cost of a reply's requests and submit them all; abort them on leaving. `watch`: counts the reply.

    Aborting a finished request does nothing. `told`: for the access log; gets the tokens that were generated by then.
    """
    async with account.charged(requests, engine.info):
        streams: list[RequestStream] = []
        with watch:  # left last, when the engine was told of those that end early
            try:
                for request in requests:
                    streams.append(engine.submit(request))
                    watch.runs(streams[-1], request.params.n)
                    account.runs(streams[-1])
                yield JoinedStreams(streams, requests[0].params.n)
            finally:
                for stream in streams:
                    engine.abort(stream.request_id)
                if told is not None:
                    told["completion_tokens"] = sum(s.usage.completion_tokens for s in streams if s.usage)


class CompletionResponse(Response):
    """An ASGI response that submits its requests when it is sent, so that a refusal can still be a status."""

    def __init__(self, job: Job, endpoint: Endpoint, settings: ServerSettings) -> None:
        super().__init__()
        self._job = job
        self._endpoint = endpoint
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job = self._job
        told = scope.get("state", {}).get("told")
        try:
            outputs_of = lease(job.engine, job.reply.requests, job.account, job.watch, told)
            async with self._memory(), outputs_of as outputs:
                answer = self._streamed(outputs, send) if job.stream else self._whole(outputs)
                response = await unless_disconnected(answer, receive)
        except VerbatimError as error:  # nothing has been sent yet
            response = error_response(error, scope, self._settings.retry_after_seconds)
            response.headers.update(job.headers)
        if response is not None:
            try:
                await response(scope, receive, send)
            except OSError:  # how some servers report a disconnect
                raise ClientGone from None

    async def _whole(self, outputs: JoinedStreams) -> Response:
        writer = self._endpoint.body(self._job.reply)
        async for output in outputs:
            if output.error:
                raise output.error
            await _beside(writer.add, output, large=output.prompt_logprobs is not None)
            self._note(output)
        if not writer.complete:
            raise RuntimeError("the engine ended a request without finishing it")
        receipt = await self._receipt()
        large = self._job.reply.params.prompt_logprobs is not None
        body = await _beside(lambda: with_member(to_json(writer.body()).encode(), receipt.member), large=large)
        return Response(body, media_type="application/json", headers={**self._job.headers, **receipt.headers})

    def _memory(self) -> AbstractAsyncContextManager[None]:
        """Reserve the memory that the recording of the request takes while it runs."""
        return self._job.recording.memory() if self._job.recording is not None else contextlib.nullcontext()

    def _note(self, output: RequestOutput) -> None:
        if self._job.recording is not None:
            self._job.recording.add(output)

    async def _receipt(self) -> FinishedRecording:
        """Write and keep the receipt of a reply whose last output has come."""
        return await self._job.recording.finish() if self._job.recording is not None else NO_RECEIPT

    async def _streamed(self, outputs: JoinedStreams, send: Send) -> None:
        """Send events as they come. An error before the first one still gets its status."""
        sender = _EventSender(send, self._job.headers, self._settings.keepalive_seconds)
        beat = asyncio.create_task(sender.beat())
        writer = self._endpoint.events(self._job.reply, self._job.include_usage)
        try:
            await self._events(outputs, sender, writer)
        except Exception as error:
            if not sender.started or isinstance(error, ClientGone):
                raise
            await sender.send(writer.fail(error), more=False)
        finally:
            beat.cancel()
            self._job.account.sent = sender.started

    async def _events(self, outputs: JoinedStreams, sender: _EventSender, writer: EventWriter) -> None:
        """Send all events of a request that succeeds. Raises the error that ended one that does not."""
        data = writer.start()
        try:
            async for output in outputs:
                batch = [output, *outputs.ready()]  # more than one if the client is slower than the engine
                last = batch[-1]
                for one in batch:
                    data += await _beside(writer.add, one, large=one.prompt_logprobs is not None)
                if last.error:
                    raise last.error
                for one in batch:
                    self._note(one)
                if last.finished:
                    if self._job.recording is not None:  # the text does not wait for its receipt
                        data = await sender.send(data)
                    receipt = await self._receipt()
                    await sender.send(data + writer.end(last.usage, receipt.member), more=False)
                    return
                if data:
                    data = await sender.send(data)
            raise RuntimeError("the engine ended a request without finishing it")
        except Exception as error:
            if sender.started and data and not isinstance(error, ClientGone):
                await sender.send(data)  # what the end that follows is the end of
            raise


async def _beside(function: Callable[..., T], *arguments: Any, large: bool) -> T:
    """Call a function that writes a part of a reply: a large one on a thread, so that the event loop goes on."""
    return await asyncio.to_thread(function, *arguments) if large else function(*arguments)


class _EventSender:
    """Sends a stream: the headers once, then events, and comments while there are none."""

    def __init__(self, send: Send, headers: dict[str, str], keepalive: float) -> None:
        self._send = send
        self._headers = headers
        self._keepalive = keepalive
        self._last = time.monotonic()
        self.started = False

    async def send(self, data: bytes, *, more: bool = True) -> bytes:
        """Send some bytes. Returns those that are left to send: none."""
        self._last = time.monotonic()
        if not self.started:
            self.started = True
            headers = {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",  # a proxy in front must not hold events back
                **self._headers,
            }
            raw = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
            await self._deliver({"type": "http.response.start", "status": 200, "headers": raw})
        await self._deliver({"type": "http.response.body", "body": data, "more_body": more})
        return b""

    async def beat(self) -> None:
        """Send a comment whenever the stream has been silent for a while, also while the request is queued."""
        with contextlib.suppress(ClientGone):
            while True:
                silent = time.monotonic() - self._last
                if silent >= self._keepalive:
                    await self.send(KEEPALIVE)
                    silent = 0.0
                await asyncio.sleep(self._keepalive - silent)

    async def _deliver(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError as error:  # how some servers report a broken connection
            raise ClientGone from error


async def unless_disconnected(answer: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """Run `answer` and cancel it as soon as the client disconnects; then return None. The body must have been read."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def with_member(body: bytes, member: bytes) -> bytes:
    """Add a member to the end of a JSON object that has others. `member`: name and value, written; empty for none."""
    return body[:-1] + b"," + member + body[-1:] if member else body


def event(data: Any, name: str | None = None) -> bytes:
    """Write one server-sent event. JSON escapes line ends, so nothing inside can break out of it."""
    named = "" if name is None else f"event: {name}\n"
    return f"{named}data: {to_json(data)}\n\n".encode()
