"""Attention over the block cache, as a function that transformers' models call. Knows no model by name.

All sequences of a step travel as one packed row of tokens, `[1, T]`. A `ForwardContext` says which rows belong to whom;
it reaches this file through a context variable, because many models drop keywords on the way to their layers. Each
sequence attends alone, over its own keys, so no neighbour can change its bits. Two more rules make a row's bits
independent of how its prompt was cut (measured, docs/decisions/0002):

* the key span is a multiple of `KEY_BLOCK`, and what does not count is masked, never cut off;
* the query rows are a multiple of `ROWS`: with one to three rows the matrix product takes another path.

With compiled kernels (`engine.compute.cpu.kernels`) a CPU has one of our own, which needs neither and reads no more
than the keys that count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.compute.attention_mask import KeyRange, NotUnderstood, read_mask
from engine.compute.cpu.kernels import AttentionPlan
from engine.compute.kv_cache import KEY_BLOCK, KVCache, LayerShape, Run, runs_of

IMPLEMENTATION = "verbatim"
"""The name under which transformers finds `attention_forward`."""
ROWS = 4

_HARMLESS = frozenset({"dropout", "position_ids", "use_cache", "return_dict", "logits_to_keep"})
"""Keywords of the attention interface that change nothing here, as those that say what else to return (`output_…`):
models are served in evaluation mode, and positions are in the queries and keys already."""

_current: ContextVar[ForwardContext] = ContextVar("verbatim_forward_context")


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Make `context` what attention layers that run inside the `with` block see."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def current_context() -> ForwardContext | None:
    """The context of the forward pass that is running, if it is one of ours."""
    return _current.get(None)


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
        return -(-(self.start + self.count) // KEY_BLOCK) * KEY_BLOCK


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSettings:
    """How a layer attends.

    Attributes:
        heads: of the queries; scale: of the scores; softcap: their bound; sinks: `[heads]`.
    """

    heads: int
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def kind(self) -> tuple[int, float, float | None, bool]:
        """The same for layers that differ in the values of their sinks only."""
        return self.heads, self.scale, self.softcap, self.sinks is not None


@dataclass(slots=True)
class ForwardContext:
    """What the attention function must know about a step.

    `cache` None means: record each layer's shape and settings and attend to nothing (see `discover`). `length` is then
    how many tokens a sequence may have: masks are tried up to there.
    Rows behind `num_rows` are padding; they belong to nobody.
    """

    spans: tuple[Span, ...]
    slots: Tensor
    """`[num_rows] int64`: where each row's key and value are stored."""
    num_rows: int
    cache: KVCache | None = None
    layers: dict[int, LayerShape] = field(default_factory=dict)
    settings: dict[int, AttentionSettings] = field(default_factory=dict)
    length: int = 0
    masks: list[KeyRange | None] = field(default_factory=list)
    """Of the masks that transformers has made in this pass; None: not understood. What stands for mask n, on its way
    through the model, is a tensor of numbers n + 1."""
    states: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    """By layer: queries, keys and values as they reached the attention interface."""
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

    def mask(self, span: Span, seen: KeyRange, rows: int, repeat: int, like: Tensor) -> Tensor:
        """Additive mask `[rows, span.padded]` for queries laid out as `repeat` copies of the span's rows, then padding.

        Built once per step and shape, for all layers.
        """
        key = (span.row, seen, rows, repeat, like.device, like.dtype)
        mask = self._masks.get(key)
        if mask is None:
            mask = _additive_mask(span, seen, rows, repeat, like)
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


def _additive_mask(span: Span, seen: KeyRange, rows: int, repeat: int, like: Tensor) -> Tensor:
    queries = torch.arange(span.start, span.start + span.count, device=like.device)[:, None]
    keys = torch.arange(span.padded, device=like.device)[None, :]
    hidden = (keys > queries) | (keys < seen.first(queries))
    mask = torch.zeros(span.count, span.padded, dtype=like.dtype, device=like.device)
    mask = mask.masked_fill_(hidden, float("-inf")).repeat(repeat, 1)
    # Padding rows repeat the last one: their result is thrown away, but a row that sees nothing would be NaN.
    padding = mask[-1:].expand(rows - mask.shape[0], -1)
    return torch.cat([mask, padding]) if padding.shape[0] else mask


def make_mask(*, mask_function: Any, q_length: int, device: torch.device | str = "cpu", **kwargs: Any) -> Tensor | None:
    """transformers' mask interface: note which keys the mask function shows.

    Returns something that stands for the mask, by which `attention_forward` knows it again; None in a step, where the
    layers' masks are known.
    """
    context = _current.get()
    if context.cache is not None:
        return None
    try:
        context.masks.append(read_mask(mask_function, context.length, device))
    except NotUnderstood:  # there may be no layer that uses it
        context.masks.append(None)
    return torch.full((1, 1, q_length, q_length), float(len(context.masks)), device=device)


