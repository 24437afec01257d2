"""Attention in torch, over a cache of plain layout. Knows chunks and slots; no model and no request.

Each sequence attends alone, over its own keys, so no neighbour can change its bits. Two rules make a row's bits
independent of how its prompt was cut into chunks (measured, docs/decisions/0002):

* the key span is a multiple of `KEY_BLOCK`, and keys that do not count are masked, never cut off;
* the query rows are a multiple of `ROWS`: with one to three rows the matrix product takes another path.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.compute.attention_mask import KeyRange
from engine.compute.backend import AttentionSettings, PackedChunk, rows_by_adapter
from engine.compute.kv_cache import KEY_BLOCK, KVCache, Run, gather, runs_of

ROWS = 4
"""Query rows are padded to a multiple of this many."""


def padded_length(chunk: PackedChunk) -> int:
    """Return the length of the key span that a sequence's rows are computed over."""
    return -(-(chunk.start + chunk.count) // KEY_BLOCK) * KEY_BLOCK


class TorchPlan:
    """A step's attention by torch: slots, masks and runs of slots, each made once for all layers."""

    def __init__(self, cache: KVCache, chunks: Sequence[PackedChunk]) -> None:
        self.cache = cache
        self.chunks = tuple(chunks)
        self.adapter_rows = rows_by_adapter(chunks)
        self.slots = torch.tensor([slot for chunk in chunks for slot in chunk.slots()], dtype=torch.int64)
        """`[rows] int64`: where each row's key and value are stored."""
        self._finite: dict[torch.device, Tensor] = {}  # asking a GPU in each layer would wait for it as often
        self._runs: dict[int, tuple[Run, ...]] = {}
        self._masks: dict[tuple[Any, ...], Tensor] = {}
        self._slots_on: dict[torch.device, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Store the step's keys and values, then attend: see `engine.compute.backend.StepPlan`."""
        self._store(layer, key, value)
        scale, softcap, sinks = settings.scale, settings.softcap, settings.sinks
        seen = self.cache.layers[layer].seen
        plain = not softcap and sinks is None and key.shape[-1] == value.shape[-1]
        output = query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])
        for chunk in self.chunks:
            runs, padded = self._runs_of(chunk), padded_length(chunk)
            keys, values = gather(self.cache.keys[layer], runs, padded), gather(self.cache.values[layer], runs, padded)
            rows = query[:, chunk.row : chunk.row + chunk.count]
            if plain:
                result = _fused(self, chunk, rows, keys, values, seen, scale)
            else:
                result = _blockwise(self, chunk, rows, keys, values, seen, scale, softcap, sinks)
            output[chunk.row : chunk.row + chunk.count] = result.transpose(0, 1)
        return output

    def finite(self) -> Tensor:
        """Return which rows' keys and values were finite in all layers: `[rows] bool`, on a device of the layers'."""
        found = list(self._finite.values()) or [torch.ones(len(self.slots), dtype=torch.bool)]
        return functools.reduce(lambda one, other: one & other.to(one.device), found)

    def mask(self, chunk: PackedChunk, seen: KeyRange, rows: int, repeat: int, like: Tensor) -> Tensor:
        """Return the additive mask `[rows, padded_length(chunk)]`, built once per step and shape for all layers.

        Queries are laid out as `repeat` copies of the chunk's rows, then padding.
        """
        key = (chunk.row, seen, rows, repeat, like.device, like.dtype)
        mask = self._masks.get(key)
        if mask is None:
            mask = _additive_mask(chunk, seen, rows, repeat, like)
            self._masks[key] = mask
        return mask

    def _runs_of(self, chunk: PackedChunk) -> tuple[Run, ...]:
        """Return the slots of a chunk's tokens and of all before them."""
        if chunk.row not in self._runs:
            self._runs[chunk.row] = runs_of(chunk.table, chunk.start + chunk.count)
        return self._runs[chunk.row]

    def _store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the step's keys and values; a row that is not finite is written as zeros and noted."""
        rows = len(self.slots)
        keys, values = keys[:, :rows], values[:, :rows]
        finite = keys.isfinite().all(2).all(0) & values.isfinite().all(2).all(0)
        known = self._finite.get(keys.device)
        self._finite[keys.device] = finite if known is None else known & finite
        if keys.device.type != "cpu" or not bool(finite.all()):
            keys = torch.where(finite[None, :, None], keys, 0)
            values = torch.where(finite[None, :, None], values, 0)
        if keys.device not in self._slots_on:
            self._slots_on[keys.device] = self.slots.to(keys.device)
        self.cache.write(layer, self._slots_on[keys.device], keys, values)


