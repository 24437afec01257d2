"""One chat completion over HTTP, whole or streamed. Owns the request's place in the engine, from submit to any end.

submit ──▶ outputs ──▶ body / events            one lease: whatever happens (success, error, disconnect,
   └────────── disconnect ──▶ abort             cancellation), leaving it frees the place
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from engine import EngineProtocol, PreparedRequest, RequestStream, VerbatimError
from server.accounts.charging import Account
from server.api.chat_reply import KEEPALIVE, ChunkWriter, Collector, Reply, event
from server.errors import ClientGone, describe, error_response
from server.json_text import to_json
from server.settings import ServerSettings

T = TypeVar("T")


@asynccontextmanager
async def lease(
    engine: EngineProtocol, prepared: PreparedRequest, account: Account | None = None
) -> AsyncIterator[RequestStream]:
    """A place in the engine, held and settled with an account. Abort is harmless once a request has finished, so there
    is only one way out."""
    async with account.charged(prepared) if account else contextlib.nullcontext():
        stream = engine.submit(prepared)
        if account:
            account.outputs = stream
        try:
            yield stream
        finally:
            engine.abort(prepared.request_id)


class CompletionResponse(Response):
    """An ASGI response that submits its request when it is sent, so that a refusal can still be a status."""

    def __init__(
        self,
        engine: EngineProtocol,
        reply: Reply,
        settings: ServerSettings,
        *,
        stream: bool,
        include_usage: bool,
        headers: dict[str, str],
        account: Account | None = None,
    ) -> None:
        super().__init__()
        self.account = account
        self.engine = engine
        self.prepared = reply.prepared
        self.reply = reply
        self.settings = settings
        self.stream = stream
        self.include_usage = include_usage
        self.extra_headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with lease(self.engine, self.prepared, self.account) as outputs:
                answer = self._streamed(outputs, send) if self.stream else self._whole(outputs)
                response = await unless_disconnected(answer, receive)
        except VerbatimError as error:  # nothing has been sent yet
            response = error_response(error, self.settings.retry_after_seconds)
            response.headers.update(self.extra_headers)
        if response is not None:
            try:
                await response(scope, receive, send)
            except OSError:  # some servers say so where others report a disconnect
                raise ClientGone from None

    async def _whole(self, outputs: RequestStream) -> Response:
        collector = Collector(self.reply)
        async for output in outputs:
            if output.error:
                raise output.error
            collector.add(output)
        if not collector.complete:
            raise RuntimeError("the engine ended a request without finishing it")
        body = to_json(collector.body()).encode()
        return Response(body, media_type="application/json", headers=self.extra_headers)

    async def _streamed(self, outputs: RequestStream, send: Send) -> None:
        """Send events as they come. Until the first one, an error still has its status."""
        sender = _EventSender(send, self.extra_headers, self.settings.keepalive_seconds)
        beat = asyncio.create_task(sender.beat())
        try:
            await self._events(outputs, sender)
        except Exception as error:
            if not sender.started or isinstance(error, ClientGone):
                raise
            await sender.send(event(describe(error)[1]), more=False)
        finally:
            beat.cancel()
            if self.account:
                self.account.told = sender.started

    async def _events(self, outputs: RequestStream, sender: _EventSender) -> None:
        """All events of a request that succeeds. Raises what ended one that does not."""
        writer = ChunkWriter(self.reply, include_usage=self.include_usage)
        data = writer.start()
        async for output in outputs:
            batch = [output, *outputs.ready()]  # more than one if the client is slower than the engine
            last = batch[-1]
            data += b"".join([writer.add(o) for o in batch])
            if last.error:
                if sender.started and data:
                    await sender.send(data)
                raise last.error
            if last.finished:
                await sender.send(data + writer.end(last.usage), more=False)
                return
            if data:
                await sender.send(data)
                data = b""
        raise RuntimeError("the engine ended a request without finishing it")


class _EventSender:
    """The response side of a stream: headers once, then events, then comments while nothing happens."""

    def __init__(self, send: Send, headers: dict[str, str], keepalive: float) -> None:
        self._send = send
        self._headers = headers
        self._keepalive = keepalive
        self._last = time.monotonic()
        self.started = False

    async def send(self, data: bytes, *, more: bool = True) -> None:
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

    async def beat(self) -> None:
        """A comment line whenever the stream has been silent; a queued request shows a sign of life, too."""
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
    """Run `answer`, and give up on it as soon as the client is gone. The body has been read."""
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
