"""What a client pays that leaves, on a real engine: what was computed for it, the step under way included, no more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Exchange, begin
from ledger_for_tests import Clock
from stepping import Steps

from engine import AsyncEngine, Registry
from server.accounts.charging import Meter
from server.app import create_app
from server.ledger.records import Limits, NewKey
from server.ledger.store import Ledger

BALANCE = 10_000
BOUND = 60.0
CHUNK = 32  # tokens of a step of the fixture's engine


def at_the_door(engine: AsyncEngine) -> bool:
    """Whether the engine waits for a permit with something to compute, and so hears no command.

    A step may still be under way from before, without anything: it does not hold what is asked now.
    """
    return engine.is_stepping and engine.engine.has_work


class Shop:
    """An application with one key, and what it has paid."""

    def __init__(self, registry: Registry, folder: Path) -> None:
        self.ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}", Clock())
        self.meter = Meter(self.ledger, {}, Clock())
        self.app = create_app(registry, meter=self.meter)
        self.key: NewKey = self.ledger.create_key("ada", balance=BALANCE, limits=Limits())

    def ask(self, letter: str, length: int, **fields: Any) -> Exchange:
        body = {"model": "tiny", "messages": [{"role": "user", "content": letter * length}], "seed": 1, **fields}
        headers = [(b"authorization", f"Bearer {self.key.secret}".encode())]
        return begin(self.app, {"ignore_eos": True, **body}, headers=headers)

    def paid(self) -> tuple[int, list[tuple[int, int, int]]]:
        """What is gone from the balance, and sums of (prompt, cached, completion) if anything is recorded."""
        assert self.ledger.check() == []
        key = self.ledger.key("ada")
        assert (key.held, key.balance is not None) == (0, True)
        names = ("prompt_tokens", "cached_tokens", "completion_tokens")
        rows = self.ledger.usage()
        return BALANCE - (key.balance or 0), [(row[names[0]], row[names[1]], row[names[2]]) for row in rows]


@pytest.fixture
def shop(registry: Registry, engine: AsyncEngine, tmp_path: Path) -> Iterator[Shop]:
    made = Shop(registry, tmp_path)
    yield made
    made.meter.close()


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("taken", [1, 2])
def test_a_prompt_is_paid_as_far_as_it_was_computed(
    shop: Shop, engine: AsyncEngine, steps: Steps, taken: int, stream: bool, cancelled: bool
) -> None:
    """Whoever leaves before the first token, again and again, would else have the engine for nothing."""

    async def main() -> None:
        before = engine.stats().steps
        exchange = shop.ask("klmnopqr"[taken - 1 + 2 * stream + 4 * cancelled], 100, stream=stream)
        steps.grant(taken)
        await exchange.until(lambda: engine.stats().steps == before + taken, BOUND)
        await exchange.until(lambda: at_the_door(engine), BOUND)
        assert exchange.task
        if cancelled:
            exchange.task.cancel()
        else:
            exchange.disconnect()
        await asyncio.sleep(0.02)
        assert shop.ledger.key("ada").held > 0, "the step under way is not known yet"
        steps.grant(1)
        await exchange.until(lambda: shop.ledger.key("ada").held == 0, BOUND)
        await asyncio.gather(exchange.task, return_exceptions=True)

    asyncio.run(main())
    paid, [(prompt, cached, completion)] = shop.paid()
    assert (paid, prompt - cached, completion) == (prompt, (taken + 1) * CHUNK, 0)


def test_who_leaves_in_the_queue_pays_nothing(shop: Shop, engine: AsyncEngine, steps: Steps) -> None:
    async def main() -> None:
        first = shop.ask("s", 100)
        await first.until(lambda: engine.num_unfinished == 1, BOUND)
        await first.until(lambda: at_the_door(engine), BOUND)
        waiting = shop.ask("t", 50)
        await first.until(lambda: engine.num_unfinished == 2, BOUND)
        for one in (waiting, first):
            one.disconnect()
        await first.until(lambda: engine.num_leaving == 2, BOUND)
        steps.release()
        for one in (waiting, first):
            assert one.task
            await asyncio.wait_for(one.task, BOUND)

    asyncio.run(main())
    _, rows = shop.paid()
    assert [prompt - cached for prompt, cached, _ in rows] == [CHUNK], "the first, for the step that had begun"


def test_the_token_of_the_step_under_way_is_paid(shop: Shop, engine: AsyncEngine, steps: Steps) -> None:
    async def main() -> None:
        exchange = shop.ask("u", 3, stream=True)
        steps.grant(3)
        await exchange.until(lambda: steps.taken == 3 and at_the_door(engine), BOUND)
        exchange.disconnect()
        await asyncio.sleep(0.02)
        steps.grant(1)
        assert exchange.task
        await asyncio.wait_for(exchange.task, BOUND)

    asyncio.run(main())
    paid, [(prompt, _, completion)] = shop.paid()
    assert (paid, completion) == (prompt + completion, steps.taken - (prompt + CHUNK - 1) // CHUNK + 1)


def test_a_request_that_ends_while_its_client_leaves_is_paid_once(
    shop: Shop, engine: AsyncEngine, steps: Steps
) -> None:
    async def main() -> None:
        exchange = shop.ask("v", 3, max_tokens=1)
        await exchange.until(lambda: at_the_door(engine), BOUND)
        exchange.disconnect()
        await asyncio.sleep(0.02)
        steps.release()
        assert exchange.task
        await asyncio.wait_for(exchange.task, BOUND)

    asyncio.run(main())
    paid, rows = shop.paid()
    assert len(rows) == 1
    assert paid == rows[0][0] + rows[0][2]


def test_an_engine_that_dies_lets_go(shop: Shop, engine: AsyncEngine, steps: Steps) -> None:
    """Nobody waits for a step that will never end."""

    async def main() -> None:
        exchange = shop.ask("w", 100)
        await exchange.until(lambda: at_the_door(engine), BOUND)
        exchange.disconnect()
        await exchange.until(lambda: engine.num_leaving > 0, BOUND)
        engine._fail_all(RuntimeError("the engine died"))
        assert exchange.task
        await asyncio.wait_for(exchange.task, BOUND)
        steps.release()

    asyncio.run(main())
    assert shop.paid() == (0, [])


def test_the_context_of_a_key_bounds_prompt_and_reply(shop: Shop) -> None:
    """Together they are as long as the key allows, and a prompt that fills it is refused by the key's limit."""

    async def main() -> None:
        whole = await shop.ask("s", 5, max_tokens=1).ended(BOUND)
        prompt = whole.json["usage"]["prompt_tokens"]
        shop.ledger.limit("ada", Limits(context=prompt + 3))
        answer = await shop.ask("s", 5).ended(BOUND)
        assert answer.json["usage"]["total_tokens"] == prompt + 3
        assert answer.json["choices"][0]["finish_reason"] == "length"
        shop.ledger.limit("ada", Limits(context=prompt))
        refused = await shop.ask("s", 5).ended(BOUND)
        words = f"the prompt has {prompt} tokens; this caller's context holds {prompt}, one of them for the answer."
        assert (refused.status, refused.error["message"], refused.error["param"]) == (400, words, "messages")

    asyncio.run(main())


