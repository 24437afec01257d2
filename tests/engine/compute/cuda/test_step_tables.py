"""The tables of a step: every key that a row sees is read once, in order, and no step outgrows the limits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings, strategies as st

from engine.compute.cuda.steps.tables import FEW, ITEM, MERGE, SPLIT, AttentionKind, KindTables, Limits, StepTables
from engine.scheduling.block_pool import BLOCK_SIZE

LENGTH = 3000
TILE_ROWS = (16, 64)


class Chunk(NamedTuple):
    row: int
    count: int
    start: int
    table: tuple[int, ...]


def pack(parts: Sequence[tuple[int, int]], tables: Sequence[tuple[int, ...]] | None = None) -> list[Chunk]:
    """Chunks of `(start, count)`, one sequence each, in this order."""
    chunks, row = [], 0
    for number, (start, count) in enumerate(parts):
        blocks = -(-(start + count) // BLOCK_SIZE)
        table = tables[number][:blocks] if tables else tuple(range(1000 * number, 1000 * number + blocks))
        chunks.append(Chunk(row, count, start, table))
        row += count
    return chunks


def lines(flat: Sequence[int], width: int) -> Iterator[Sequence[int]]:
    assert len(flat) % width == 0
    return (flat[at : at + width] for at in range(0, len(flat), width))


def first_key(position: int, kind: AttentionKind) -> int:
    """The first key that a token sees, from what a window and a chunk mean."""

    def sees(key: int) -> bool:
        near = kind.window is None or position - key < kind.window
        return near and (kind.chunk is None or position // kind.chunk == key // kind.chunk)

    return bisect_left(range(position + 1), True, key=sees)


def check(step: StepTables, chunks: Sequence[Chunk], kinds: Sequence[AttentionKind], limits: Limits) -> None:
    owners = [(chunk, chunk.start + index) for chunk in chunks for index in range(chunk.count)]
    stored = [chunk.table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for chunk, p in owners]
    assert list(step.slots) == stored
    assert len(step.blocks) <= limits.blocks
    assert (step.blocks.itemsize, step.slots.itemsize) == (4, 8)
    for kind, tables in zip(kinds, step.kinds, strict=True):
        check_kind(step, tables, owners, kind, limits)


def check_kind(
    step: StepTables, tables: KindTables, owners: Sequence[tuple[Chunk, int]], kind: AttentionKind, limits: Limits
) -> None:
    """Each row is written once, from its splits in ascending order: those that it sees, and others as no-ops."""
    narrow, wide, merges = tables.counts
    assert narrow <= limits.narrow(kind)
    assert wide <= limits.wide(kind)
    assert merges <= limits.merges(kind)
    assert tables.partials <= limits.partials(kind)
    written: dict[int, list[int]] = {}
    left: dict[int, tuple[int, int]] = {}  # row and split of each partial result
    for flat, most in ((tables.narrow, limits.tile_rows[0]), (tables.wide, limits.tile_rows[1])):
        for row, rows, position, offset, first, end, partial, zero in lines(flat, ITEM):
            chunk, start = owners[row]
            assert start == position
            assert row + rows <= chunk.row + chunk.count
            assert 1 <= rows <= max(most // kind.groups, 1)
            assert tuple(step.blocks[offset : offset + len(chunk.table)]) == chunk.table
            assert zero == 0
            if partial >= 0:
                assert (rows, end) == (1, first + 1)
                assert partial not in left, "partial results lie beside each other"
                left[partial] = row, first
                continue
            for index in range(row, row + rows):
                assert index not in written
                written[index] = list(range(first, end))
    for row, partial, count, zero in lines(tables.merges, MERGE):
        parts = [left.pop(at) for at in range(partial, partial + count)]
        assert {owner for owner, _ in parts} == {row}
        assert row not in written
        assert zero == 0
        written[row] = [split for _, split in parts]
    assert not left
    assert sorted(written) == list(range(len(owners)))
    assert tables.partials == sum(count for _, _, count, _ in lines(tables.merges, MERGE))
    for row, (_, position) in enumerate(owners):
        splits = written[row]
        assert splits == list(range(splits[0], splits[-1] + 1))
        assert splits[0] * SPLIT <= first_key(position, kind)
        assert (splits[-1] + 1) * SPLIT > position


sizes = st.integers(1, 1200) | st.sampled_from([SPLIT - 1, SPLIT, SPLIT + 1, SPLIT + 2, 2 * SPLIT + 1])
kinds_of = st.builds(
    AttentionKind,
    groups=st.integers(1, 16) | st.sampled_from([17, 48, 64]),
    window=st.none() | sizes,
    chunk=st.none() | sizes,
)
counts = st.just(1) | st.integers(2, FEW + 1) | st.integers(10, 300)
part = st.tuples(st.integers(0, LENGTH), counts).map(lambda pair: (min(pair[0], LENGTH - pair[1]), pair[1]))


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(part, min_size=1, max_size=6), kinds=st.lists(kinds_of, min_size=1, max_size=3), data=st.data())
def test_every_visible_key_is_read_once_and_in_order(
    parts: list[tuple[int, int]], kinds: list[AttentionKind], data: st.DataObject
) -> None:
    """Whatever is in the step: decodes, drafts, prompts; and however small the limits that still allow it."""
    limits = Limits(
        rows=sum(count for _, count in parts) + data.draw(st.sampled_from([0, 0, 7, 500])),
        sequences=len(parts) + data.draw(st.integers(0, 2)),
        length=max(start + count for start, count in parts) + data.draw(st.sampled_from([0, 0, 1, 5000])),
        tile_rows=data.draw(st.sampled_from([TILE_ROWS, (16, 128), (32, 64)])),
    )
    chunks = pack(parts)
    check(StepTables.of(chunks, kinds, limits), chunks, kinds, limits)


@settings(max_examples=30, deadline=None)
@given(kind=kinds_of, moves=st.lists(st.tuples(st.integers(0, 2), counts), min_size=1, max_size=40))
def test_growing_sequences_are_covered_at_every_step(kind: AttentionKind, moves: list[tuple[int, int]]) -> None:
    """One of three sequences computes a chunk while the others decode. Of a draft the first token alone is kept."""
    limits = Limits(rows=3 * 300, sequences=3, length=LENGTH, tile_rows=TILE_ROWS)
    tables = [tuple(range(n, 3000, 3)) for n in range(3)]
    lengths = [0, 0, 0]
    for number, count in moves:
        parts, taken = [], []
        for each in range(3):
            grows = count if each == number else 1
            if lengths[each] + grows <= LENGTH:
                parts.append((lengths[each], grows))
                taken.append(tables[each])
                lengths[each] += grows if grows > FEW else 1
        chunks = pack(parts, taken)
        check(StepTables.of(chunks, [kind], limits), chunks, [kind], limits)


def test_a_decode_is_split_and_a_prompt_is_not() -> None:
    kind, limits = AttentionKind(4), Limits(rows=64, sequences=4, length=4096, tile_rows=TILE_ROWS)
    decode, short, prompt, draft = 1000, 255, 500, 600
    step = StepTables.of(pack([(decode, 1), (short, 1), (prompt, 40), (draft, 3)]), [kind], limits)
    (tables,) = step.kinds
    splits = [4, 1] + [draft // SPLIT + 1] * 3
    assert tables.counts == (sum(splits), 3, 4)  # 40 rows of four heads: tiles of 16, 16 and 8 rows
    assert list(tables.wide[:ITEM]) == [2, 16, 500, 63 + 16, 0, 3, -1, 0]
    assert list(tables.narrow[: 2 * ITEM]) == [0, 1, 1000, 0, 0, 1, 0, 0, 0, 1, 1000, 0, 1, 2, 1, 0]
    assert list(tables.merges[:MERGE]) == [0, 0, 4, 0]


def test_a_draft_without_room_for_partial_results_is_not_split() -> None:
    """Decodes always are; the room of a draft is what they leave."""
    kind, length = AttentionKind(4), 1 << 17
    limits = Limits(rows=64, sequences=2, length=length, tile_rows=TILE_ROWS)
    assert limits.partials(kind) == 2 * length // SPLIT
    far, near = length - FEW, 4096 - FEW
    for parts, counts_ in (
        ([(far, FEW)], (0, 1, 0)),
        ([(near, FEW)], (FEW * 16, 0, FEW)),
        ([(far, FEW), (length - 1, 1)], (512, 1, 1)),
        ([(near, FEW), (length - 1, 1)], (FEW * 16 + 512, 0, FEW + 1)),
        ([(100 * SPLIT - FEW, FEW)] * 2, (FEW * 100, 1, FEW)),
    ):
        assert StepTables.of(pack(parts), [kind], limits).kinds[0].counts == counts_


def test_an_item_has_a_row_even_if_its_heads_are_more_than_a_tile_has_rows() -> None:
    limits = Limits(rows=64, sequences=2, length=4096, tile_rows=TILE_ROWS)
    (tables,) = StepTables.of(pack([(4000, 1), (17, 10)]), [AttentionKind(71)], limits).kinds
    assert tables.counts == (4000 // SPLIT + 1, 10, 1)


@pytest.mark.parametrize("parts", [[(0, 9)], [(0, 1), (0, 1), (0, 1)]])
def test_a_step_beyond_the_limits_is_a_fault(parts: list[tuple[int, int]]) -> None:
    with pytest.raises(AssertionError, match="no more"):
        StepTables.of(pack(parts), [], Limits(rows=8, sequences=2, length=64, tile_rows=TILE_ROWS))


def test_tables_need_no_torch() -> None:
    """They are made between two passes, and tried without a tensor."""
    import subprocess
    import sys

    code = "import sys, engine.compute.cuda.steps.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
