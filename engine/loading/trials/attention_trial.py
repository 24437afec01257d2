"""Test attention alone, over more keys than the self-test's prompts have. Knows tensors; nothing of models.

Windows and chunks of thousands of tokens, soft-capped scores and sinks are compared with float64 around every border;
and a row must have the same bits whatever the number of rows it is computed with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.compute.attention_mask import KeyRange
from engine.compute.backend import AttentionSettings, Backend, PackedChunk
from engine.compute.kv_cache import KEY_BLOCK, LayerShape
from engine.scheduling.block_pool import BLOCK_SIZE

_FARTHEST = 8192
"""Longer windows and chunks are tried with a thousand tokens: the kernels treat every length alike."""
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Allowed difference to float64, as a share of the largest result."""


@dataclass(frozen=True, slots=True)
class AttentionTrial:
    """A trial of one layer's attention.

    Attributes:
        shape, settings: of a layer; backend: what computes its attention.
    """

    shape: LayerShape
    settings: AttentionSettings
    backend: Backend

    def describe(self) -> str:
        """Describe the trial for people: which keys are seen, and what is special about the scores."""
        special = [("soft-capped scores", self.settings.softcap), ("sinks", self.settings.sinks is not None)]
        return ", ".join([self.shape.seen.describe(), *(name for name, there in special if there)])

    @torch.inference_mode()
    def is_right(self) -> bool:
        """Compare attention with float64, on both sides of each border and far behind."""
        seen = self.shape.seen
        size = seen.window or seen.chunk or 0
        if size > _FARTHEST:
            size, seen = 1000, KeyRange(1000 if seen.window else None, 1000 if seen.chunk else None)
        length = max(2 * KEY_BLOCK, size + size // 2) + 40
        groups = self.settings.heads // self.shape.heads
        one = replace(self.shape, heads=1, seen=seen)
        sinks = None if self.settings.sinks is None else self.settings.sinks[:groups]
        tried = _Tried(one, replace(self.settings, heads=groups, sinks=sinks), length, self.backend)
        tried.store()
        starts = {0, 5, KEY_BLOCK - 2, size - 3, size, 2 * size - 2, length - 17}
        cases = [(start, min(5, length - start)) for start in starts if 0 <= start < length]
        return all(tried.is_right(start, count) for start, count in cases)

    @torch.inference_mode()
    def rows_agree(self) -> bool:
        """Check that rows computed 1, 3, 33 and 200 at a time have equal bits, across two borders of the key span."""
        length = 2 * KEY_BLOCK + 40
        tried = _Tried(self.shape, self.settings, length, self.backend)
        whole = tried.attend(0, length)
        cases = (
            (0, 1),
            (KEY_BLOCK - 1, 1),
            (KEY_BLOCK, 1),
            (KEY_BLOCK - 2, 3),
            (2 * KEY_BLOCK - 17, 33),
            (KEY_BLOCK - 100, 200),
            (length - 1, 1),
        )
        return all(torch.equal(tried.attend(start, count), whole[start : start + count]) for start, count in cases)


class _Tried:
    """A sequence with queries, keys and values of every size and sign, and a cache for it."""

    def __init__(self, shape: LayerShape, settings: AttentionSettings, length: int, backend: Backend) -> None:
        self._shape, self._settings, self._length = shape, settings, length
        self._table = tuple(range(-(-length // BLOCK_SIZE)))
        self._backend, self._cache = backend, backend.allocate([shape], len(self._table))
        self._query = self._numbers(settings.heads, shape.key_dim, 1)
        self._key = self._numbers(shape.heads, shape.key_dim, 2)
        self._value = self._numbers(shape.heads, shape.value_dim, 3)

    def _numbers(self, count: int, dim: int, shift: int) -> Tensor:
        """Make quasi-random `[count, length, dim]`: equal terms would hide another order of summation."""
        index = torch.arange(count * self._length * dim, dtype=torch.float64) * (2 * shift + 1) + shift
        data = index.mul_(0.618033988749).frac_().sub_(0.5).view(count, self._length, dim)
        return data.to(device=self._shape.device, dtype=self._shape.dtype)

    def store(self) -> None:
        """Write all keys and values."""
        self._cache.write(0, torch.arange(self._length, device=self._shape.device), self._key, self._value)

    def attend(self, start: int, count: int) -> Tensor:
        """Compute tokens `start … start + count - 1` over all keys that lie before: `[count, heads, value_dim]`."""
        chunk = PackedChunk(0, count, start, self._table[: -(-(start + count) // BLOCK_SIZE)])
        part = slice(start, start + count)
        plan = self._backend.plan(self._cache, [chunk])
        return plan.attend(0, self._query[:, part], self._key[:, part], self._value[:, part], self._settings)

    def is_right(self, start: int, count: int) -> bool:
        mine = self.attend(start, count).double()
        right = self._exact(start, count)
        bound = _TOLERANCE[self._shape.dtype] * max(float(right.abs().max()), 1e-3)
        return bool((mine - right).abs().max() <= bound)

    def _exact(self, start: int, count: int) -> Tensor:
        """Compute the same in float64, straight from the formula."""
        settings, repeat = self._settings, self._settings.heads // self._shape.heads
        rows = torch.arange(start, start + count)[:, None]
        keys = torch.arange(start + count)[None]
        query, key, value = (t.double().cpu() for t in (self._query, self._key, self._value))
        key, value = (t[:, : start + count].repeat_interleave(repeat, 0) for t in (key, value))
        scores = query[:, start : start + count] @ key.transpose(1, 2) * settings.scale
        if settings.softcap:
            scores = settings.softcap * torch.tanh(scores / settings.softcap)
        scores = scores.masked_fill((keys > rows) | (keys < self._shape.seen.first(rows)), float("-inf"))
        if settings.sinks is not None:
            sinks = settings.sinks.double().cpu()[:, None, None].expand(-1, count, 1)
            scores = torch.cat([scores, sinks], -1)
        weights = scores.softmax(-1)[..., : start + count]
        return (weights @ value).transpose(0, 1).to(self._shape.device)