# -- several prompts of one request ----------------------------------------------------------------------------------


def plainly(shop: Shop, **fields: Any) -> Exchange:
    headers = [(b"authorization", f"Bearer {shop.key.secret}".encode())]
    body = {"model": "tiny", "max_tokens": 3, "seed": 1, **fields}
    return begin(shop.app, body, headers=headers, path="/v1/completions")


def test_several_prompts_are_paid_as_one(shop: Shop) -> None:
    async def main() -> Any:
        answer = await plainly(shop, prompt=["ab", "cde", "f"], n=2).ended(BOUND)
        assert answer.status == 200, answer.body
        return answer.json["usage"]

    usage = asyncio.run(main())
    paid, rows = shop.paid()
    assert len(rows) == 1
    assert (rows[0][0], rows[0][2]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert paid == usage["total_tokens"]


def test_several_prompts_are_held_together_or_not_at_all(shop: Shop) -> None:
    """Each would have been covered alone."""
    shop.ledger.credit("ada", 15 - BALANCE)

    async def main() -> None:
        for prompts, status in ((["ab"] * 4, 402), (["ab"] * 2, 200)):
            answer = await plainly(shop, prompt=prompts).ended(BOUND)
            assert answer.status == status, answer.body

    asyncio.run(main())
    assert shop.ledger.check() == []


def test_each_prompt_is_one_of_the_requests_that_run_at_once(shop: Shop, engine: AsyncEngine, steps: Steps) -> None:
    shop.ledger.limit("ada", Limits(concurrent=3))

    async def main() -> None:
        hopeless = await plainly(shop, prompt=["a"] * 4).ended(BOUND)
        assert (hopeless.status, hopeless.headers["x-should-retry"]) == (429, "false")
        first = plainly(shop, prompt=["a", "b"])
        await first.until(lambda: engine.num_unfinished == 2, BOUND)
        second = await plainly(shop, prompt=["c", "d"]).ended(BOUND)
        assert (second.status, second.error["code"]) == (429, "rate_limit_exceeded")
        assert "x-should-retry" not in second.headers
        third = plainly(shop, prompt=["c"])
        await first.until(lambda: engine.num_unfinished == 3, BOUND)
        steps.release()
        assert [(await one.ended(BOUND)).status for one in (first, third)] == [200, 200]

    asyncio.run(main())


def test_who_leaves_pays_what_was_computed_of_all_prompts(shop: Shop, engine: AsyncEngine, steps: Steps) -> None:
    async def main() -> None:
        before = engine.stats().steps
        exchange = plainly(shop, prompt=["x" * 60, "y" * 60], ignore_eos=True)
        await exchange.until(lambda: engine.num_unfinished == 2 and at_the_door(engine), BOUND)
        steps.grant(1)
        await exchange.until(lambda: engine.stats().steps == before + 1 and at_the_door(engine), BOUND)
        exchange.disconnect()
        await exchange.until(lambda: engine.num_leaving > 0, BOUND)
        steps.release()
        assert exchange.task
        await asyncio.wait_for(exchange.task, BOUND)

    asyncio.run(main())
    paid, [(prompt, cached, completion)] = shop.paid()
    assert paid == prompt + completion
    assert 0 < prompt - cached < 120
    assert engine.num_unfinished == 0
