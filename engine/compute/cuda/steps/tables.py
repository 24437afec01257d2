"""Lists what a step's attention has to do, in tables of integers that kernels read. Pure; knows no tensor or device.

    chunks ──► blocks of all sequences, one list behind the other; slots of all rows
       └─────► for each kind of layer:  narrow items ─┬─► rows of the result
                                        wide items ───┤
                                        partials ──► merges

Keys are read in tiles of `TILE` and summed in splits of `SPLIT`, both counted from position 0. A row's bits are those
of its splits, merged in ascending order, and so depend on nothing but its position, whichever items it is computed by.
A work item is some rows of one chunk over a range of splits. It merges its splits itself and writes the result, or it
has one split and leaves a partial result, and a merge writes the row.

Columns of an item (`ITEM` of them): the first row, how many rows, the first row's position, where the sequence's
blocks begin in `blocks`, the first split, the split behind the last, where the partial result goes (-1: the item
writes the result), 0. Columns of a merge (`MERGE`): the row, the first partial result, how many there are, 0.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from engine.scheduling.block_pool import BLOCK_SIZE
from engine.scheduling.drafts import MOST

__all__ = ["ITEM", "MERGE", "SPLIT", "TILE", "AttentionKind", "KindTables", "Limits", "PlannedChunk", "StepTables"]

TILE: Final = 64
"""Keys of a tile."""
SPLIT: Final = 256
"""Keys of a split."""
ITEM: Final = 8
"""Columns of a work item."""
MERGE: Final = 4
"""Columns of a merge."""
FEW: Final = MOST + 1
"""Rows of a chunk whose rows are items of their own: a decode, or a draft and the token before it.

