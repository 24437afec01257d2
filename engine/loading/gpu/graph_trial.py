"""Try the kernels as only a GPU runs them: with every tile of its table, and replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from engine.compute.backend import AttentionSettings, PackedChunk
from engine.compute.cuda import tiles
from engine.compute.cuda.operations import LinearWeight, Operations
from engine.compute.kv_cache import LayerShape
from engine.loading.gpu.attention_steps import Step
from engine.loading.gpu.kernel_trials import Sizes, Tiled, expect_same, numbers
from engine.scheduling.block_pool import BLOCK_SIZE

__all__ = ["TinyLayer", "replays", "tiled"]

_WIDTH, _HEADS, _KV_HEADS, _ROWS = 256, 4, 2, 16


def tiled(device: torch.device) -> Tiled | None:
    """Return what computes a linear layer with every tile of the card's table; None for a card without one."""
    gpu = tiles.family(torch.cuda.get_device_capability(device))
    if gpu is None:
        return None

    def every(x: Tensor, weight: LinearWeight, out_dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        from engine.compute.cuda.kernels.linear import linear

        with torch.cuda.device(device):
            for tile in tiles.tiles_of(gpu, weight.kind, x.element_size(), weight.group):
                yield str(tile), linear(x, weight, out_dtype, tile)

    return every


class TinyLayer:
    """A norm, a product, attention over the cache, an activation and a product: all kinds of kernels in a row.

    Everything that varies from step to step is in tensors of its own, which `load` fills: a graph reads them again.
    """

    def __init__(self, operations: Operations, device: torch.device, length: int, dtype: torch.dtype) -> None:
        dim = _WIDTH // _HEADS
        self._operations, self._length = operations, length
        self._shape = LayerShape(_KV_HEADS, dim, dim, dtype, device)
        self._settings = AttentionSettings(_HEADS, dim**-0.5)
        blocks = -(-length // BLOCK_SIZE) + 1
        self._table = tuple(reversed(range(blocks)))
        sizes = ((_WIDTH + 2 * _KV_HEADS * dim, _WIDTH), (2 * _WIDTH, _WIDTH), (_WIDTH, _WIDTH))
        self._weights = [LinearWeight(numbers(size, dtype, device, i) / 8) for i, size in enumerate(sizes)]
        self._inputs = numbers((length, _WIDTH), dtype, device, 7)
        self._norm = numbers((_WIDTH,), dtype, device, 9)
        slots = blocks * BLOCK_SIZE
        self.keys = numbers((_KV_HEADS, slots, dim), dtype, device, 4)
        self.values = numbers((_KV_HEADS, slots, dim), dtype, device, 5)
        self.x = torch.zeros(_ROWS, _WIDTH, dtype=dtype, device=device)
        self.finite = torch.ones(_ROWS, dtype=torch.int32, device=device)
        self.rows = torch.zeros(1, dtype=torch.int32, device=device)
        self.slots = torch.zeros(_ROWS, dtype=torch.int64, device=device)
        self._step = self._planned(PackedChunk(0, _ROWS, 0, self._table), capacity=True)

    def load(self, start: int, count: int) -> None:
        """Fill the tensors for a step of tokens `start … start + count - 1`."""
        chunk = PackedChunk(0, count, start, self._table)
        self.x.zero_()
        self.x[:count] = self._inputs[start : start + count]
        self.rows.fill_(count)
        self.slots.zero_()
        self.slots[:count] = torch.tensor(chunk.slots(), dtype=torch.int64, device=self._shape.device)
        given, held = self._planned(chunk).work, self._step.work
        for name in ("narrow", "wide", "merges", "counts", "blocks"):
            held_table, new = getattr(held, name), getattr(given, name)
            held_table[: len(new)] = new

    def run(self) -> Tensor:
        """Compute a step from the tensors: `[rows, width] float32`."""
        ops, shape, dim = self._operations, self._shape, self._shape.key_dim
        hidden = ops.rms_norm(self.x, self._norm, 1e-6, "weight")
        joined = ops.linear(hidden, self._weights[0], shape.dtype).view(_ROWS, -1, dim).transpose(0, 1)
        query, key, value = torch.split(joined, [_HEADS, _KV_HEADS, _KV_HEADS])
        ops.store(key, value, self.keys, self.values, self.slots, self.rows, self.finite)
        seen = ops.attend(query, self.keys, self.values, self._step.work, self._step.partials, shape, self._settings)
        wide = ops.linear(seen.reshape(_ROWS, _WIDTH), self._weights[1], shape.dtype)
        return ops.linear(ops.silu_mul(wide), self._weights[2], torch.float32)

    def _planned(self, chunk: PackedChunk, *, capacity: bool = False) -> Step:
        step = Step.of(self._operations, [chunk], self._shape, self._settings, self._length)
        if not capacity:
            return step
        most = -(-self._length // BLOCK_SIZE) * _ROWS

        def roomy(table: Tensor) -> Tensor:
            return torch.zeros(most, *table.shape[1:], dtype=table.dtype, device=table.device)

        work = replace(
            step.work, **{name: roomy(getattr(step.work, name)) for name in ("narrow", "wide", "merges", "blocks")}
        )
        partials = replace(
            step.partials, **{name: roomy(getattr(step.partials, name)) for name in ("sums", "peaks", "totals")}
        )
        return Step(work, partials)


def replays(operations: Operations, device: torch.device, sizes: Sizes) -> None:
    """Capture one step in a CUDA graph, replay it with other steps, and compare every bit with launches one by one."""
    steps = ((0, _ROWS), (sizes.keys - 20, 3), (sizes.keys // 2, _ROWS), (sizes.keys - 1, 1))
    for dtype in sizes.dtypes[:1]:
        eager, captured = (TinyLayer(operations, device, sizes.keys, dtype) for _ in range(2))
        with torch.inference_mode(), torch.cuda.device(device):
            right = {step: _run(eager, step) for step in steps}
            graph, result = _capture(captured, steps[0])
            for start, count in steps:
                captured.load(start, count)
                graph.replay()
                what = f"a CUDA graph of {_ROWS} rows, {count} of them in use from position {start} on"
                expect_same(what, result[:count], right[start, count])
            expect_same("the cache after a CUDA graph", captured.keys, eager.keys)
            expect_same("the cache after a CUDA graph", captured.values, eager.values)


def _run(layer: TinyLayer, step: tuple[int, int]) -> Tensor:
    layer.load(*step)
    return layer.run()[: step[1]].clone()


def _capture(layer: TinyLayer, step: tuple[int, int]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Run a step twice, so that everything is compiled, then capture it."""
    layer.load(*step)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = layer.run()
    return graph, result
