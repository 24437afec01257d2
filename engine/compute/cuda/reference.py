"""Computes the operations of the CUDA path with torch, on any device: what the kernels have to come to.

Tables, key tiles and splits are the kernels', and so is the order in which tiles and splits are summed; only inside a
product the order differs, where the matrix unit's is not known. Everything is computed element by element and summed
by halving, because a matrix product or a reduction of torch may take another path for another number of rows. `exp`
stands for `exp2`: on a CPU torch computes the last numbers of a tensor's `exp2` by another formula than the rest.

Slow, and it reads the tables on the host: for tests without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compute.backend import AttentionSettings
from engine.compute.cuda.operations import AttentionWork, LinearWeight, NormKind, Partials
from engine.compute.cuda.steps.tables import SPLIT, TILE
from engine.compute.kv_cache import LayerShape
from engine.scheduling.block_pool import BLOCK_SIZE

__all__ = ["TorchOperations"]

_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453
_ROOM = 1 << 22
"""Products that are held at once, in numbers: what does not fit is computed in parts, with the same bits."""
_TILES = SPLIT // TILE


class TorchOperations:
    """`engine.compute.cuda.operations.Operations` in torch.

    Attributes:
        tile_rows: rows of a narrow and of a wide work item.
    """

    def __init__(self, tile_rows: tuple[int, int] = (16, 64)) -> None:
        self.tile_rows = tile_rows

    def linear(self, x: Tensor, weight: LinearWeight, out_dtype: torch.dtype) -> Tensor:
        """Compute `x @ weight.T + bias`: `[rows, out]`."""
        rows, columns = x.shape[0], weight.out_features
        left = x.float().t().contiguous()  # [in, rows]
        sums = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
        width = max(min(columns, _ROOM // left.shape[0]), 1)
        height = max(_ROOM // (left.shape[0] * width), 1)
        for column in range(0, columns, width):
            right = _numbers(weight, slice(column, column + width))
            for row in range(0, rows, height):
                part = _scaled_sums(left[:, row : row + height], right, weight, slice(column, column + width))
                sums[row : row + height, column : column + width] = part
        if weight.bias is not None:
            sums += weight.bias.float()
        return sums.to(out_dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, kind: NormKind) -> Tensor:
        """Normalise each row of `x [rows, n]` by its root mean square."""
        wide, scale = x.float(), weight.float()
        squares = _total((wide * wide).t().contiguous())
        normed = wide * (1.0 / torch.sqrt(squares / x.shape[1] + epsilon))[:, None]
        if kind == "weight":
            return (normed.to(x.dtype).float() * scale).to(x.dtype)
        return (normed * (1.0 + scale)).to(x.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Compute `silu(gate) * up` of `gate_up [rows, 2 n]`."""
        gate, up = gate_up.float().chunk(2, dim=1)
        silu = (gate / (1.0 + torch.exp(-gate))).to(gate_up.dtype)
        return (silu.float() * up).to(gate_up.dtype)

    def store(
        self,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        num_rows: Tensor,
        finite: Tensor,
    ) -> None:
        """Write the keys and values of the first `num_rows` rows, zeros for rows that are not finite."""
        rows = int(num_rows)
        key, value, slots = key[:, :rows], value[:, :rows], slots[:rows]
        fine = key.isfinite().all(2).all(0) & value.isfinite().all(2).all(0)
        keys.index_copy_(1, slots, torch.where(fine[None, :, None], key, 0))
        values.index_copy_(1, slots, torch.where(fine[None, :, None], value, 0))
        finite[:rows] *= fine

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        work: AttentionWork,
        partials: Partials,
        shape: LayerShape,
        settings: AttentionSettings,
    ) -> Tensor:
        """Attend, item by item of the tables, then merge: `[T, heads, value_dim]`, zeros for rows of no item."""
        layer = _Layer(keys, values, work.blocks, shape, settings)
        output = query.new_zeros(query.shape[1], query.shape[0], values.shape[-1])
        narrow, wide, merges = work.counts.tolist()
        for items, tile in zip((work.narrow[:narrow], work.wide[:wide]), self.tile_rows, strict=True):
            for part in _parts(items, layer, tile):
                _compute(part.long(), query, layer, partials, output)
        if merges:
            _merge_partials(work.merges[:merges].long(), partials, settings.sinks, output)
        return output

    def copy_blocks(self, tensors: Sequence[Tensor], pairs: Tensor, num_pairs: Tensor) -> None:
        """Copy blocks, one pair after the other."""
        for source, target in pairs[: int(num_pairs)].tolist():
            here, there = (slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE) for block in (source, target))
            for tensor in tensors:
                tensor[:, there] = tensor[:, here]


