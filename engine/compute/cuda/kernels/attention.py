"""Attention over the block cache, whose rows know nothing of each other. Knows tables of work, no sequence and no step.

    work items ──► attend_items ──► result, or a partial result per split ──► merge_partials ──► result

A row's sums have one order, whatever else is computed with it. Its keys come in tiles of `TILE` and splits of `SPLIT`,
both counted from position 0. Within a split: online softmax, tile after tile. The splits are merged in the order of
their positions, by `attend_items` itself where one item has them all, else by `merge_partials`: the same formula at the
same borders. Two things make that exact:

* The sum of the weights is a product with a matrix of ones. A reduction would depend on how threads lie over the tile.
* A tile or split of which a row sees nothing changes no bit of it: its weights are 0 and the factor of what was summed
  before is 1. So a row may be in a tile with rows that see more, or less. This needs a cache of finite numbers.

Products are exact to the dtype (`ieee`: float32 is not cut to TF32), and nothing is contracted to fused multiply-adds,
which the compiler might do in one variant and not in another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.compute.attention_mask import ALL_BEFORE
from engine.compute.backend import AttentionSettings
from engine.compute.cuda.operations import AttentionWork, Partials
from engine.compute.cuda.steps.tables import ITEM, MERGE, SPLIT, TILE
from engine.compute.kv_cache import LayerShape
from engine.scheduling.block_pool import BLOCK_SIZE

NARROW, WIDE = 16, 64
"""Rows of a work item at most, query heads that share a key head counted as rows; at least one position."""
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _merge(peak, total, sums, split_peak, split_total, split_sums):
    """Add a split to what was summed before. Peaks are logarithms to base 2, `-inf` before the first key."""
    top = tl.maximum(peak, split_peak)
    base = tl.where(top == float("-inf"), 0.0, top)
    old, new = tl.exp2(peak - base), tl.exp2(split_peak - base)
    return top, total * old + split_total * new, sums * old[:, None] + split_sums * new[:, None]


@triton.jit
def _attend_split(
    query,
    positions,
    firsts,
    keys,
    values,
    blocks,
    first_tile,
    end_tile,
    last,
    scale,
    softcap,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attend over the tiles of one split: peak, total of the weights and weighted sum of the values, per row."""
    in_key, in_value, in_tile = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD), tl.arange(0, TILE)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, 16), tl.float32)
    sums = tl.zeros((ROWS, VALUE_PAD), tl.float32)
    ones = tl.full((TILE, 16), 1.0, tl.float32).to(values.dtype.element_ty)
    for tile in range(first_tile, end_tile):
        at = tile * TILE + in_tile
        written = at <= last
        block = tl.load(blocks + at // BLOCK, mask=written, other=0)
        slot = block.to(tl.int64) * BLOCK + at % BLOCK
        key_mask = written[:, None] & (in_key[None, :] < KEY_DIM)
        value_mask = written[:, None] & (in_value[None, :] < VALUE_DIM)
        key = tl.load(keys + (slot * KEY_DIM)[:, None] + in_key[None, :], mask=key_mask, other=0.0)
        value = tl.load(values + (slot * VALUE_DIM)[:, None] + in_value[None, :], mask=value_mask, other=0.0)
        scores = tl.dot(query, key.trans(), input_precision="ieee") * scale
        if SOFTCAP:  # softcap * tanh(scores / softcap)
            power = tl.exp2(scores * (2.0 * _LOG2_E / softcap))
            scores = softcap * (1.0 - 2.0 / (power + 1.0)) * _LOG2_E
        seen = (at[None, :] <= positions[:, None]) & (at[None, :] >= firsts[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        keep = tl.exp2(peak - base)[:, None]
        weights = tl.exp2(scores - base[:, None]).to(value.dtype)
        total = tl.dot(weights, ones, total * keep, input_precision="ieee")
        sums = tl.dot(weights, value, sums * keep, input_precision="ieee")
        peak = top
    return peak, tl.max(total, 1), sums


# The tables are parts of one buffer, which lie anywhere in it: no variants of the kernel for that.
@triton.jit(do_not_specialize_on_alignment=["items", "counts", "all_blocks"])
def attend_items(
    query,
    keys,
    values,
    out,
    sums_out,
    peaks_out,
    totals_out,
    items,
    counts,
    all_blocks,
    sinks,
    scale,
    softcap,
    window,
    chunk,
    query_row,
    query_head,
    key_head,
    value_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
    PARTS: tl.constexpr,
    PIECES: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ITEM: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Attend for each item, key head and piece of `ROWS` rows; the grid is fixed, the number of items is in memory.

    A tile's rows are `ROWS // TOGETHER` positions times `TOGETHER` of the query heads that share a key head: `PIECES`
    of such tiles cover an item's positions, `PARTS` its heads.
    """
    EACH: tl.constexpr = PIECES * PARTS * KV_HEADS
    POSITIONS: tl.constexpr = ROWS // TOGETHER
    HEADS: tl.constexpr = KV_HEADS * GROUP
    index = tl.arange(0, ROWS) // TOGETHER
    in_key, in_value = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    for number in range(tl.program_id(0), tl.load(counts + COUNT) * EACH, tl.num_programs(0)):
        item = items + number // EACH * ITEM
        kv_head = number // (PIECES * PARTS) % KV_HEADS
        part, before = number // PIECES % PARTS, number % PIECES * POSITIONS
        rows = tl.minimum(tl.load(item + 1) - before, POSITIONS)
        if rows > 0:
            row, position = tl.load(item) + before + index, tl.load(item + 2) + before
            in_group = part * TOGETHER + tl.arange(0, ROWS) % TOGETHER
            used = (index < rows) & (in_group < GROUP)
            head = kv_head * GROUP + in_group
            positions = tl.where(used, position + index, -1)  # -1: sees nothing
            firsts = tl.zeros((ROWS,), tl.int32)
            first = 0
            if WINDOW:
                firsts = tl.maximum(firsts, positions - window + 1)
                first = tl.maximum(first, position - window + 1)
            if CHUNK:
                firsts = tl.maximum(firsts, positions - positions % chunk)
                first = tl.maximum(first, position - position % chunk)
            at = query + row.to(tl.int64) * query_row + head.to(tl.int64) * query_head
            mask = used[:, None] & (in_key[None, :] < KEY_DIM)
            queries = tl.load(at[:, None] + in_key[None, :], mask=mask, other=0.0)
            partial = tl.load(item + 6)
            peak = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            sums = tl.zeros((ROWS, VALUE_PAD), tl.float32)
            if SINKS:  # a score without a value, before all others; partial results get it when they are merged
                sink = tl.load(sinks + head, mask=used, other=0.0).to(tl.float32) * _LOG2_E
                peak = tl.where(partial < 0, sink, peak)
                total = tl.where(partial < 0, total + 1.0, total)
            for split in range(tl.load(item + 4), tl.load(item + 5)):
                split_peak, split_total, split_sums = _attend_split(
                    queries,
                    positions,
                    firsts,
                    keys + kv_head.to(tl.int64) * key_head,
                    values + kv_head.to(tl.int64) * value_head,
                    all_blocks + tl.load(item + 3),
                    tl.maximum(split * (SPLIT // TILE), first // TILE),
                    tl.minimum((split + 1) * (SPLIT // TILE), (position + rows - 1) // TILE + 1),
                    position + rows - 1,
                    scale,
                    softcap,
                    KEY_DIM,
                    VALUE_DIM,
                    KEY_PAD,
                    VALUE_PAD,
                    ROWS,
                    TILE,
                    BLOCK,
                    SOFTCAP,
                )
                peak, total, sums = _merge(peak, total, sums, split_peak, split_total, split_sums)
            mask = used[:, None] & (in_value[None, :] < VALUE_DIM)
            if partial >= 0:
                target = (partial + index).to(tl.int64) * HEADS + head
                tl.store(peaks_out + target, peak, mask=used)
                tl.store(totals_out + target, total, mask=used)
                tl.store(sums_out + (target * VALUE_DIM)[:, None] + in_value[None, :], sums, mask=mask)
            else:
                result = (sums / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty)
                target = row.to(tl.int64) * HEADS + head
                tl.store(out + (target * VALUE_DIM)[:, None] + in_value[None, :], result, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["merges", "counts"])
def merge_partials(
    sums_in,
    peaks_in,
    totals_in,
    out,
    merges,
    counts,
    sinks,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    MERGE: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Merge the partial results of each row and head, in the order of their splits."""
    one, in_value = tl.arange(0, 1), tl.arange(0, VALUE_PAD)
    mask = in_value[None, :] < VALUE_DIM
    for number in range(tl.program_id(0), tl.load(counts + 2) * HEADS, tl.num_programs(0)):
        merge, head = merges + number // HEADS * MERGE, number % HEADS
        row, partial = tl.load(merge), tl.load(merge + 1)
        peak = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        sums = tl.zeros((1, VALUE_PAD), tl.float32)
        if SINKS:
            peak = tl.load(sinks + head + one).to(tl.float32) * _LOG2_E
            total = total + 1.0
        for split in range(0, tl.load(merge + 2)):
            at = (partial + split).to(tl.int64) * HEADS + head
            split_sums = tl.load(sums_in + at * VALUE_DIM + in_value[None, :], mask=mask, other=0.0)
            split_peak, split_total = tl.load(peaks_in + at + one), tl.load(totals_in + at + one)
            peak, total, sums = _merge(peak, total, sums, split_peak, split_total, split_sums)
        result = (sums / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty)
        tl.store(out + (row.to(tl.int64) * HEADS + head) * VALUE_DIM + in_value[None, :], result, mask=mask)


@dataclass(frozen=True, slots=True)
class ItemTile:
    """How `attend_items` is compiled. All but `keys` may differ between items without a bit that differs.

    Attributes:
        rows: computed at a time; keys: of a tile; warps, stages: of the compiled kernel.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def item_tile(item_rows: int, shape: LayerShape, settings: AttentionSettings) -> ItemTile:
    """Choose a tile whose registers and shared memory every GPU has (99 KiB of it, from compute capability 8.0 on).

    Two accumulators for 64 rows of 128 numbers need 8 warps. Of longer rows, there are fewer at a time. A tile of keys
    is smaller only where 64 keys do not fit, and then for narrow and wide items alike.

    Args:
        item_rows: `NARROW` or `WIDE`.
    """
    width = padded(max(shape.key_dim, shape.value_dim)) * shape.dtype.itemsize
    keys = TILE if width <= 512 else TILE // 2 if width <= 1024 else TILE // 4
    wide = item_rows > NARROW
    if shape.dtype == torch.float32:  # computed without matrix units
        rows = WIDE // 2 if wide and width <= 256 else NARROW
        return ItemTile(rows, keys, 4 if rows * width <= 4096 else 8, 1)
    if not wide:
        return ItemTile(NARROW, keys, 4 if width <= 512 else 8, 3 if width <= 256 else 2 if width <= 512 else 1)
    rows = WIDE if width <= 256 else WIDE // 2 if width <= 512 else NARROW
    plain = shape.seen == ALL_BEFORE and not settings.softcap and settings.sinks is None
    return ItemTile(rows, keys, 4 if width <= 128 and plain else 8, 2 if width <= 512 else 1)


def padded(dim: int) -> int:
    """Return the numbers of a row in registers: a power of two."""
    return max(16, int(triton.next_power_of_2(dim)))


def constants(
    shape: LayerShape, settings: AttentionSettings, item_rows: int, chosen: ItemTile, split: int = SPLIT
) -> dict[str, Any]:
    """Return the constants that `attend_items` is compiled with for a kind of layer and of item."""
    group = settings.heads // shape.heads
    together = min(group, chosen.rows)
    return {
        "KV_HEADS": shape.heads,
        "GROUP": group,
        "KEY_DIM": shape.key_dim,
        "VALUE_DIM": shape.value_dim,
        "KEY_PAD": padded(shape.key_dim),
        "VALUE_PAD": padded(shape.value_dim),
        "ROWS": chosen.rows,
        "TOGETHER": together,
        "PARTS": triton.cdiv(group, together),
        "PIECES": triton.cdiv(max(item_rows // group, 1), chosen.rows // together),
        "TILE": chosen.keys,
        "SPLIT": split,
        "BLOCK": BLOCK_SIZE,
        "ITEM": ITEM,
        "WINDOW": shape.seen.window is not None,
        "CHUNK": shape.seen.chunk is not None,
        "SOFTCAP": bool(settings.softcap),
        "SINKS": settings.sinks is not None,
    }


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    work: AttentionWork,
    partials: Partials,
    shape: LayerShape,
    settings: AttentionSettings,
    *,
    programs: int,
    item_rows: tuple[int, int] = (NARROW, WIDE),
    tile: int = TILE,
    split: int = SPLIT,
) -> Tensor:
    """Attend, as `engine.compute.cuda.operations.Operations.attend` says; rows of no work item are not written.

    A table without capacity is not asked for: a step of decodes alone has no wide items, say.

    Args:
        programs: how many programs do the work of a launch; item_rows: of narrow and of wide items.
        tile, split: keys of a tile at most, and of a split: the tables count splits of as many.
    """
    assert query.shape[0] == settings.heads
    assert query.stride(2) == 1
    assert keys.stride()[1:] == (shape.key_dim, 1)
    assert values.stride()[1:] == (shape.value_dim, 1)
    out = torch.empty(query.shape[1], settings.heads, shape.value_dim, dtype=query.dtype, device=query.device)
    softcap, sinks, seen = settings.softcap, settings.sinks, shape.seen
    for count, items in enumerate((work.narrow, work.wide)):
        if not items.shape[0]:
            continue
        chosen = item_tile(item_rows[count], shape, settings)
        chosen = replace(chosen, keys=min(chosen.keys, tile))
        attend_items[(programs,)](
            query,
            keys,
            values,
            out,
            partials.sums,
            partials.peaks,
            partials.totals,
            items,
            work.counts,
            work.blocks,
            partials.peaks if sinks is None else sinks,
            settings.scale * (1.0 if softcap else _LOG2_E.value),
            softcap or 1.0,
            seen.window or 0,
            seen.chunk or 0,
            query.stride(1),
            query.stride(0),
            keys.stride(0),
            values.stride(0),
            COUNT=count,
            **constants(shape, settings, item_rows[count], chosen, split),
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=False,
        )
    if work.merges.shape[0]:
        merge_partials[(programs,)](
            partials.sums,
            partials.peaks,
            partials.totals,
            out,
            work.merges,
            work.counts,
            partials.peaks if sinks is None else sinks,
            HEADS=settings.heads,
            VALUE_DIM=shape.value_dim,
            VALUE_PAD=padded(shape.value_dim),
            MERGE=MERGE,
            SINKS=sinks is not None,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return out