So many rows are too few items to fill a GPU if each of them reads its keys in one piece.
"""
ROOMY: Final = 16
"""Splits of each of `FEW` rows for which every sequence has room, so that drafts over 4,096 keys are always split."""


class PlannedChunk(Protocol):
    """A chunk of a step, such as `engine.compute.backend.PackedChunk`."""

    @property
    def row(self) -> int:
        """The first row."""

    @property
    def count(self) -> int:
        """How many rows."""

    @property
    def start(self) -> int:
        """The first row's position."""

    @property
    def table(self) -> tuple[int, ...]:
        """Blocks of tokens `0 … start + count - 1`."""


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """What the items of a layer depend on.

    Attributes:
        groups: query heads that share a key head.
        window, chunk: which keys a token sees, as in `engine.compute.attention_mask.KeyRange`.
    """

    groups: int
    window: int | None = None
    chunk: int | None = None

    def first_split(self, position: int) -> int:
        """Return the first split of which the token at `position` sees a key."""
        first = 0 if self.window is None else max(position - self.window + 1, 0)
        if self.chunk is not None:
            first = max(first, position - position % self.chunk)
        return first // SPLIT

    def most_splits(self, length: int) -> int:
        """Return how many splits a token of a sequence of `length` tokens sees keys of, at most."""
        most = -(-length // SPLIT)
        for size in (self.window, self.chunk):
            if size is not None:
                most = min(most, (size + SPLIT - 2) // SPLIT + 1)
        return most


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a step may be, and from that how large its tables are.

    Attributes:
        rows: of a step; sequences: chunks of a step; length: tokens of a sequence.
        tile_rows: rows of a narrow and of a wide item, `groups` of them for each row of the step. An item has one
            row of the step at least: where its heads are more than a tile's rows, the kernel computes them in parts.
    """

    rows: int
    sequences: int
    length: int
    tile_rows: tuple[int, int]

    @property
    def blocks(self) -> int:
        return self.sequences * -(-self.length // BLOCK_SIZE)

    def partials(self, kind: AttentionKind) -> int:
        """Return how many partial results a step has at most: enough to split one row of every sequence."""
        splits = kind.most_splits(self.length)
        if splits == 1:
            return 0
        share = max(splits, FEW * min(splits, ROOMY))
        return min(min(self.sequences, self.rows) * share, self.rows * splits)

    def narrow(self, kind: AttentionKind) -> int:
        return self._narrow_rows + self.partials(kind)

    def merges(self, kind: AttentionKind) -> int:
        return min(self._narrow_rows, self.partials(kind) // 2)

    def wide(self, kind: AttentionKind) -> int:
        chunks = min(self.sequences, self.rows)
        return chunks + (self.rows - chunks) // self.wide_rows(kind)

    def wide_rows(self, kind: AttentionKind) -> int:
        """Return how many rows of the step a wide item has at most."""
        return max(self.tile_rows[1] // kind.groups, 1)

    @property
    def _narrow_rows(self) -> int:
        return min(self.rows, self.sequences * FEW)


@dataclass(frozen=True, slots=True)
class KindTables:
    """The tables of one kind of layer, flat, int32.

    Attributes:
        narrow, wide: work items, `ITEM` numbers each; merges: `MERGE` numbers each.
        partials: how many partial results there are.
    """

    narrow: array[int]
    wide: array[int]
    merges: array[int]
    partials: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many narrow items, wide items and merges there are."""
        return len(self.narrow) // ITEM, len(self.wide) // ITEM, len(self.merges) // MERGE


@dataclass(frozen=True, slots=True)
class StepTables:
    """A step's tables.

    Attributes:
        kinds: in the order of the kinds that were asked for.
        blocks: int32, the block tables of all chunks, one behind the other.
        slots: int64, for each row, where its key and value are stored.
    """

    kinds: tuple[KindTables, ...]
    blocks: array[int]
    slots: array[int]

    @classmethod
    def of(cls, chunks: Sequence[PlannedChunk], kinds: Sequence[AttentionKind], limits: Limits) -> StepTables:
        """Plan a step within the limits. The chunks' rows follow each other from row 0 on."""
        blocks: list[int] = []
        slots: list[int] = []
        offsets: list[int] = []
        for chunk in chunks:
            assert chunk.row == len(slots), "rows follow each other"
            offsets.append(len(blocks))
            blocks += chunk.table[: -(-(chunk.start + chunk.count) // BLOCK_SIZE)]
            _append_slots(slots, chunk)
        assert len(chunks) <= limits.sequences, "a step has no more chunks than sequences"
        assert len(slots) <= limits.rows, "a step has no more rows"
        tables = tuple(_plan(chunks, offsets, kind, limits) for kind in kinds)
        packed = struct.pack(f"{len(blocks)}i", *blocks)  # thousands of numbers: half the time of array("i", blocks)
        return cls(tables, array("i", packed), array("q", slots))


def _append_slots(slots: list[int], chunk: PlannedChunk) -> None:
    """Append where each row of a chunk is stored, a block's rows at a time."""
    position, end = chunk.start, chunk.start + chunk.count
    while position < end:
        block, inside = divmod(position, BLOCK_SIZE)
        first = chunk.table[block] * BLOCK_SIZE
        count = min(BLOCK_SIZE - inside, end - position)
        slots += range(first + inside, first + inside + count)
        position += count


def _plan(chunks: Sequence[PlannedChunk], offsets: Sequence[int], kind: AttentionKind, limits: Limits) -> KindTables:
    """List the items and merges of one kind of layer.

    A chunk of up to `FEW` rows is computed row by row and split by split, unless a draft finds no more room for its
    partial results. A wide item reads its keys in one piece: slower where little else runs, and the same bits.
    """
    narrow, wide, merges, used = array("i"), array("i"), array("i"), 0
    needs = [_partials(chunk, kind) if chunk.count <= FEW else 0 for chunk in chunks]
    decodes = sum(need for chunk, need in zip(chunks, needs, strict=True) if chunk.count == 1)
    room = limits.partials(kind) - decodes  # for drafts
    assert room >= 0, "there is room for the splits of every decode"
    for chunk, offset, need in zip(chunks, offsets, needs, strict=True):
        if chunk.count > FEW or (chunk.count > 1 and need > room):
            _append_wide(wide, chunk, offset, kind, limits.wide_rows(kind))
            continue
        for index in range(chunk.count):
            used += _append_row(narrow, merges, chunk.row + index, chunk.start + index, offset, kind, used)
        if chunk.count > 1:
            room -= need
    return KindTables(narrow, wide, merges, used)


def _partials(chunk: PlannedChunk, kind: AttentionKind) -> int:
    """Return how many partial results a chunk has if it is computed row by row."""
    total = 0
    for position in range(chunk.start, chunk.start + chunk.count):
        splits = position // SPLIT + 1 - kind.first_split(position)
        total += splits if splits > 1 else 0
    return total


def _append_row(
    items: array[int], merges: array[int], row: int, position: int, offset: int, kind: AttentionKind, partial: int
) -> int:
    """Append the items of one row, and a merge of several. Returns how many partial results they leave."""
    first, end = kind.first_split(position), position // SPLIT + 1
    splits = end - first
    if splits == 1:
        items.extend((row, 1, position, offset, first, end, -1, 0))
        return 0
    merges.extend((row, partial, splits, 0))
    rows = array("i", (row, 1, position, offset, 0, 0, 0, 0)) * splits
    rows[4::ITEM] = array("i", range(first, end))
    rows[5::ITEM] = array("i", range(first + 1, end + 1))
    rows[6::ITEM] = array("i", range(partial, partial + splits))
    items.extend(rows)
    return splits


def _append_wide(items: array[int], chunk: PlannedChunk, offset: int, kind: AttentionKind, most: int) -> None:
    """Append the items of a chunk that computes `most` rows an item, each over all splits that a row of it sees."""
    for index in range(0, chunk.count, most):
        rows, position = min(most, chunk.count - index), chunk.start + index
        end = (position + rows - 1) // SPLIT + 1
        items.extend((chunk.row + index, rows, position, offset, kind.first_split(position), end, -1, 0))