def _total(terms: Tensor) -> Tensor:
    """Sum over the first dimension by adding the second half to the first, again and again. Overwrites `terms`.

    Each number is added element by element, so its bits depend on nothing beside its own terms.
    """
    while (count := terms.shape[0]) > 1:
        half = (count + 1) // 2
        terms[: count - half] += terms[half:]
        terms = terms[:half]
    return terms[0]


def _exp2(x: Tensor) -> Tensor:
    return torch.exp(x * _LN_2)


# -- linear layers ----------------------------------------------------------------------------------------------------


def _numbers(weight: LinearWeight, columns: slice) -> Tensor:
    """Return what is multiplied with the input, before any scale: `[in, columns] float32`."""
    data = weight.data[columns]
    if weight.kind == "int4":
        pairs = data.view(len(data), -1, weight.group // 2)  # low halves of bytes: the first half of a group's columns
        zeros = 8 if weight.zeros is None else weight.zeros[columns].to(torch.int8)[:, :, None]
        data = (torch.cat([pairs & 15, pairs >> 4], dim=2).to(torch.int8) - zeros).flatten(1)
    return data.float().t().contiguous()


def _scaled_sums(left: Tensor, right: Tensor, weight: LinearWeight, columns: slice) -> Tensor:
    """Multiply `left [in, rows]` with `right [in, columns]` and scale, group by group: `[rows, columns]`."""
    if weight.scale is None:
        return _total(left[:, :, None] * right[:, None, :])
    if weight.kind == "int8":
        return _total(left[:, :, None] * right[:, None, :]) * weight.scale[columns]
    sums = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float32, device=left.device)
    for group in range(left.shape[0] // weight.group):
        of_group = slice(group * weight.group, (group + 1) * weight.group)
        sums += _total(left[of_group, :, None] * right[of_group, None, :]) * weight.scale[columns, group]
    return sums


# -- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    keys: Tensor
    values: Tensor
    blocks: Tensor
    shape: LayerShape
    settings: AttentionSettings

    @property
    def groups(self) -> int:
        return self.settings.heads // self.keys.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """A softmax under way: the largest score, in base 2; the sum of weights; the weighted sum of values.

    Attributes:
        peak, total: `[…] float32`; result: `[…, value_dim] float32`.
    """

    peak: Tensor
    total: Tensor
    result: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], value_dim: int, device: torch.device) -> _Sums:
        peak = torch.full(shape, -math.inf, dtype=torch.float32, device=device)
        return cls(peak, torch.zeros_like(peak), peak.new_zeros(*shape, value_dim))

    def merged(self, other: _Sums) -> _Sums:
        """Add the sums of the next split. One of which nothing is seen changes no bit."""
        peak = torch.maximum(self.peak, other.peak)
        base = torch.where(peak == -math.inf, 0.0, peak)
        old, new = _exp2(self.peak - base), _exp2(other.peak - base)
        total = self.total * old + other.total * new
        return _Sums(peak, total, self.result * old[..., None] + other.result * new[..., None])

    def quotient(self) -> Tensor:
        return self.result / torch.where(self.total > 0, self.total, 1.0)[..., None]


def _parts(items: Tensor, layer: _Layer, tile: int) -> Iterator[Tensor]:
    """Cut a table of items, so that the products of one part have room; items know nothing of each other."""
    dims = max(layer.keys.shape[-1], layer.values.shape[-1])
    each = layer.keys.shape[0] * tile * TILE * dims
    size = max(_ROOM // each, 1)
    return (items[at : at + size] for at in range(0, items.shape[0], size))


def _compute(items: Tensor, query: Tensor, layer: _Layer, partials: Partials, output: Tensor) -> None:
    """Compute items side by side, each split after split, and write results or partial results."""
    row, rows, start, offset, first, end, slot, _ = items.unbind(1)
    index = torch.arange(int(rows.max()), device=items.device)
    mine = index < rows[:, None]  # [items, rows]
    at, positions = torch.where(mine, row[:, None] + index, 0), start[:, None] + index
    kv_heads, groups = layer.keys.shape[0], layer.groups
    rows_of = query[:, at].float().view(kv_heads, groups, *at.shape, -1)
    rows_of = rows_of.permute(4, 0, 2, 3, 1).flatten(3)  # [key_dim, kv_heads, items, rows · groups]
    positions = torch.where(mine, positions, -1).repeat_interleave(groups, dim=1)
    sums = _Sums.empty((kv_heads, *positions.shape), output.shape[-1], items.device)
    if layer.settings.sinks is not None:
        sink = layer.settings.sinks.float().view(kv_heads, 1, groups).repeat(1, 1, len(index)) * _LOG2_E
        whole = slot[:, None] < 0  # a sink takes part where splits are merged
        sums = _Sums(torch.where(whole, sink, -math.inf), torch.where(whole, sums.total + 1.0, 0.0), sums.result)
    for number in range(int((end - first).max())):
        split = first + number
        active = torch.where((split < end)[:, None], positions, -1)  # an item behind its last split sees nothing
        sums = sums.merged(_split(rows_of, active, offset, split, layer))
    whole = mine & (slot[:, None] < 0)
    output[at[whole]] = _by_rows(sums.quotient(), groups)[whole].to(output.dtype)
    left = slot >= 0
    partials.sums[slot[left]] = _by_rows(sums.result, groups)[left, 0]
    partials.peaks[slot[left]] = _by_rows(sums.peak, groups)[left, 0]
    partials.totals[slot[left]] = _by_rows(sums.total, groups)[left, 0]


def _by_rows(numbers: Tensor, groups: int) -> Tensor:
    """Rearrange `[kv_heads, items, rows · groups, …]` to `[items, rows, heads, …]`."""
    kv_heads, items, rows, *rest = numbers.shape
    return numbers.view(kv_heads, items, rows // groups, groups, *rest).movedim(0, 2).flatten(2, 3)


def _split(query: Tensor, positions: Tensor, offset: Tensor, split: Tensor, layer: _Layer) -> _Sums:
    """Sum one split of each item, tile after tile.

    Args:
        query: `[key_dim, kv_heads, items, rows]`; positions: `[items, rows]`; offset, split: `[items]`.
    """
    last = positions.amax(1)
    sums = _Sums.empty(tuple(query.shape[1:]), layer.values.shape[-1], query.device)
    for tile in range(_TILES):
        key = (split * _TILES + tile)[:, None] * TILE + torch.arange(TILE, device=query.device)  # [items, TILE]
        inside = key <= last[:, None]
        if not bool(inside.any()):
            break
        blocks = layer.blocks[torch.where(inside, offset[:, None] + key // BLOCK_SIZE, 0)].long()
        slots = torch.where(inside, blocks * BLOCK_SIZE + key % BLOCK_SIZE, 0)
        hidden = (key[:, None, :] > positions[:, :, None]) | (
            key[:, None, :] < layer.shape.seen.first(positions)[..., None]
        )
        sums = _tile(query, slots, hidden, layer, sums)
    return sums


def _tile(query: Tensor, slots: Tensor, hidden: Tensor, layer: _Layer, sums: _Sums) -> _Sums:
    """Add one tile of keys: `slots [items, TILE]`, of which `hidden [items, rows, TILE]` are not seen."""
    keys = layer.keys[:, slots].float().permute(3, 0, 1, 2)  # [key_dim, kv_heads, items, TILE]
    scores = _total(query[..., None] * keys[:, :, :, None, :]) * layer.settings.scale
    if layer.settings.softcap:
        growth = _exp2(scores * (2.0 * _LOG2_E / layer.settings.softcap))
        scores = layer.settings.softcap * (1.0 - 2.0 / (growth + 1.0))
    scores = torch.where(hidden, -math.inf, scores * _LOG2_E)
    peak = torch.maximum(sums.peak, scores.amax(-1))
    base = torch.where(peak == -math.inf, 0.0, peak)
    keep = _exp2(sums.peak - base)
    weights = _exp2(scores - base[..., None]).to(layer.values.dtype).float()
    weights = weights.movedim(-1, 0).contiguous()  # [TILE, kv_heads, items, rows]
    values = layer.values[:, slots].float().permute(2, 0, 1, 3)  # [TILE, kv_heads, items, value_dim]
    result = sums.result * keep[..., None] + _total(weights[..., None] * values[:, :, :, None, :])
    return _Sums(peak, sums.total * keep + _total(weights), result)


def _merge_partials(merges: Tensor, partials: Partials, sinks: Tensor | None, output: Tensor) -> None:
    """Merge the partial results of rows, split after split, all rows side by side."""
    row, first, count, _ = merges.unbind(1)
    sums = _Sums.empty((len(row), output.shape[1]), output.shape[2], merges.device)
    if sinks is not None:
        sums = _Sums((sinks.float() * _LOG2_E).expand_as(sums.peak), sums.total + 1.0, sums.result)
    for number in range(int(count.max())):
        there = number < count
        slot = torch.where(there, first + number, first)
        peak = torch.where(
            there[:, None], partials.peaks[slot], -math.inf
        )  # of a row that is complete: nothing is seen
        sums = sums.merged(_Sums(peak, partials.totals[slot], partials.sums[slot]))
    output[row] = sums.quotient().to(output.dtype)