def _additive_mask(chunk: PackedChunk, seen: KeyRange, rows: int, repeat: int, like: Tensor) -> Tensor:
    queries = torch.arange(chunk.start, chunk.start + chunk.count, device=like.device)[:, None]
    keys = torch.arange(padded_length(chunk), device=like.device)[None, :]
    hidden = (keys > queries) | (keys < seen.first(queries))
    mask = torch.zeros(chunk.count, padded_length(chunk), dtype=like.dtype, device=like.device)
    mask = mask.masked_fill_(hidden, float("-inf")).repeat(repeat, 1)
    # Padding rows repeat the last one: their result is thrown away, but a row that sees nothing would be NaN.
    padding = mask[-1:].expand(rows - mask.shape[0], -1)
    return torch.cat([mask, padding]) if padding.shape[0] else mask


def _fused(
    plan: TorchPlan, chunk: PackedChunk, query: Tensor, keys: Tensor, values: Tensor, seen: KeyRange, scale: float
) -> Tensor:
    """Attend by torch's fused kernel: `[heads, count, dim]`.

    A few rows: the query heads that share a key head become rows of one product, so that keys are read once. Many
    rows: they stay heads over an expanded view, so that the mask need not be repeated.
    """
    heads, count, dim = query.shape
    kv_heads = keys.shape[0]
    groups = heads // kv_heads
    if count * groups <= 4 * ROWS or groups == 1:
        grouped = _pad_rows(query.reshape(kv_heads, groups * count, dim))
        mask = plan.mask(chunk, seen, grouped.shape[1], groups, query)
        out = F.scaled_dot_product_attention(grouped[None], keys[None], values[None], attn_mask=mask, scale=scale)
        return out[0, :, : groups * count].reshape(heads, count, -1)
    grouped = _pad_rows(query.reshape(kv_heads, groups, count, dim))
    mask = plan.mask(chunk, seen, grouped.shape[2], 1, query)
    out = F.scaled_dot_product_attention(
        grouped,
        keys[:, None].expand(-1, groups, -1, -1),
        values[:, None].expand(-1, groups, -1, -1),
        attn_mask=mask,
        scale=scale,
    )
    return out[:, :, :count].reshape(heads, count, -1)


def _blockwise(
    plan: TorchPlan,
    chunk: PackedChunk,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: KeyRange,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend where the fused kernel cannot, with soft-capped scores (Gemma 2) or sinks (gpt-oss): `[heads, count,
    dim]`.

    Online softmax over key blocks of `KEY_BLOCK`, one block after the other, so that every product has the same inner
    shape however long the sequence is; in float32, whatever the inputs' dtype. A sink is a score that takes part in
    the normalisation and has no value.
    """
    heads, count, _ = query.shape
    kv_heads, groups = keys.shape[0], heads // keys.shape[0]
    rows = _pad_rows(query.reshape(kv_heads, groups * count, -1)).float()
    mask = plan.mask(chunk, seen, rows.shape[1], groups, rows)
    if sinks is None:
        peak = rows.new_full(rows.shape[:2], float("-inf"))
        total = torch.zeros_like(peak)
    else:
        per_row = sinks.to(rows.dtype).reshape(kv_heads, groups).repeat_interleave(count, dim=1)
        peak = F.pad(per_row, (0, rows.shape[1] - per_row.shape[1]))
        total = torch.ones_like(peak)
    result = rows.new_zeros(kv_heads, rows.shape[1], values.shape[-1])
    for start in range(0, padded_length(chunk), KEY_BLOCK):
        scores = torch.matmul(rows, keys[:, start : start + KEY_BLOCK].float().transpose(1, 2)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + mask[:, start : start + KEY_BLOCK]
        new_peak = torch.maximum(peak, scores.amax(-1))
        base = torch.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = torch.exp(scores - base[..., None])
        keep = torch.exp(peak - base)
        total = total * keep + weights.sum(-1)
        result = result * keep[..., None] + torch.matmul(weights, values[:, start : start + KEY_BLOCK].float())
        peak = new_peak
    result = result / total[..., None]
    return result[:, : groups * count].reshape(heads, count, -1).to(query.dtype)


def _pad_rows(rows: Tensor) -> Tensor:
    """Pad the second-last dimension to a multiple of `ROWS` with zeros."""
    missing = -rows.shape[-2] % ROWS
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows
