"""Blocks are never lost, never shared by accident, evicted in a known order; a cached prefix is exactly its tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.scheduling.block_pool import SHARED, BlockPool, Share


def _fill(pool: BlockPool, owner: str, *contents: tuple[int, ...], share: Share = SHARED) -> list[int]:
    table = pool.allocate(len(contents), owner)
    parent: int | Share = share
    for block, tokens in zip(table, contents, strict=True):
        parent = pool.register(block, parent, tokens)
    return table


def test_a_released_prefix_is_found_again_by_its_tokens() -> None:
    pool = BlockPool(8, 2)
    table = _fill(pool, "a", (1, 2), (3, 4), (5,))
    pool.release(table, "a")
    match = pool.match([1, 2, 3, 4, 5, 6], limit=5)
    assert (match.blocks, match.tail_block, match.tail_tokens) == (tuple(table[:2]), table[2], 1)
    assert pool.match([1, 2, 9, 9], limit=3).blocks == (table[0],)
    assert pool.match([2, 1], limit=1) == pool.match([9], limit=0)


def test_a_match_leaves_the_last_token_to_be_computed() -> None:
    pool = BlockPool(8, 2)
    pool.release(_fill(pool, "a", (1, 2), (3, 4)), "a")
    match = pool.match([1, 2, 3, 4], limit=3)
    assert len(match.blocks) == 1
    assert match.tail_tokens == 1  # the second block may only be copied, in part


def test_the_same_tokens_after_another_prefix_are_another_content() -> None:
    pool = BlockPool(8, 2)
    pool.release(_fill(pool, "a", (1, 1), (7, 7)), "a")
    pool.release(_fill(pool, "b", (2, 2), (8, 8)), "b")
    assert len(pool.match([2, 2, 7, 7, 0], limit=4).blocks) == 1


def test_each_share_finds_its_own_and_nothing_of_another() -> None:
    pool = BlockPool(8, 2)
    pool.release(_fill(pool, "a", (1, 2), (3,), share=("a",)), "a")
    for other in (SHARED, ("b",), ("a", "")):
        match = pool.match([1, 2, 3, 4], 3, other)
        assert (match.blocks, match.tail_block, match.tail_tokens) == ((), None, 0)
    assert len(pool.match([1, 2, 3, 4], 3, ("a",)).blocks) == 1
    assert pool.match([1, 2, 3, 4], 3, ("a",)).tail_tokens == 1


def test_blank_blocks_go_first_then_the_least_recently_used_and_of_one_prefix_the_deepest() -> None:
    pool = BlockPool(5, 1)
    old = _fill(pool, "old", (1,), (2,))
    young = _fill(pool, "young", (3,), (4,))
    pool.release(old, "old")
    pool.release(young, "young")
    blank = ({0, 1, 2, 3, 4} - {*old, *young}).pop()
    assert [pool.allocate(1, "x")[0] for _ in range(5)] == [blank, old[1], old[0], young[1], young[0]]


def test_use_makes_young_again() -> None:
    pool = BlockPool(2, 1)
    a, b = _fill(pool, "a", (1,)), _fill(pool, "b", (2,))
    pool.release(a, "a")
    pool.release(b, "b")
    pool.reuse(a[0])
    pool.release(a, "a")
    assert pool.allocate(1, "x") == b


def test_owners_grow_in_runs_of_their_own_while_there_is_room() -> None:
    """Attention reads consecutive blocks without a copy, so two growing sequences must not interleave."""
    pool = BlockPool(32, 1)
    one, two = pool.allocate(2, "one", expected=8), pool.allocate(2, "two", expected=8)
    for _ in range(6):
        one += pool.allocate(1, "one", after=one[-1])
        two += pool.allocate(1, "two", after=two[-1])
    assert one == list(range(one[0], one[0] + 8))
    assert two == list(range(two[0], two[0] + 8))


def test_an_owner_with_a_shared_prefix_grows_right_behind_it() -> None:
    pool = BlockPool(16, 1)
    gone, prefix = pool.allocate(4, "gone", expected=4), pool.allocate(2, "prefix", expected=2)
    rest = pool.allocate(10, "rest", expected=10)
    pool.release(gone, "gone")
    pool.release(rest[:-1], "rest")  # the last block stays taken
    assert pool.allocate(1, "one", after=prefix[-1], expected=4) == [6]
    assert pool.allocate(1, "two", expected=4) == [0], "there is room for all of it in front"
    assert pool.allocate(1, "three", expected=4) == [10], "what one may need is kept for it"
    assert pool.allocate(3, "one", after=6) == [7, 8, 9]
    pool.check()


def test_a_run_behind_a_prefix_ends_at_the_next_block_that_is_taken() -> None:
    pool = BlockPool(16, 1)
    prefix, gap, wall = (pool.allocate(n, name, expected=n) for n, name in ((2, "prefix"), (3, "gap"), (1, "wall")))
    pool.release(gap, "gap")
    assert pool.allocate(1, "one", after=prefix[-1], expected=9) == [2]
    assert pool.allocate(1, "two", expected=2) == [wall[0] + 1], (
        "blocks 3 and 4 are kept, and those behind the wall not"
    )
    pool.check()


def test_a_run_behind_a_prefix_ends_with_the_pool() -> None:
    pool = BlockPool(8, 1)
    gone, prefix = pool.allocate(5, "gone", expected=5), pool.allocate(2, "prefix", expected=2)
    pool.release(gone, "gone")
    assert pool.allocate(1, "one", after=prefix[-1], expected=9) == [7]
    assert pool.allocate(1, "two", expected=5) == [0], "nothing else is kept"
    pool.check()


def test_a_kept_run_is_given_away_when_nothing_else_is_left() -> None:
    pool = BlockPool(4, 1)
    pool.allocate(1, "one", expected=4)
    assert len(pool.allocate(3, "two")) == 3
    with pytest.raises(ValueError, match="1 blocks asked for, 0 free"):
        pool.allocate(1, "one")
    pool.check()


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(4, 1, caching=False)
    pool.release(_fill(pool, "a", (1,), (2,)), "a")
    assert pool.match([1, 2, 3], limit=2).blocks == ()
    assert pool.num_free == 4


@pytest.mark.parametrize(("blocks", "size"), [(0, 1), (1, 0), (-1, 4), (4, -1)])
def test_a_pool_without_room_for_a_token_is_refused(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"not {blocks} of {size}"):
        BlockPool(blocks, size)


def test_a_prefix_that_goes_on_after_a_hit_is_found_whole() -> None:
    pool = BlockPool(8, 2)
    pool.release(_fill(pool, "a", (1, 2), (3, 4)), "a")
    match = pool.match([1, 2, 3, 4, 5, 6, 7], limit=6)
    for block in match.blocks:
        pool.reuse(block)
    [more] = pool.allocate(1, "b", after=match.blocks[-1])
    pool.register(more, match.uids[-1], (5, 6))
    pool.release([*match.blocks, more], "b")
    assert pool.match([1, 2, 3, 4, 5, 6, 7], limit=6).blocks == (*match.blocks, more)


def test_a_block_that_is_registered_anew_has_only_its_new_content() -> None:
    pool = BlockPool(4, 2)
    [block] = _fill(pool, "a", (1,))
    pool.register(block, SHARED, (1, 2))
    pool.check()
    assert pool.match([1, 2, 3], limit=2).blocks == (block,)
    pool.release([block], "a")
    pool.check()
    assert pool.num_free == 4


def test_check_names_the_damage() -> None:
    """The random walks find nothing that `check` does not see."""

    def damaged(change: Callable[[BlockPool], object]) -> BlockPool:
        pool = BlockPool(6, 2)
        _fill(pool, "held", (1, 2))
        pool.release(_fill(pool, "cached", (3, 4)), "cached")
        pool.check()
        change(pool)
        return pool

    held, cached, blank = 0, 1, 5
    for change, told in [
        (lambda pool: pool._blank.update({held: None}), "a block is in two states"),
        (lambda pool: pool._cached.update({held: None}), "a block is in two states"),
        (lambda pool: pool._blank.update({cached: None}), "a block is in two states"),
        (lambda pool: pool._blank.pop(blank), "a block is lost"),
        (lambda pool: pool._references.__setitem__(held, 0), "a block is lost"),
        (lambda pool: pool._contents.pop(cached), "a cached block without content"),
        (lambda pool: pool._contents.update({blank: pool._contents[held]}), "a blank block with content"),
        (lambda pool: pool._kept.update({"x": range(2, 4), "y": range(3, 5)}), "a block is kept for two owners"),
        (lambda pool: pool._open.__setitem__(blank, 0), f"block {blank} is wrongly open"),
        (lambda pool: pool._index.clear(), ""),
        (lambda pool: pool._children.clear(), ""),
    ]:
        with pytest.raises(AssertionError, match=f"^{told}"):
            damaged(change).check()


class PoolMachine(RuleBasedStateMachine):
    """Random tables over a small alphabet, so that prefixes collide all the time; a model of what each block holds."""

    @initialize(blocks=st.integers(1, 12), size=st.integers(1, 3))
    def start(self, blocks: int, size: int) -> None:
        self.pool = BlockPool(blocks, size)
        self.tables: dict[int, list[int]] = {}
        self.texts: dict[int, list[int]] = {}
        self.uids: dict[int, list[int]] = {}
        self.truth: dict[int, tuple[int, ...]] = {}  # cached block -> all tokens up to its end
        self.owners: dict[int, Share] = {}  # cached block -> whose it is
        self.shares: dict[int, Share] = {}
        self.names = 0

    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=12), share=st.sampled_from([SHARED, ("a",), ("b",)]))
    def admit(self, text: list[int], share: Share) -> None:
        match = self.pool.match(text, len(text) - 1, share)
        assert all(self.owners[block] == share for block in match.blocks), "a hit in another share"
        assert match.tail_block is None or self.owners[match.tail_block] == share
        found = [t for block in match.blocks for t in self.truth[block][-self.pool.block_size :]]
        assert found == text[: len(found)], "a hit returned other tokens"
        if match.tail_block is not None:
            size = self.pool.block_size
            assert match.tail_tokens < size or len(text) - 1 - len(found) >= size
            assert self.truth[match.tail_block][: len(found) + match.tail_tokens] == tuple(
                text[: len(found) + match.tail_tokens]
            )
        revived = sum(self.pool.references(b) == 0 for b in match.blocks)
        needed = self.pool.blocks_for(len(text)) - len(match.blocks)
        if needed + revived > self.pool.num_free:
            return
        for block in match.blocks:
            self.pool.reuse(block)
        name, self.names = self.names, self.names + 1
        table = list(match.blocks)
        table += self.pool.allocate(needed, name, after=table[-1] if table else None, expected=needed + 2)
        uids = list(match.uids)
        self.shares[name] = share
        for number in range(len(uids), len(text) // self.pool.block_size):
            tokens = tuple(text[number * self.pool.block_size : (number + 1) * self.pool.block_size])
            uids.append(self.pool.register(table[number], uids[-1] if uids else share, tokens))
            self.owners[table[number]] = share
            self.truth[table[number]] = tuple(text[: (number + 1) * self.pool.block_size])
        self.tables[name], self.texts[name], self.uids[name] = table, text, uids
        whole = self.pool.match(text, len(text), share)
        assert whole.uids == tuple(uids), "what has just been registered is not found"

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), keep=st.booleans())
    def leave(self, data: st.DataObject, keep: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.tables)))
        table, text, uids = self.tables.pop(name), self.texts.pop(name), self.uids.pop(name)
        tail = len(text) % self.pool.block_size
        if keep and tail and self.pool.references(table[-1]) == 1:
            self.pool.register(table[-1], uids[-1] if uids else self.shares[name], tuple(text[-tail:]))
            self.owners[table[-1]] = self.shares[name]
            self.truth[table[-1]] = tuple(text)
        self.pool.release(table, name)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tables)))
        child, self.names = self.names, self.names + 1
        self.tables[child] = self.pool.fork(self.tables[name])
        self.texts[child], self.uids[child], self.shares[child] = self.texts[name], self.uids[name], self.shares[name]

    @rule()
    def clear(self) -> None:
        self.pool.clear_cache()

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        for block in range(self.pool.num_blocks):
            held = sum(table.count(block) for table in self.tables.values())
            assert self.pool.references(block) == held


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
