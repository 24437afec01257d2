"""Computes steps on a GPU: inputs sent with one transfer, rows padded to few sizes, each size a CUDA graph.

Padding rows write nothing and belong to no sequence. By the law they change no bit of the others.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence as Seq
from typing import Any, Final

import torch
from torch import Tensor, nn

from engine.compute.attention import attention_through, blank_mask
from engine.compute.backend import AttentionSettings, Backend, PackedChunk, StepSize
from engine.compute.cuda.operations import Operations
from engine.compute.cuda.steps.buffers import StepBuffers, StepViews, kind_of
from engine.compute.cuda.steps.graphs import Graph, NotCapturable, Recorder, buckets, smallest
from engine.compute.cuda.steps.lookahead import CudaLookahead
from engine.compute.cuda.steps.tables import AttentionKind, Limits, StepTables
from engine.compute.discovery import input_device
from engine.compute.kv_cache import KVCache
from engine.compute.model_runner import ForwardResult, PackedStep
from engine.scheduling.block_pool import BLOCK_SIZE
from engine.scheduling.schedule import Schedule

__all__ = ["CudaPlan", "CudaRunner"]

log = logging.getLogger("verbatim.engine")

_MOST_WARMED: Final = 128
"""Rows of logits that are computed once before a model serves: more take the same kernels."""
_SPARE_ROWS: Final = 8
"""Rows beside those of a step, for bystanders of the self-test."""


class CudaPlan:
    """A step's attention over tables in device memory (see `engine.compute.backend.StepPlan`)."""

    def __init__(self, operations: Operations, cache: KVCache, buffers: StepBuffers, views: StepViews) -> None:
        self._operations, self._cache, self._buffers, self.views = operations, cache, buffers, views
        self.adapter_rows: Mapping[str, Tensor] = {}  # none: adapters are refused here at load

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Store the step's keys and values, then attend."""
        views, shape = self.views, self._cache.layers[layer]
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        self._operations.store(key, value, keys, values, views.slots, views.num_rows, views.finite)
        work = views.work[kind_of(shape, settings.heads // shape.heads)]
        partials = self._buffers.partials(settings, shape)
        return self._operations.attend(query, keys, values, work, partials, shape, settings)

    def finite(self) -> Tensor:
        """Return which rows' keys and values were finite: `[rows] bool`, on the device."""
        return self.views.finite.bool()


def kinds_of(cache: KVCache) -> list[AttentionKind]:
    """List the kinds of a cache's layers, each once."""
    return list(dict.fromkeys(kind_of(shape, shape.groups) for shape in cache.layers))


def plan_once(operations: Operations, cache: KVCache, chunks: Seq[PackedChunk]) -> CudaPlan:
    """Plan a single step with buffers of its own, for trials of attention alone."""
    rows = sum(chunk.count for chunk in chunks)
    length = max(chunk.start + chunk.count for chunk in chunks)
    limits = Limits(rows, len(chunks), length, operations.tile_rows)
    device, kinds = cache.layers[0].device, kinds_of(cache)
    buffers = StepBuffers(cache.layers, kinds, limits, device)
    buffers.send([], [], [], StepTables.of(chunks, kinds, limits), rows=rows)
    return CudaPlan(operations, cache, buffers, buffers.views(rows, rows))


class CudaRunner:
    """Computes all sequences of a step in one pass over the block cache (see `engine.compute.model_runner.Runner`).

    Attributes:
        graphs: how many sizes of step are recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        operations: Operations,
        cache: KVCache,
        vocab_size: int,
        size: StepSize,
        *,
        skips_masks: bool = True,
        bystanders: Seq[int] = (),
    ) -> None:
        """Serve a model from a cache of plain layout.

        Args:
            skips_masks: the model may be given a mask that it leaves alone (`engine.compute.discovery`). Without one
                transformers asks the device for the shape of the step, so that no step can be recorded.
            bystanders: positions of rows that belong to no sequence and are computed in every step, for the self-test.
        """
        self.vocab_size, self.cache = vocab_size, cache
        self._model, self._backend, self._operations = model, backend, operations
        self._bystanders = list(bystanders)
        self._device = input_device(model)
        kinds = kinds_of(cache)
        limits = Limits(size.rows + _SPARE_ROWS, size.sequences, size.length, operations.tile_rows)
        self._buffers = StepBuffers(cache.layers, kinds, limits, self._device)
        self._sizes = buckets(limits.rows)
        self._most_kept = smallest(self._sizes, min(size.sequences, limits.rows))
        self._graphs: dict[int, Graph] = {}
        self._views: dict[int, StepViews] = {}  # of each size, with as many kept rows as a graph has
        self._mask = {"attention_mask": blank_mask(self._device)} if skips_masks else {}
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.lookahead: CudaLookahead | None = None if bystanders else CudaLookahead(self.compute)

    @property
    def graphs(self) -> int:
        return len(self._graphs)

    @torch.inference_mode()
    def forward(self, schedule: Schedule) -> ForwardResult:
        """Copy the blocks that the schedule names, compute its chunks and store their keys and values."""
        step = PackedStep.of(schedule)
        found = self.lookahead.take(schedule) if self.lookahead is not None else None
        logits, finite = self.compute(step, schedule.copies) if found is None else found
        return ForwardResult(logits, step.told(finite))

    def compute(
        self, step: PackedStep, copies: Seq[tuple[int, int]] = (), tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Launch a step.

        Args:
            tokens: `[rows] int64`, on the device: of the step's rows, in place of those that the step names.

        Returns:
            Logits of the kept rows, `[kept, vocab] float32`, and which rows are finite, `[rows] int32`: not those of
            any later step.
        """
        rows, kept = len(step.tokens), len(step.kept)
        size = smallest(self._sizes, rows + len(self._bystanders))
        self._send(step, copies, size)
        graph = self._graphs.get(size) if kept <= self._kept_of(size) and not self._bystanders else None
        views = self._views_of(size, max(kept, 1) if graph is None else self._kept_of(size))
        if tokens is not None:
            views.tokens[0, :rows].copy_(tokens)
        if graph is None:
            logits = self._run(views)[:kept]
        else:
            graph.replay()
            logits = graph.output[:kept].clone()  # the next replay overwrites it
        return logits, views.finite[:rows].clone()

    def _send(self, step: PackedStep, copies: Seq[tuple[int, int]], size: int) -> None:
        tables = StepTables.of(step.chunks, self._buffers.kinds, self._buffers.limits)
        most = self._buffers.most_pairs
        for start in range(0, len(copies) - most, most):  # more than usual: in several transfers, in order
            self._buffers.send([], [], [], tables, copies[start : start + most], rows=0)
            self._operations.copy_blocks([*self.cache.keys, *self.cache.values], *self._buffers.pairs)
        rest = copies[(len(copies) - 1) // most * most :] if copies else ()
        positions = [*step.positions, *self._bystanders]
        self._buffers.send(step.tokens, positions, step.kept, tables, rest, rows=size)
        if rest:
            self._operations.copy_blocks([*self.cache.keys, *self.cache.values], *self._buffers.pairs)

    def _run(self, views: StepViews) -> Tensor:
        """Launch a forward pass over a step that was sent. Returns `[kept, vocab] float32`."""
        views.finite.fill_(1)
        plan = CudaPlan(self._operations, self.cache, self._buffers, views)
        arguments: dict[str, Any] = {"logits_to_keep": views.kept} if self._keeps else {}
        with attention_through(plan):
            output = self._model(
                views.tokens,
                **self._mask,
                position_ids=views.positions,
                use_cache=False,
                **arguments,
            )
        logits: Tensor = output.logits[0] if self._keeps else output.logits[0].index_select(0, views.kept)
        return logits.to(torch.float32)

    def _kept_of(self, size: int) -> int:
        return min(size, self._most_kept)

    def _views_of(self, size: int, kept: int) -> StepViews:
        if kept != self._kept_of(size):
            return self._buffers.views(size, kept)
        if size not in self._views:
            self._views[size] = self._buffers.views(size, kept)
        return self._views[size]

    @torch.inference_mode()
    def warm(self) -> None:
        """Launch what a step may need, so that no kernel is compiled while requests wait.

        Copies of blocks, and the output layer for as many rows as have a tile of their own.
        """
        self._send(self._trial(1, 0), (), 1)
        self._operations.copy_blocks([*self.cache.keys, *self.cache.values], *self._buffers.pairs)
        for size in self._sizes:
            if size <= _MOST_WARMED:
                self._send(self._trial(size, 0), (), size)
                self._run(self._views_of(size, size))

    # -- graphs -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def record(self, recorder: Recorder, most: int | None = None) -> str | None:
        """Record every size of step, the largest first: the others fit into its memory.

        Each is tried with other steps than it was recorded with. The cache must hold nothing that is needed.

        Args:
            most: larger sizes are left out; None: none is.

        Returns:
            None; or why steps cannot be recorded, and then none is.
        """
        try:
            for size in reversed([size for size in self._sizes if most is None or size <= most]):
                self._graphs[size] = self._recorded(size, recorder)
        except NotCapturable as error:
            self._graphs.clear()
            return str(error)
        return None

    def _recorded(self, size: int, recorder: Recorder) -> Graph:
        views = self._views_of(size, self._kept_of(size))
        self._send(self._trial(size, 0), (), size)
        graph = recorder.record(lambda: self._run(views))
        for number in (1, 2):
            self._send(self._trial(size, number), (), size)
            right = self._run(views).clone()
            graph.replay()
            if not torch.equal(graph.output, right):
                raise NotCapturable(f"a replayed step of {size} rows differs from the same step launched anew")
        return graph

    def _trial(self, size: int, number: int) -> PackedStep:
        """Make a step of `size` rows at most, another one for each number: decodes, and a chunk for what is left.

        No two sequences share a block, since they would overwrite each other in any order.
        """
        limits, free = self._buffers.limits, list(range(self.cache.num_blocks))
        step = PackedStep([], [], [], [], [])
        left = max(size - number, 1)
        sequences = min(limits.sequences, left)
        for index in range(sequences):
            last = index == sequences - 1
            room = min(len(free) * BLOCK_SIZE, limits.length)
            if not room:
                break  # a small cache
            start = min((5, 40, 300, 700)[(index + number) % 4] + 3 * number, room - 1)
            count = min(left, room - start) if last else 1
            needed = -(-(start + count) // BLOCK_SIZE)
            table, free = tuple(free[:needed]), free[needed:]
            step.add([(31 * index + 7 * row + number) % self.vocab_size for row in range(count)], start, table, 1)
            left -= count
        return step

    def forget(self, sequence: Any) -> None:
        """Do nothing: the pool owns the blocks."""

    def release_memory(self, *, again: bool = False) -> bool:
        """Give freed memory back to the device; if that was not enough, drop the graphs, whose memory nobody else uses.

        Another model of this process may have been about to give memory back, or capturing, when torch may not.
        """
        if self.lookahead is not None:
            self.lookahead.drop()
        helps = not again or bool(self._graphs)
        if again and self._graphs:
            log.warning("memory is short: steps are launched one by one from here on, not as graphs")
            self._graphs.clear()
        self._backend.release_memory()
        return helps
