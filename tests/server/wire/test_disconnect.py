"""A client that goes away frees its place at once: streaming or not, waiting or running, however it goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import Any

import pytest
from asgi import BOUND, begin, run
from fakes import HELLO, SILENT, FakeEngine, Step, chat, make_app, output

from engine import ChoiceDelta, PreparedRequest


def endless(request: PreparedRequest) -> Iterable[Step]:
    i = 0
    while True:
        i += 1
        yield output(request, [ChoiceDelta(0, "a", (i,))], i)
        yield 0.001


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("script", [SILENT, endless], ids=["queued", "running"])
def test_the_place_is_freed(stream: bool, script: Any) -> None:
    engine = FakeEngine(script)
    app = make_app(engine)

    async def leave() -> None:
        exchange = begin(app, chat(stream=stream))
        if stream and script is endless:
            await exchange.until(lambda: len(exchange.messages) > 3)
        else:
            await exchange.until(lambda: len(engine.open) == 1)
            await asyncio.sleep(0.02)
            assert not exchange.messages
        exchange.disconnect()
        await exchange.until(lambda: not engine.open)
        assert exchange.task
        await asyncio.wait_for(exchange.task, BOUND)
        sent = len(exchange.messages)
        await asyncio.sleep(0.02)
        assert len(exchange.messages) == sent, "something was sent to nobody"
        assert len(asyncio.all_tasks()) == 1, "a task was left behind"

    run(leave())
    assert len(engine.freed) == 1
    assert engine.streams == {}


def test_a_stream_that_is_kept_alive_while_queued_notices_too() -> None:
    engine = FakeEngine(SILENT)
    app = make_app(engine, keepalive_seconds=0.01)

    async def leave() -> None:
        exchange = begin(app, chat(stream=True))
        await exchange.until(lambda: exchange.received.count(b": keep-alive") >= 2)
        exchange.disconnect()
        await exchange.until(lambda: not engine.open)
        assert exchange.task
        await asyncio.wait_for(exchange.task, BOUND)

    run(leave())


def test_gone_while_the_request_is_prepared() -> None:
    """Nobody listens any more when it is submitted: it must not run to its end."""
    engine = FakeEngine(SILENT)
    prepare = engine.prepare

    async def slow(request: Any) -> PreparedRequest:
        await asyncio.sleep(2 * BOUND)  # noticed while it goes on, not when it has ended
        return await prepare(request)

    engine.prepare = slow  # type: ignore[method-assign]
    app = make_app(engine)

    async def leave() -> None:
        exchange = begin(app, chat())
        await asyncio.sleep(0.01)
        exchange.disconnect()
        assert exchange.task
        await asyncio.wait_for(exchange.task, BOUND)

    run(leave())
    assert engine.open == {}


def test_gone_while_the_body_is_sent() -> None:
    engine = FakeEngine()
    app = make_app(engine)

    async def leave() -> None:
        exchange = begin(app, [b'{"model"', b""])
        exchange._pending.pop()  # the rest never comes
        exchange.disconnect()
        assert exchange.task
        await asyncio.wait_for(exchange.task, BOUND)
        assert exchange.messages == []

    run(leave())
    assert engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_stops_frees_the_place(stream: bool) -> None:
    """Cancellation is what the end of the process looks like from inside a request."""
    engine = FakeEngine(endless)
    app = make_app(engine)

    async def stop() -> None:
        exchange = begin(app, chat(stream=stream))
        await exchange.until(lambda: len(engine.open) == 1)
        assert exchange.task
        exchange.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(exchange.task, BOUND)
        assert engine.open == {}
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    run(stop())


def test_a_connection_that_breaks_on_send_frees_the_place(caplog: pytest.LogCaptureFixture) -> None:
    """Some servers raise from `send` where others report a disconnect."""
    engine = FakeEngine(endless)
    app = make_app(engine)

    async def broken() -> None:
        exchange = begin(app, chat(stream=True))

        async def fail(message: Any) -> None:
            if len(exchange.messages) > 3:
                raise OSError("connection lost")

        exchange.on_send = fail
        assert exchange.task
        await asyncio.wait_for(exchange.task, BOUND)
        assert engine.open == {}
        assert len(asyncio.all_tasks()) == 1

    run(broken())
    said = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert said == [], "a client that goes away is not a bug of the server"


@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_request_is_not_aborted(stream: bool) -> None:
    engine = FakeEngine(HELLO)

    async def stay() -> None:
        exchange = begin(make_app(engine), chat(stream=stream))
        await exchange.ended()
        exchange.disconnect()
        await asyncio.sleep(0.01)
        assert len(asyncio.all_tasks()) == 1

    run(stay())
    assert engine.freed == []


def test_one_that_leaves_does_not_disturb_the_others() -> None:
    engine = FakeEngine(HELLO)
    app = make_app(engine)

    async def crowd() -> None:
        engine.script = endless
        leaving = [begin(app, chat(stream=True)) for _ in range(5)]
        await leaving[0].until(lambda: len(engine.open) == 5)
        engine.script = HELLO
        staying = [begin(app, chat(stream=bool(i % 2))) for i in range(5)]
        for exchange in leaving:
            exchange.disconnect()
        assert {(await e.ended()).status for e in staying} == {200}
        await leaving[0].until(lambda: not engine.open)
        assert sorted(engine.freed) == sorted(set(engine.freed))
        assert len(engine.freed) == 5

    run(crowd())
