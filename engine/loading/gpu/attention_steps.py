"""Try the attention of the CUDA path: the same tokens computed in every way that a scheduler may cut them into steps.

A prompt whole, in chunks, beside another sequence, token by token and as a draft: each row must have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.compute.attention_mask import KeyRange
from engine.compute.backend import AttentionSettings, PackedChunk
from engine.compute.cuda.operations import AttentionWork, Operations, Partials
from engine.compute.cuda.steps.tables import ITEM, MERGE, AttentionKind, Limits, StepTables
from engine.compute.kv_cache import LayerShape
from engine.loading.gpu.kernel_trials import Sizes, expect_near, expect_same, numbers
from engine.scheduling.block_pool import BLOCK_SIZE

__all__ = ["Step", "StepTrial", "attention"]

_KV_HEADS = 2
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Allowed difference to float64, as a share of the largest value."""


def attention(operations: Operations, device: torch.device, sizes: Sizes) -> None:
    """Try full attention, windows, chunks of keys, soft-capped scores and sinks; other sizes and dtypes in one way.

    Every combination is three kernels to compile, so not all are tried.
    """
    for dtype in sizes.dtypes:
        for dim in sizes.head_dims:
            for groups in sizes.groups:
                main = dtype == sizes.dtypes[0] and dim == sizes.head_dims[-1] and groups == sizes.groups[-1]
                if not main and (dtype, dim) != (sizes.dtypes[0], sizes.head_dims[0]) and groups != sizes.groups[0]:
                    continue
                for seen, settings in _ways(groups, dim, sizes, device)[: None if main else 1]:
                    shape = LayerShape(_KV_HEADS, dim, dim, dtype, device, seen)
                    StepTrial(operations, shape, settings, sizes).run()


