"""Tracks the cache's blocks: who holds each, what it contains, which is taken next. Knows no tensor and no request.

    block ──┬── held    reference count > 0: in the table of one or more sequences
            ├── cached  count 0, content known: a request with the same tokens reuses it; oldest taken first
            └── blank   count 0, content meaningless

A cached content is addressed by its token ids and by what it follows: the uid of the content before it, or, for a first
block, the share of the cache that it belongs to. So a request finds what its own share holds and nothing else: neither
`cached_tokens` nor the time to the first token tells one key anything of another key's prompts. Uids are never reused,
and tokens are compared themselves, so no hash collision can hand out somebody else's keys. A content may be shorter
than a block: the tail that a finished sequence leaves behind. A tail is never shared, only copied.

Attention reads a sequence's keys without a copy if its blocks are consecutive. So an owner starts where a run of blank
blocks is long enough for all that it expects to need, and that run is kept for it as long as others find blocks
elsewhere. When blocks are short, a kept run is given away.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

BLOCK_SIZE = 16
"""Tokens in a block of every cache that is computed with; kernels are compiled for it."""

Share = tuple[str, ...]
"""A share of the prefix cache. Requests find only prompts of their own share."""
SHARED: Share = ()
"""The share of requests that name none."""


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix of some tokens.

    Attributes:
        blocks: full blocks, to be shared by reference.
        uids: their contents.
        tail_block: a block to copy from; None if there is none.
        tail_tokens: how many further tokens stand at the beginning of `tail_block`.
    """

    blocks: tuple[int, ...]
    uids: tuple[int, ...]
    tail_block: int | None
    tail_tokens: int


@dataclass(frozen=True, slots=True)
class _Content:
    uid: int
    parent: int | Share
    tokens: tuple[int, ...]


