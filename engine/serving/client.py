"""`EngineClient`: the half of an engine that lives on an event loop: streams, groups, fair turns, death.

    event loop ──commands──▶ transport ══ a thread or a process ══ EngineLoop: step, step, step …
         ◀──one call_soon_threadsafe per step── everything the step did

If the engine dies, every waiting request gets the cause and every later one is refused with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.config import ModelConfig
from engine.errors import EngineDead, QueueFull, VerbatimError
from engine.serving.deaths import engine_dead
from engine.serving.protocol import Abort, Aborted, Ended, EngineProtocol, Event, Outputs, Submit
from engine.serving.request_stream import RequestStream
from engine.serving.transport import PREPARING, Transport, Verb
from engine.serving.waiting.fair_lock import FairLock
from engine.types.model_info import EngineStats, ModelInfo, TokenizerInfo
from engine.types.outputs import RequestOutput, Usage
from engine.types.requests import GenerationRequest, PreparedRequest, TokenizedPrompt

__all__ = ["EngineClient"]

_ANSWER_SECONDS = 10.0
"""How long a lookup of a token's text may take; it is one of microseconds in an engine that lives."""


class EngineClient(EngineProtocol):
    """One loaded model, shared by many requests. Owns its transport, and through it the engine.

    Created anywhere; `submit` and the streams belong to one event loop at a time: another one may submit once the one
    before is closed, and what was left unfinished there is aborted.

    The engine knows each request by its submission, a name that is never used twice: an id may come again while the
    step that still computes for an aborted request of that id is under way.
    """

    def __init__(
        self, transport: Transport, config: ModelConfig, on_death: Callable[[VerbatimError], None] | None = None
    ) -> None:
        """`on_death`: called once, on a thread of the transport, if the engine stops without `close`."""
        self._transport = transport
        self._limit = config.max_sequences + config.max_queue
        self._stall_timeout = config.stall_timeout
        self._on_death = on_death
        self._submissions = itertools.count()
        self._names: dict[str, str] = {}  # of unfinished requests: the name of the submission, by request id
        self._streams: dict[str, RequestStream] = {}  # by submission, like all that follows
        self._leaving: dict[str, RequestStream] = {}  # aborted, and the engine does not know it yet
        self._groups: dict[str, str] = {}  # of unfinished requests
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._dead: VerbatimError | None = None
        self._closed = False
        self._close_lock = threading.Lock()
        self._preparing = FairLock(PREPARING)
        transport.start(self._emit)

    @property
    def info(self) -> ModelInfo:
        return self._transport.info

    @property
    def step_bytes(self) -> Mapping[str, int]:
        return self._transport.step_bytes

    @property
    def num_unfinished(self) -> int:
        """Requests that run or wait, those that were aborted aside."""
        return len(self._streams)

    @property
    def num_leaving(self) -> int:
        """Aborted requests that the engine has not let go of yet."""
        return len(self._leaving)

    @property
    def is_stepping(self) -> bool:
        """Whether a step is under way."""
        return self._transport.busy_since is not None

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Check, render and tokenise a request where the model is, granted fairly across groups.

        A caller that gives up while it waits for its turn never has one. One that gives up later keeps its place
        until the work is done.

        Raises: what `Preparer.prepare` raises, and EngineDead.
        """
        prepared: PreparedRequest = await self._in_turn(request.group, "prepare", request)
        return prepared

    async def tokenize(self, request: GenerationRequest) -> TokenizedPrompt:
        """Render and tokenise a request's prompt, as `prepare` does."""
        prompt: TokenizedPrompt = await self._in_turn(request.group, "tokenize", request)
        return prompt

    async def detokenize(self, tokens: Sequence[int], group: str = "") -> str:
        """Return the text of some tokens, as `prepare` does."""
        text: str = await self._in_turn(group, "detokenize", tokens)
        return text

    async def tokenizer(self) -> TokenizerInfo:
        """Describe the model's tokenizer."""
        described: TokenizerInfo = await self._in_turn("", "tokenizer_info", None)
        return described

    def token_text(self, token_id: int) -> str:
        self._raise_if_dead()
        try:
            text: str = self._transport.ask("token_text", token_id).result(_ANSWER_SECONDS)
        except TimeoutError:
            raise EngineDead(f"the engine of {self.info.id} does not answer.") from None
        return text

    async def _in_turn(self, group: str, verb: Verb, argument: Any) -> Any:
        """Ask the engine for something that takes a while, granted fairly across groups."""
        self._raise_if_dead()
        await self._preparing.take(group)
        try:
            self._raise_if_dead()
            work = asyncio.wrap_future(self._transport.ask(verb, argument))
        except BaseException:
            self._preparing.give_back(group)
            raise
        work.add_done_callback(lambda done: self._answered(done, group))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            if work.cancelled():  # by `close`, before it was begun
                raise engine_dead(self.info.id, RuntimeError("the server is shutting down")) from None
            raise

    def _answered(self, work: asyncio.Future[Any], group: str) -> None:
        self._preparing.give_back(group)
        if not work.cancelled():
            work.exception()  # looked at, whoever is left to hear of it

    def submit(self, request: PreparedRequest) -> RequestStream:
        """Queue a request. A group of which none is unfinished may still queue one where there is no room.

        Raises:
            QueueFull: as many requests as may run and wait are unfinished.
            EngineDead: with the cause.
            ValueError: an unfinished request has this id.
            RuntimeError: another event loop has submitted, and is not closed.
        """
        self._raise_if_dead()
        self._belong_to(loop := asyncio.get_running_loop())
        if len(self._streams) >= self._limit and (not request.group or request.group in self._groups.values()):
            raise QueueFull(
                f"{len(self._streams)} requests are running or waiting; {self.info.id} takes {self._limit}.",
                limit=self._limit,
            )
        if request.request_id in self._names:
            raise ValueError(f"the request id {request.request_id!r} is in use")
        name = f"{request.request_id}#{next(self._submissions)}"
        self._names[request.request_id] = name
        stream = self._streams[name] = RequestStream(request.request_id)
        self._groups[name] = request.group
        self._transport.send(Submit(replace(request, request_id=name)))
        if self._dead is not None:  # it has died meanwhile, and this stream was not there to be told
            loop.call_soon(self._fail_all, self._dead)
        return stream

    def _belong_to(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop is self._event_loop:
            return
        if self._event_loop is not None:
            if not self._event_loop.is_closed():
                raise RuntimeError(f"the requests of {self.info.id} belong to another event loop, which is not closed")
            for name in self._streams:
                self._transport.send(Abort(name))
            for known in (self._names, self._streams, self._leaving, self._groups):
                known.clear()  # nobody is left to hear of them
        self._event_loop = loop

    def abort(self, request_id: str) -> None:
        """Free a request's place before the next step. Does nothing if the request is gone.

        Its stream ends at once; what it has used is known when the step under way has ended (`RequestStream.let_go`).
        """
        name = self._names.get(request_id)
        if name is not None:
            stream = self._forget(name)
            assert self._event_loop is not None
            stream.leaving = self._event_loop.create_future()
            self._leaving[name] = stream
            stream.end()
            self._transport.send(Abort(name))

    def _forget(self, name: str) -> RequestStream:
        stream = self._streams.pop(name)
        del self._groups[name], self._names[stream.request_id]
        return stream

    def stats(self) -> EngineStats:
        since = self._transport.busy_since
        stalled = since is not None and time.monotonic() - since > self._stall_timeout
        return replace(self._transport.stats(), alive=self._dead is None and not self._closed, stalled=stalled)

    def close(self) -> bool:
        """Stop after the step under way; unfinished requests end with EngineDead. Safe to call twice.

        A step that does not end (a kernel that hangs, a driver) is not waited for longer than `LAST_STEP` seconds. Then
        a process is killed, and a thread is left behind: this is False.
        """
        with self._close_lock:
            self._closed = True
            ended = self._transport.close()
            if not ended and self._dead is None:
                self._emit(Ended(engine_dead(self.info.id, RuntimeError("its step does not end"))))
            return ended

    def _emit(self, event: Event) -> None:
        """Hand an event of the engine to the event loop. Called on a thread of the transport."""
        if isinstance(event, Ended):
            first, self._dead = self._dead is None, event.error  # also for those who come while the loop is busy
            if first and not self._closed and self._on_death is not None:
                self._on_death(event.error)
        if self._event_loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is listening any more
                self._event_loop.call_soon_threadsafe(self._receive, event)

    # -- on the event loop --------------------------------------------------------------------------------------

    def _receive(self, event: Event) -> None:
        match event:
            case Outputs(outputs):
                for output in outputs:
                    self._deliver(output)
            case Aborted(name, usage):
                self._let_go(name, usage)
            case Ended(error):
                self._fail_all(error)

    def _deliver(self, output: RequestOutput) -> None:
        name = output.request_id
        if name in self._leaving:
            self._leaving[name].note(output)
        elif name in self._streams:
            stream = self._forget(name) if output.finished else self._streams[name]
            stream.deliver(replace(output, request_id=stream.request_id))

    def _let_go(self, name: str, usage: Usage | None) -> None:
        """Note that the engine has let go of an aborted request; it may have ended in the step that was under way."""
        stream = self._leaving.pop(name, None)
        if stream is not None and stream.leaving is not None and not stream.leaving.done():
            stream.usage = usage or stream.usage
            stream.leaving.set_result(None)

    def _fail_all(self, error: VerbatimError) -> None:
        for name in list(self._leaving):
            self._let_go(name, None)
        for name in list(self._streams):
            stream = self._forget(name)
            stream.deliver(RequestOutput(stream.request_id, (), stream.usage or Usage(0, 0), True, error))

    def _raise_if_dead(self) -> None:
        if self._dead is not None:
            raise EngineDead(self._dead.message)
        if self._closed:
            raise engine_dead(self.info.id, RuntimeError("the server is shutting down"))