def _ways(groups: int, dim: int, sizes: Sizes, device: torch.device) -> list[tuple[KeyRange, AttentionSettings]]:
    """List which keys are seen, and what is special about the scores; the plain way first."""
    heads, scale = _KV_HEADS * groups, dim**-0.5
    sinks = numbers((heads,), torch.float32, device, 11)
    return [
        (KeyRange(), AttentionSettings(heads, scale)),
        (KeyRange(window=sizes.keys // 3), AttentionSettings(heads, scale, 30.0)),
        (KeyRange(window=100), AttentionSettings(heads, scale, None, sinks)),
        (KeyRange(chunk=128), AttentionSettings(heads, scale)),
    ]


@dataclass(eq=False)
class StepTrial:
    """Two sequences in one cache, their blocks interleaved and out of order."""

    operations: Operations
    shape: LayerShape
    settings: AttentionSettings
    sizes: Sizes
    tables: list[tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        shape, keys = self.shape, self.sizes.keys
        each = -(-keys // BLOCK_SIZE)
        self.tables = [tuple(2 * each - 1 - 2 * i for i in range(each)), tuple(2 * i for i in range(each))]
        slots = 2 * each * BLOCK_SIZE
        self.query = numbers((self.settings.heads, keys, shape.key_dim), shape.dtype, shape.device, 1) * 4
        self.keys = numbers((shape.heads, slots, shape.key_dim), shape.dtype, shape.device, 2)
        self.values = numbers((shape.heads, slots, shape.value_dim), shape.dtype, shape.device, 3)

    def run(self) -> None:
        """Compute all tokens in one step and compare with float64; then in other steps, and compare bits."""
        keys, piece = self.sizes.keys, self.sizes.piece
        what = f"attention over {keys} keys ({self.shape.seen.describe()})"
        what += f", {self.settings.heads} heads of {self.shape.key_dim} {self.shape.dtype}".replace("torch.", "")
        whole = self._compute([(0, 0, keys)])
        right = self._exact()
        allowed = torch.full_like(right, _TOLERANCE[self.shape.dtype] * float(right.abs().max()))
        expect_near(what, whole, right, allowed)
        pieces = [self._compute([(0, start, min(piece, keys - start))]) for start in range(0, keys, piece)]
        expect_same(f"{what}, in chunks of {piece}", torch.cat(pieces), whole)
        ends = sorted({0, 15, 16, 63, 64, 127, 255, 256, keys // 2, keys - 1} & set(range(keys)))
        alone = torch.cat([self._compute([(0, position, 1)]) for position in ends])
        expect_same(f"{what}, token by token", alone, whole[ends])
        draft = self._compute([(0, keys - 6, 5)])
        expect_same(f"{what}, as a draft", draft, whole[keys - 6 : keys - 1])
        mixed = self._compute([(0, keys - 1, 1), (1, 3, piece), (0, keys - 4, 3)])
        expect_same(f"{what}, beside another sequence", mixed[:1], whole[-1:])
        expect_same(f"{what}, behind another sequence", mixed[-3:], whole[keys - 4 : keys - 1])
        expect_same(f"{what}, of that sequence", mixed[1:-3], self._compute([(1, 3, piece)]))

    def _compute(self, parts: Sequence[tuple[int, int, int]]) -> Tensor:
        """Compute `(sequence, start, count)` side by side in one step: `[rows, heads, value_dim]`."""
        chunks, row = [], 0
        for sequence, start, count in parts:
            chunks.append(PackedChunk(row, count, start, self.tables[sequence]))
            row += count
        query = torch.cat([self.query[:, start : start + count] for _, start, count in parts], dim=1)
        step = Step.of(self.operations, chunks, self.shape, self.settings, self.sizes.keys)
        found = self.operations.attend(
            query, self.keys, self.values, step.work, step.partials, self.shape, self.settings
        )
        return found[:row].clone()

    def _exact(self) -> Tensor:
        """Compute the first sequence in float64, straight from the formula."""
        settings, device, count = self.settings, self.shape.device, self.sizes.keys
        slots = torch.tensor(PackedChunk(0, count, 0, self.tables[0]).slots(), dtype=torch.int64, device=device)
        repeat = settings.heads // self.shape.heads
        key, value = (pool[:, slots].double().repeat_interleave(repeat, 0) for pool in (self.keys, self.values))
        scores = self.query.double() @ key.transpose(1, 2) * settings.scale
        if settings.softcap:
            scores = settings.softcap * torch.tanh(scores / settings.softcap)
        rows, at = torch.arange(count, device=device)[:, None], torch.arange(count, device=device)[None]
        scores = scores.masked_fill((at > rows) | (at < self.shape.seen.first(rows)), float("-inf"))
        if settings.sinks is not None:
            sinks = settings.sinks.double()[:, None, None].expand(-1, count, 1)
            scores = torch.cat([scores, sinks], -1)
        weights = scores.softmax(-1)[..., :count]
        return (weights @ value).transpose(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The tables of one step on a device, and room for its partial results."""

    work: AttentionWork
    partials: Partials

    @classmethod
    def of(
        cls,
        operations: Operations,
        chunks: Sequence[PackedChunk],
        shape: LayerShape,
        settings: AttentionSettings,
        length: int,
    ) -> Step:
        """Plan a step. `length`: of the longest sequence."""
        kind = AttentionKind(settings.heads // shape.heads, shape.seen.window, shape.seen.chunk)
        rows = sum(chunk.count for chunk in chunks)
        limits = Limits(rows, len(chunks), length, operations.tile_rows)
        tables = StepTables.of(chunks, [kind], limits)
        [mine] = tables.kinds

        def table(data: Sequence[int], columns: int) -> Tensor:
            whole = torch.tensor([*data, *[0] * columns], dtype=torch.int32)  # a line of capacity behind the last
            return whole.view(-1, columns).to(shape.device)

        counts, blocks = table(mine.counts, 1).flatten()[:3], table(tables.blocks, 1).flatten()
        work = AttentionWork(
            table(mine.narrow, ITEM), table(mine.wide, ITEM), table(mine.merges, MERGE), counts, blocks
        )
        slots, heads = max(mine.partials, 1), settings.heads
        peaks = torch.full((2, slots, heads), float("nan"), dtype=torch.float32, device=shape.device)
        sums = torch.full((slots, heads, shape.value_dim), float("nan"), dtype=torch.float32, device=shape.device)
        return cls(work, Partials(sums, peaks[0], peaks[1]))
