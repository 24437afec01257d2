"""One at a time, groups by turns, and nobody is forgotten, however waiters are given up."""

from __future__ import annotations

import asyncio
import random

import pytest

from engine.turns import Turns


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_groups_take_turns_and_within_a_group_the_first_is_first() -> None:
    async def main() -> list[str]:
        turns, order = Turns(), []

        async def work(name: str) -> None:
            async with turns.turn(name[0]):
                order.append(name)
                await asyncio.sleep(0)

        names = [f"a{i}" for i in range(5)] + ["b0", "b1", "c0"]
        await asyncio.gather(*(work(name) for name in names))
        return order

    assert asyncio.run(main()) == ["a0", "a1", "b0", "c0", "a2", "b1", "a3", "a4"]


@pytest.mark.parametrize("seed", range(20))
def test_random_walk(seed: int) -> None:
    """Work comes, ends and is given up at any point: never two at once, and all that was not given up has run."""

    async def main() -> None:
        rng, turns = random.Random(seed), Turns()
        inside = 0
        done: set[int] = set()

        async def work(number: int) -> None:
            nonlocal inside
            async with turns.turn(rng.choice("abc")):
                inside += 1
                assert inside == 1
                try:
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)
                    if rng.random() < 0.1:
                        raise ValueError
                finally:
                    inside -= 1
                done.add(number)

        tasks: list[asyncio.Task[None]] = []
        for number in range(200):
            tasks.append(asyncio.create_task(work(number)))
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
            if rng.random() < 0.3:
                await settle()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        for number, result in enumerate(results):
            assert (result is None) == (number in done)
        assert not turns._held
        assert not turns._waiting

    asyncio.run(main())
