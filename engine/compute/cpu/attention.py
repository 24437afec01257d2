"""The cache and the step plan of the CPU backend: attention by a compiled kernel where there is one, else by torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.compute.backend import AttentionSettings, PackedChunk
from engine.compute.cpu.attention_plan import AttentionPlan
from engine.compute.cpu.kernels import Kernels
from engine.compute.kv_cache import KVCache, LayerShape
from engine.compute.torch_attention import TorchPlan
from engine.scheduling.block_pool import BLOCK_SIZE


class CpuCache(KVCache):
    """A cache in which the attention kernel's layers have each block's keys transposed, `[key_dim, BLOCK_SIZE]`.

    Attributes:
        native: by layer, whether the kernel serves it; the others have the plain layout.
        all_native: whether it serves all of them.
    """

    def __init__(self, layers: Sequence[LayerShape], num_blocks: int, kernels: Kernels) -> None:
        super().__init__(layers, num_blocks)
        self.native = tuple(_is_native(shape, kernels) for shape in layers)
        self.all_native = all(self.native)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values as `KVCache.write` does, in the layer's own layout."""
        if not self.native[layer]:
            super().write(layer, slots, keys, values)
            return
        heads, _, dim = keys.shape
        blocks = self.keys[layer].view(heads, -1, dim, BLOCK_SIZE)
        blocks[:, slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = keys.transpose(0, 1)
        self.values[layer].index_copy_(1, slots, values)


class CpuPlan:
    """A step's attention by the kernel, and by torch for layers that it does not serve.

    Attributes:
        computed: what layers that are one call have computed (`engine.compute.cpu.layers.stack`).
    """

    computed: Any = None

    def __init__(self, kernels: Kernels, cache: CpuCache, chunks: Sequence[PackedChunk]) -> None:
        self.cache = cache
        self._kernels = kernels
        self._torch = TorchPlan(cache, chunks)
        self.adapter_rows = self._torch.adapter_rows
        parts = [(chunk.row, chunk.count, chunk.start, chunk.table) for chunk in chunks]
        self.kernel_plan = AttentionPlan(parts, self._torch.slots)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Store the step's keys and values, then attend: see `engine.compute.backend.StepPlan`."""
        cache = self.cache
        if not cache.native[layer]:
            return self._torch.attend(layer, query, key, value, settings)
        seen, sinks = cache.layers[layer].seen, settings.sinks
        return self._kernels.attend(
            self.kernel_plan,
            query,
            key,
            value,
            cache.keys[layer],
            cache.values[layer],
            scale=settings.scale,
            window=seen.window,
            chunk=seen.chunk,
            softcap=settings.softcap,
            sinks=None if sinks is None else sinks.to(torch.float32).contiguous(),
        )

    def begin_again(self) -> None:
        """Forget what the step has computed: all its keys and values are about to be stored again."""
        self.computed = None
        self.kernel_plan.finite.fill_(True)

    def finite(self) -> Tensor:
        """Return which rows' keys and values were finite in all layers: `[rows] bool`."""
        return self.kernel_plan.finite & self._torch.finite()


def _is_native(shape: LayerShape, kernels: Kernels) -> bool:
    fits = shape.dtype == torch.float32 and shape.device.type == "cpu"
    return fits and kernels.can_attend(shape.key_dim, shape.value_dim)