class BlockPool:
    """Hands out `num_blocks` blocks of `block_size` tokens each.

    Ownership: a sequence's table holds one reference to each of its blocks, taken by `allocate`, `reuse` or `fork`
    and given back by `release`, on every way out.
    """

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self._references = [0] * num_blocks
        self._blank: dict[int, None] = dict.fromkeys(range(num_blocks))
        self._cached: dict[int, None] = {}  # oldest first
        self._contents: dict[int, _Content] = {}
        self._index: dict[tuple[int | Share, tuple[int, ...]], int] = {}
        self._children: dict[int | Share, dict[int, None]] = {}  # parent -> blocks
        self._last_uid = 0
        self._open = bytearray(b"\1" * num_blocks)  # 1: blank and in no kept run; searched with bytes.find
        self._kept: dict[Hashable, range] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._blank) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def references(self, block: int) -> int:
        return self._references[block]

    # -- taking blocks ------------------------------------------------------------------------------------------

    def allocate(self, count: int, owner: Hashable, *, after: int | None = None, expected: int = 0) -> list[int]:
        """Take `count` blocks for `owner`, consecutive and following `after` where possible.

        Blank blocks go first, then the cached ones, least recently used first.

        Args:
            after: the last block that the owner holds; None if it holds none yet.
            expected: blocks the owner may need in all from here on, this call's included.

        Raises:
            ValueError: fewer than `count` are free; nothing has been taken.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} free")
        if count and owner not in self._kept:
            self._keep_run(owner, max(count, expected), after)
        taken: list[int] = []
        for _ in range(count):
            after = self._pick(owner, after)
            self._take(after)
            taken.append(after)
        return taken

    def reuse(self, block: int) -> None:
        """Take one more reference to a block that is held or cached, for a sequence that reads its content."""
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def fork(self, table: Sequence[int]) -> list[int]:
        """Make a second table over the same blocks. Whoever writes into a block with two references copies it first."""
        for block in table:
            self._references[block] += 1
        return list(table)

    def release(self, table: Sequence[int], owner: Hashable) -> None:
        """Give back one reference to each block. Of those that become free, the last in the table is evicted first."""
        for block in reversed(table):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was released more often than taken"
            if self._references[block] == 0:
                if block in self._contents:
                    self._cached[block] = None
                else:
                    self._make_blank(block)
        for block in self._kept.pop(owner, ()):
            self._open[block] = block in self._blank

    # -- contents -----------------------------------------------------------------------------------------------

    def register(self, block: int, parent: int | Share, tokens: tuple[int, ...]) -> int:
        """Note what a block holds, so that `match` finds it. Returns the uid of that content.

        If another block holds the same already, `match` goes on finding that one, and its uid is returned.

        Args:
            parent: the uid of the content before it; for a first block, its share of the cache.
        """
        key = (parent, tokens)
        known = self._index.get(key)
        if known is not None:
            return self._contents[known].uid
        self._last_uid += 1
        if not self.caching:
            return self._last_uid
        self._forget(block)
        self._contents[block] = _Content(self._last_uid, parent, tokens)
        self._index[key] = block
        self._children.setdefault(parent, {})[block] = None
        return self._last_uid

    def match(self, tokens: Sequence[int], limit: int, share: Share = SHARED) -> Match:
        """Find the longest prefix of `tokens` in a share of the cache, at most `limit` tokens. Takes no block."""
        size = self.block_size
        parent: int | Share = share
        blocks: list[int] = []
        uids: list[int] = []
        limit = min(limit, len(tokens))
        for start in range(0, limit - size + 1, size):
            block = self._index.get((parent, tuple(tokens[start : start + size])))
            if block is None:
                break
            parent = self._contents[block].uid
            blocks.append(block)
            uids.append(parent)
        start = len(blocks) * size
        wanted = tuple(tokens[start : min(limit, start + size)])
        tail, best = None, 0
        for block in self._children.get(parent, ()) if wanted else ():
            common = _common_prefix(self._contents[block].tokens, wanted)
            if common > best:
                tail, best = block, common
        return Match(tuple(blocks), tuple(uids), tail, best)

    def clear_cache(self) -> None:
        """Forget the contents of all blocks that no sequence holds."""
        for block in list(self._cached):
            del self._cached[block]
            self._forget(block)
            self._make_blank(block)

    # -- inside -------------------------------------------------------------------------------------------------

    def _keep_run(self, owner: Hashable, length: int, after: int | None) -> None:
        """Keep a run of open blocks for an owner: right behind `after` if possible, else the first long enough one,
        else a shorter one."""
        if after is not None and after + 1 < self.num_blocks and self._open[after + 1]:
            start = after + 1
            length = min(length, self.num_blocks - start)
            end = self._open.find(0, start, start + length)
            run = range(start, start + length if end < 0 else end)
        else:
            length = min(length, self.num_blocks)
            while length and (start := self._open.find(b"\1" * length)) < 0:
                length //= 2
            run = range(start, start + length) if length else range(0)
        for block in run:
            self._open[block] = 0
        self._kept[owner] = run

    def _pick(self, owner: Hashable, after: int | None) -> int:
        run = self._kept[owner]
        if after is not None and after + 1 in self._blank and (after + 1 in run or self._open[after + 1]):
            return after + 1
        if after not in run and len(run) and run.start in self._blank:
            return run.start
        block = self._open.find(1)
        if block >= 0:
            return block
        if self._cached:
            return next(iter(self._cached))
        return next(reversed(self._blank))  # from another owner's kept run: nothing else is left

    def _take(self, block: int) -> None:
        if block in self._cached:
            del self._cached[block]
            self._forget(block)
        else:
            del self._blank[block]
        self._open[block] = 0
        self._references[block] = 1

    def _make_blank(self, block: int) -> None:
        self._blank[block] = None
        self._open[block] = not any(block in run for run in self._kept.values())

    def _forget(self, block: int) -> None:
        content = self._contents.pop(block, None)
        if content is None:
            return
        del self._index[content.parent, content.tokens]
        siblings = self._children[content.parent]
        del siblings[block]
        if not siblings:
            del self._children[content.parent]

    def check(self) -> None:
        """Assert every invariant. Tests call it after each step of their random walks."""
        held = {b for b, n in enumerate(self._references) if n > 0}
        blank, cached = set(self._blank), set(self._cached)
        assert not (held & blank) | (held & cached) | (blank & cached), "a block is in two states"
        assert len(held) + len(blank) + len(cached) == self.num_blocks, "a block is lost"
        assert all(n >= 0 for n in self._references)
        assert cached <= set(self._contents), "a cached block without content"
        assert not blank & set(self._contents), "a blank block with content"
        assert {(c.parent, c.tokens): b for b, c in self._contents.items()} == self._index
        children = {(c.parent, b) for b, c in self._contents.items()}
        assert children == {(p, b) for p, bs in self._children.items() for b in bs}
        kept = [b for run in self._kept.values() for b in run]
        assert len(kept) == len(set(kept)), "a block is kept for two owners"
        for block in range(self.num_blocks):
            assert self._open[block] == (block in blank and block not in kept), f"block {block} is wrongly open"


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
