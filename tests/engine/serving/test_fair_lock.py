"""As many at once as there are places, groups by turns, and nobody is forgotten, however waiters are given up."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engine.serving.waiting.fair_lock import FairLock


@asynccontextmanager
async def turn(turns: FairLock, group: str) -> AsyncIterator[None]:
    await turns.take(group)
    try:
        yield
    finally:
        turns.give_back(group)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_groups_take_turns_and_within_a_group_the_first_is_first() -> None:
    async def main() -> list[str]:
        turns, order = FairLock(), []

        async def work(name: str) -> None:
            async with turn(turns, name[0]):
                order.append(name)
                await asyncio.sleep(0)

        names = [f"a{i}" for i in range(5)] + ["b0", "b1", "c0"]
        await asyncio.gather(*(work(name) for name in names))
        return order

    assert asyncio.run(main()) == ["a0", "a1", "b0", "c0", "a2", "b1", "a3", "a4"]


def test_a_named_group_leaves_a_place_to_others() -> None:
    """Whatever one key sends, somebody else's request begins at once; those without a key may use all places."""

    async def main() -> None:
        turns = FairLock(3)
        mine = [asyncio.create_task(turns.take("a")) for _ in range(4)]
        await settle()
        assert [task.done() for task in mine] == [True, True, False, False]
        await asyncio.wait_for(turns.take("b"), 60)
        turns.give_back("b")
        await settle()
        assert not mine[2].done()
        turns.give_back("a")
        await settle()
        assert mine[2].done()
        nameless = FairLock(3)
        for _ in range(3):
            await asyncio.wait_for(nameless.take(""), 60)

    asyncio.run(main())


@pytest.mark.parametrize("places", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_random_walk(seed: int, places: int) -> None:
    """Work comes, ends and is given up at any point: never too much at once, and all that was not given up has run."""

    async def main() -> None:
        rng, turns = random.Random(seed), FairLock(places)
        inside: Counter[str] = Counter()
        done: set[int] = set()

        async def work(number: int) -> None:
            group = rng.choice(["a", "b", ""])
            async with turn(turns, group):
                inside[group] += 1
                assert inside.total() <= places
                assert not group or inside[group] <= max(1, places - 1)
                try:
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)
                    if rng.random() < 0.1:
                        raise ValueError
                finally:
                    inside[group] -= 1
                done.add(number)

        tasks: list[asyncio.Task[None]] = []
        for number in range(200):
            tasks.append(asyncio.create_task(work(number)))
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
            if rng.random() < 0.3:
                await settle()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        for number, result in enumerate(results):
            assert (result is None) == (number in done)
            assert result is None or isinstance(result, ValueError | asyncio.CancelledError), result
        assert turns._free == places
        assert not turns._held
        assert not turns._waiting

    asyncio.run(main())