def _mask_of(context: ForwardContext, stand_in: Tensor) -> KeyRange | None:
    """The mask that a tensor stands for; None if it is not understood, or was changed on its way."""
    number = stand_in.flatten()[0]
    if stand_in.dim() != 4 or not bool((stand_in == number).all()) or number not in range(1, len(context.masks) + 1):
        return None
    return context.masks[int(number) - 1]


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
        softcap: bound of the scores; s_aux: `[heads]` sinks.

    Returns:
        `[1, T, heads, value_dim]`, and None for the weights.

    Raises:
        NotUnderstood: the model asks for something that is not known here; only while layers are discovered.
    """
    context = _current.get()
    layer: int = module.layer_idx
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    settings = AttentionSettings(query.shape[1], scale, softcap, s_aux)
    if context.cache is None:
        seen = _key_range(context, attention_mask, sliding_window, kwargs)
        if is_causal is False or not getattr(module, "is_causal", True):
            raise NotUnderstood("its attention is not causal: a cache of past keys cannot serve it")
        if layer in context.layers:
            raise NotUnderstood(f"layer {layer} attends more than once")
        context.layers[layer] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1], key.dtype, key.device, seen)
        context.settings[layer] = settings
        context.states[layer] = (query, key, value)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None
    return attend(context, layer, query[0], key[0], value[0], settings).unsqueeze(0), None


def _key_range(context: ForwardContext, mask: Tensor | None, window: int | None, others: dict[str, Any]) -> KeyRange:
    """What a layer's mask and keywords ask for together.

    Raises:
        NotUnderstood: the mask was not made through transformers' interface, a keyword is not known, or two disagree.
    """
    given = [name for name, value in others.items() if value is not None]
    unknown = sorted(name for name in given if name not in _HARMLESS and not name.startswith("output_"))
    if unknown:
        raise NotUnderstood(f"its attention takes {', '.join(unknown)}")
    if mask is None:
        seen = KeyRange()
    else:
        known = _mask_of(context, mask)
        if known is None:
            raise NotUnderstood("its attention mask is neither causal, a sliding window nor chunks")
        seen = known
    window = window if window and window < context.length else None
    if window is not None and seen != KeyRange(window=window):
        raise NotUnderstood(f"its attention asks for a window of {window}, its mask shows {seen.describe()}")
    return seen


def attend(
    context: ForwardContext, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings
) -> Tensor:
    """Store a step's keys and values in a layer's cache, and attend.

    Args:
        query: `[heads, T, key_dim]`; key and value `[kv_heads, T, dim]`.

    Returns:
        `[T, heads, value_dim]`.
    """
    scale, softcap, sinks = settings.scale, settings.softcap, settings.sinks
    cache = context.cache
    assert cache is not None
    seen = cache.layers[layer].seen
    if cache.native[layer]:
        assert cache.kernels is not None
        return cache.kernels.attend(
            context.for_kernel(),
            query,
            key,
            value,
            cache.keys[layer],
            cache.values[layer],
            scale=scale,
            window=seen.window,
            chunk=seen.chunk,
            softcap=softcap,
            sinks=None if sinks is None else sinks.to(torch.float32).contiguous(),
        )
    _store(context, layer, key, value)
    plain = not softcap and sinks is None and key.shape[-1] == value.shape[-1]
    output = query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])
    for span in context.spans:
        keys, values = cache.read(layer, context.runs(span), span.padded)
        rows = query[:, span.row : span.row + span.count]
        if plain:
            result = _fused(context, span, rows, keys, values, seen, scale)
        else:
            result = _blockwise(context, span, rows, keys, values, seen, scale, softcap, sinks)
        output[span.row : span.row + span.count] = result.transpose(0, 1)
    return output


def _store(context: ForwardContext, layer: int, keys: Tensor, values: Tensor) -> None:
    """Write the step's keys and values; a row that is not finite is written as zeros and noted."""
    assert context.cache is not None
    keys, values = keys[:, : context.num_rows], values[:, : context.num_rows]
    finite = keys.isfinite().all(2).all(0) & values.isfinite().all(2).all(0)
    context.note_finite(finite)
    if keys.device.type != "cpu" or not bool(finite.all()):
        keys = torch.where(finite[None, :, None], keys, 0)
        values = torch.where(finite[None, :, None], values, 0)
    context.cache.write(layer, context.slots_on(keys.device), keys, values)


def _fused(
    context: ForwardContext, span: Span, query: Tensor, keys: Tensor, values: Tensor, seen: KeyRange, scale: float
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
        mask = context.mask(span, seen, grouped.shape[1], groups, query)
        out = F.scaled_dot_product_attention(grouped[None], keys[None], values[None], attn_mask=mask, scale=scale)
        return out[0, :, : groups * count].reshape(heads, count, -1)
    grouped = _pad_rows(query.reshape(kv_heads, groups, count, dim))
    mask = context.mask(span, seen, grouped.shape[2], 1, query)
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
    seen: KeyRange,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`[heads, count, dim]` for what the fused kernel lacks: soft-capped scores (Gemma 2) and sinks (gpt-oss).

    Online softmax over key blocks of `KEY_BLOCK`, one block after the other, so that every product has the same inner
    shape however long the sequence is; in float32, whatever the inputs' dtype. A sink is a score that takes part in
    the normalisation and has no value.
    """
    heads, count, _ = query.shape
    kv_heads, groups = keys.shape[0], heads // keys.shape[0]
    rows = _pad_rows(query.reshape(kv_heads, groups * count, -1)).float()
    mask = context.mask(span, seen, rows.shape[1], groups, rows)
    if sinks is None:
        peak = rows.new_full(rows.shape[:2], float("-inf"))
        total = torch.zeros_like(peak)
    else:
        per_row = sinks.to(rows.dtype).reshape(kv_heads, groups).repeat_interleave(count, dim=1)
        peak = F.pad(per_row, (0, rows.shape[1] - per_row.shape[1]))
        total = torch.ones_like(peak)
    result = rows.new_zeros(kv_heads, rows.shape[1], values.shape[-1])
    for start in range(0, span.padded, KEY_BLOCK):
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
