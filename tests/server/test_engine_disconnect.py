"""A client that goes away frees its place in a real engine within one step, wherever its request stands.

The engine is held before every step, so that "one" is counted and not timed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from asgi import Exchange, begin
from stepping import Steps

from engine import AsyncEngine, Registry
from server.app import create_app

LONG = 100  # tokens of prompt: four chunks of the fixture's 32
BOUND = 60.0


def chat(letter: str = "a", length: int = 1, **fields: Any) -> dict[str, Any]:
    """A request that would run to the end of the context. `letter`: no other prompt begins like this one."""
    messages = [{"role": "user", "content": letter * length}]
    return {"model": "tiny", "messages": messages, "seed": 1, "ignore_eos": True, **fields}


async def go_away(exchange: Exchange) -> None:
    exchange.disconnect()


async def be_cancelled(exchange: Exchange) -> None:
    """What the end of the process looks like from inside a request."""
    assert exchange.task
    exchange.task.cancel()


def assert_unanswered(exchange: Exchange, leave: Leave) -> None:
    """A client that left is sent nothing. Where the server ends, the client is still there and told so, in JSON."""
    if leave is go_away:
        assert exchange.messages == []
    else:
        start, body = exchange.messages
        assert start["status"] == 503
        assert json.loads(body["body"])["error"]["code"] == "unavailable"


async def break_on_send(exchange: Exchange) -> None:
    async def broken(message: Any) -> None:
        raise OSError("connection lost")

    exchange.on_send = broken


async def over(*exchanges: Exchange) -> None:
    """The server has let go of these requests."""
    for exchange in exchanges:
        assert exchange.task
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(exchange.task, BOUND)
    assert len(asyncio.all_tasks()) == 1, "a task was left behind"


Leave = Callable[[Exchange], Any]


@pytest.mark.parametrize("leave", [go_away, be_cancelled])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_while_it_is_answered(
    registry: Registry, engine: AsyncEngine, steps: Steps, stream: bool, n: int, leave: Leave
) -> None:
    async def main() -> None:
        exchange = begin(create_app(registry), chat(n=n, stream=stream))
        before = engine.stats().generated_tokens
        steps.grant(3)
        await exchange.until(lambda: engine.stats().generated_tokens >= before + 2 * n, BOUND)
        if stream:
            await exchange.until(lambda: len(exchange.messages) > 1, BOUND)
        await exchange.until(lambda: steps.taken == 3, BOUND)
        assert engine.stats().running == n
        await leave(exchange)
        await over(exchange)
        steps.grant(1)
        await exchange.until(lambda: engine.stats().running == 0, BOUND)
        assert steps.taken <= 4
        assert engine.stats().blocks_free == engine.stats().blocks_total

    asyncio.run(main())


def test_when_sending_fails(registry: Registry, engine: AsyncEngine, steps: Steps) -> None:
    async def main() -> None:
        exchange = begin(create_app(registry), chat(stream=True))
        steps.grant(2)
        await exchange.until(lambda: len(exchange.messages) > 1 and steps.taken == 2, BOUND)
        await break_on_send(exchange)
        steps.grant(1)  # its token is what cannot be sent
        await over(exchange)
        steps.grant(1)
        await exchange.until(lambda: engine.stats().running == 0, BOUND)
        assert steps.taken <= 4

    asyncio.run(main())


@pytest.mark.parametrize("leave", [go_away, be_cancelled])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_in_the_middle_of_its_prompt(
    registry: Registry, engine: AsyncEngine, steps: Steps, stream: bool, leave: Leave
) -> None:
    async def main() -> None:
        before = engine.stats()
        exchange = begin(create_app(registry), chat("bcde"[2 * stream + (leave is go_away)], LONG, stream=stream))
        steps.grant(2)
        await exchange.until(lambda: engine.stats().steps == before.steps + 2, BOUND)
        assert engine.stats().prompt_tokens == before.prompt_tokens, "the prompt was computed already"
        assert engine.stats().blocks_free < engine.stats().blocks_total
        await leave(exchange)
        await over(exchange)
        steps.grant(1)
        await exchange.until(lambda: engine.stats().running == 0, BOUND)
        assert steps.taken <= 3
        assert engine.stats().generated_tokens == before.generated_tokens
        assert_unanswered(exchange, leave)

    asyncio.run(main())


@pytest.mark.parametrize("leave", [go_away, be_cancelled])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_while_it_waits_for_a_place(
    registry: Registry, engine: AsyncEngine, steps: Steps, stream: bool, leave: Leave
) -> None:
    async def main() -> None:
        app = create_app(registry)
        running = [begin(app, chat(stream=True)) for _ in range(4)]

        async def one_step() -> None:
            done = engine.stats().steps
            steps.grant(1)
            await running[0].until(lambda: engine.stats().steps > done, BOUND)

        while engine.stats().running < 4:
            await one_step()
        waiting = begin(app, chat(stream=stream))
        await waiting.until(lambda: engine.num_unfinished == 5, BOUND)
        await one_step()
        await waiting.until(lambda: engine.stats().waiting == 1, BOUND)
        taken = steps.taken
        await leave(waiting)
        assert waiting.task
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(waiting.task, BOUND)
        steps.grant(1)
        await waiting.until(lambda: engine.stats().waiting == 0, BOUND)
        assert steps.taken <= taken + 1
        assert engine.stats().running == 4, "the others go on"
        assert_unanswered(waiting, leave)
        for exchange in running:
            exchange.disconnect()
        await over(*running)
        steps.grant(1)
        await waiting.until(lambda: engine.stats().running == 0, BOUND)

    asyncio.run(main())


def test_one_place_that_is_freed_is_the_next_ones(registry: Registry, engine: AsyncEngine, steps: Steps) -> None:
    """A server whose every place is taken serves again as soon as one client gives up."""

    async def main() -> None:
        app = create_app(registry)
        crowd = [begin(app, chat(stream=bool(i % 2))) for i in range(8)]
        await crowd[0].until(lambda: engine.num_unfinished == 8, BOUND)
        for stream in (False, True):
            refused = await begin(app, chat(stream=stream)).ended(BOUND)
            assert (refused.status, refused.error["code"], refused.error["limit"]) == (503, "queue_full", 8)
            assert refused.headers["retry-after"] == "5"
            assert "x-should-retry" not in refused.headers, "trying again does help"
        crowd[0].disconnect()
        assert crowd[0].task
        await asyncio.wait_for(crowd[0].task, BOUND)
        steps.release()
        assert (await begin(app, chat(max_tokens=2)).ended(BOUND)).status == 200
        for exchange in crowd:
            exchange.disconnect()
        await over(*crowd)

    asyncio.run(main())


def test_a_coming_and_going_leaves_nothing_behind(registry: Registry, engine: AsyncEngine) -> None:
    """Clients that leave at random moments: those that stay get what they get alone, and every block comes back."""
    chance = random.Random(3)

    async def main() -> None:
        app = create_app(registry)
        alone = (await begin(app, chat(max_tokens=12, n=2)).ended(BOUND)).json["choices"]
        for _ in range(12):
            stays = [begin(app, chat(max_tokens=12, n=2)) for _ in range(2)]
            leaves = [
                begin(app, chat("ghij"[i], chance.randrange(1, LONG), n=chance.randint(1, 4), stream=bool(i % 2)))
                for i in range(4)
            ]
            for exchange in leaves:
                await asyncio.sleep(chance.random() * 0.01)
                await chance.choice([go_away, be_cancelled, break_on_send])(exchange)
            for exchange in stays:
                assert (await exchange.ended(BOUND)).json["choices"] == alone
            for exchange in leaves:
                exchange.disconnect()
            await over(*leaves, *stays)
        await stays[0].until(lambda: engine.stats().running == engine.stats().waiting == 0, BOUND)
        assert engine.engine._requests == {}
        assert engine.num_unfinished == 0

    asyncio.run(main())
