"""Attention over the block cache, as a function that transformers' models call. Knows no model by name.

All sequences of a step travel as one packed row of tokens, `[1, T]`; a `ForwardContext`, handed through the model as a
keyword, says which rows belong to whom. Each sequence attends alone, over its own keys, so no neighbour can change its
bits. Two more rules make a row's bits independent of how its prompt was cut (measured, docs/decisions/0002):

* the key span is a multiple of `SPAN`, and what does not count is masked, never cut off;
* the query rows are a multiple of `ROWS`: with one to three rows the matrix product takes another path.

With compiled kernels (engine/native.py) a CPU has one of our own that needs neither and reads the keys that count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kv_cache import SPAN, KVCache, LayerShape, Run, runs_of
from engine.native import AttentionPlan

IMPLEMENTATION = "verbatim"
"""The name under which transformers finds `attention_forward`."""
CONTEXT_KEY = "verbatim_context"
ROWS = 4


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's part of a step: rows `row … row + count - 1` are its tokens `start … start + count - 1`."""

    row: int
    count: int
    start: int
    table: tuple[int, ...]
    """Blocks of tokens `0 … start + count - 1`."""

    @property
    def padded(self) -> int:
        return -(-(self.start + self.count) // SPAN) * SPAN


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSettings:
    """How a layer attends: see `attention_forward`."""

    heads: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    causal: bool


@dataclass(slots=True)
class ForwardContext:
    """What the attention function must know about a step.

    `cache` None means: record each layer's shape and settings and attend to nothing (see `discover_layers`).
    Rows behind `num_rows` are padding; they belong to nobody.
    """

    spans: tuple[Span, ...]
    slots: Tensor
    """`[num_rows] int64`: where each row's key and value are stored."""
    num_rows: int
    cache: KVCache | None = None
    layers: dict[int, LayerShape] = field(default_factory=dict)
    settings: dict[int, AttentionSettings] = field(default_factory=dict)
    finite: Tensor | None = None
    """`[num_rows] bool`, after the step: False where a key or value was not finite."""
    plan: AttentionPlan | None = None
    """Made by the first layer that our own kernel serves."""
    _runs: dict[int, tuple[Run, ...]] = field(default_factory=dict)
    _masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    _slots_on: dict[torch.device, Tensor] = field(default_factory=dict)

    def slots_on(self, device: torch.device) -> Tensor:
        if device not in self._slots_on:
            self._slots_on[device] = self.slots.to(device)
        return self._slots_on[device]

    def runs(self, span: Span) -> tuple[Run, ...]:
        """The slots of a span's tokens and of all before them."""
        if span.row not in self._runs:
            assert self.cache is not None
            self._runs[span.row] = runs_of(span.table, self.cache.block_size, span.start + span.count)
        return self._runs[span.row]

    def mask(self, span: Span, window: int | None, rows: int, repeat: int, like: Tensor) -> Tensor:
        """Additive mask `[rows, span.padded]` for queries laid out as `repeat` copies of the span's rows, then padding.

        Built once per step and shape, for all layers.
        """
        key = (span.row, window, rows, repeat, like.device, like.dtype)
        mask = self._masks.get(key)
        if mask is None:
            mask = _additive_mask(span, window, rows, repeat, like)
            self._masks[key] = mask
        return mask

    def for_kernel(self) -> AttentionPlan:
        if self.plan is None:
            parts = [(span.row, span.count, span.start, span.table) for span in self.spans]
            self.plan = AttentionPlan(parts, self.slots)
            self.note_finite(self.plan.finite)
        return self.plan

    def note_finite(self, finite: Tensor) -> None:
        finite = finite.to("cpu", non_blocking=False) if finite.device != self.slots.device else finite
        self.finite = finite if self.finite is None else self.finite & finite


def _additive_mask(span: Span, window: int | None, rows: int, repeat: int, like: Tensor) -> Tensor:
    queries = torch.arange(span.start, span.start + span.count, device=like.device)[:, None]
    keys = torch.arange(span.padded, device=like.device)[None, :]
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    mask = torch.zeros(span.count, span.padded, dtype=like.dtype, device=like.device)
    mask = mask.masked_fill_(hidden, float("-inf")).repeat(repeat, 1)
    # Padding rows repeat the last one: their result is thrown away, but a row that sees nothing would be NaN.
    padding = mask[-1:].expand(rows - mask.shape[0], -1)
    return torch.cat([mask, padding]) if padding.shape[0] else mask


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        query: `[1, heads, T, key_dim]`; key and value `[1, kv_heads, T, dim]`, position-encoded.
        sliding_window: tokens seen, the query's own included; softcap: bound of the scores; s_aux: `[heads]` sinks.

    Returns:
        `[1, T, heads, value_dim]`, and None for the weights.
    """
    context: ForwardContext = kwargs[CONTEXT_KEY]
    layer: int = module.layer_idx
    heads, kv_heads, dim = query.shape[1], key.shape[1], value.shape[-1]
    causal = is_causal is not False and getattr(module, "is_causal", True)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window or None
    if context.cache is None:
        context.layers[layer] = LayerShape(kv_heads, key.shape[-1], dim, key.dtype, key.device)
        context.settings[layer] = AttentionSettings(heads, scale, window, softcap, s_aux, causal)
        return query.new_zeros(1, query.shape[2], heads, dim), None
    if not causal:
        raise RuntimeError(f"layer {layer} is not causal: a cache of past keys cannot serve it")
    if context.cache.native[layer]:
        assert context.cache.kernels is not None
        out = context.cache.kernels.attend(
            context.for_kernel(),
            query[0],
            key[0],
            value[0],
            context.cache.keys[layer],
            context.cache.values[layer],
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=None if s_aux is None else s_aux.to(torch.float32).contiguous(),
        )
        return out.unsqueeze(0), None
    _store(context, layer, key[0], value[0])
    plain = not softcap and s_aux is None and key.shape[-1] == dim
    output = query.new_zeros(query.shape[2], heads, dim)
    for span in context.spans:
        keys, values = context.cache.read(layer, context.runs(span), span.padded)
        rows = query[0, :, span.row : span.row + span.count]
        if plain:
            result = _fused(context, span, rows, keys, values, window, scale)
        else:
            result = _blockwise(context, span, rows, keys, values, window, scale, softcap, s_aux)
        output[span.row : span.row + span.count] = result.transpose(0, 1)
    return output.unsqueeze(0), None


def _store(context: ForwardContext, layer: int, keys: Tensor, values: Tensor) -> None:
    """Write the step's keys and values; a row that is not finite is written as zeros and noted."""
    assert context.cache is not None
    keys, values = keys[:, : context.num_rows], values[:, : context.num_rows]
    # A sum is finite only if all its terms are (it may also overflow: then the keys are beyond use anyway).
    finite = torch.isfinite(keys.sum((0, 2)) + values.sum((0, 2)))
    context.note_finite(finite)
    if keys.device.type != "cpu" or not bool(finite.all()):
        keys = torch.where(finite[None, :, None], keys, 0)
        values = torch.where(finite[None, :, None], values, 0)
    context.cache.write(layer, context.slots_on(keys.device), keys, values)


def _fused(
    context: ForwardContext, span: Span, query: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float
) -> Tensor:
    """`[heads, count, dim]` by torch's fused kernel.

    A few rows: the query heads that share a key head become rows of one product, so that keys are read once. Many
    rows: they stay heads over an expanded view, so that the mask need not be repeated.
    """
    heads, count, dim = query.shape
    kv_heads = keys.shape[0]
    groups = heads // kv_heads
    if count * groups <= 4 * ROWS or groups == 1:
        grouped = _pad_rows(query.reshape(kv_heads, groups * count, dim))
        mask = context.mask(span, window, grouped.shape[1], groups, query)
        out = F.scaled_dot_product_attention(grouped[None], keys[None], values[None], attn_mask=mask, scale=scale)
        return out[0, :, : groups * count].reshape(heads, count, -1)
    grouped = _pad_rows(query.reshape(kv_heads, groups, count, dim))
    mask = context.mask(span, window, grouped.shape[2], 1, query)
    out = F.scaled_dot_product_attention(
        grouped,
        keys[:, None].expand(-1, groups, -1, -1),
        values[:, None].expand(-1, groups, -1, -1),
        attn_mask=mask,
        scale=scale,
    )
    return out[:, :, :count].reshape(heads, count, -1)


def _blockwise(
    context: ForwardContext,
    span: Span,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`[heads, count, dim]` for what the fused kernel lacks: soft-capped scores (Gemma 2) and sinks (gpt-oss).

    Online softmax over key blocks of `SPAN`, one block after the other, so that every product has the same inner
    shape however long the sequence is. A sink is a score that takes part in the normalisation and has no value.
    """
    heads, count, _ = query.shape
    kv_heads, groups = keys.shape[0], heads // keys.shape[0]
    rows = _pad_rows(query.reshape(kv_heads, groups * count, -1))
    mask = context.mask(span, window, rows.shape[1], groups, query)
    if sinks is None:
        peak = rows.new_full(rows.shape[:2], float("-inf"))
        total = torch.zeros_like(peak)
    else:
        per_row = sinks.to(rows.dtype).reshape(kv_heads, groups).repeat_interleave(count, dim=1)
        peak = F.pad(per_row, (0, rows.shape[1] - per_row.shape[1]))
        total = torch.ones_like(peak)
    result = rows.new_zeros(kv_heads, rows.shape[1], values.shape[-1])
    for start in range(0, span.padded, SPAN):
        scores = torch.matmul(rows, keys[:, start : start + SPAN].transpose(1, 2)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + mask[:, start : start + SPAN]
        new_peak = torch.maximum(peak, scores.amax(-1))
        base = torch.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = torch.exp(scores - base[..., None])
        keep = torch.exp(peak - base)
        total = total * keep + weights.sum(-1)
        result = result * keep[..., None] + torch.matmul(weights, values[:, start : start + SPAN])
        peak = new_peak
    result = result / total[..., None]
    return result[:, : groups * count].reshape(heads, count, -1)


def _pad_rows(rows: Tensor) -> Tensor:
    """Pad the second-last dimension to a multiple of `ROWS` with zeros."""
    missing = -rows.shape[-2] % ROWS
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows
