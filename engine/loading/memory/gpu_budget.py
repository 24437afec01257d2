"""Divide the memory of a model's GPUs: weights, what a step needs, and the cache in the rest. Knows no model.

    room for the cache = 94 % of the GPU − what others and their steps take
                         − weights − activations − 1.1 · graphs − 256 MiB

Activations and graphs are measured, by running the largest step. Another process may take memory meanwhile: if the
cache cannot be allocated, it is tried with 7/8 of its blocks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from engine.compute.kv_cache import LayerShape
from engine.config import ModelConfig
from engine.devices.gpu import DeviceMemory
from engine.errors import NotEnoughMemory, first_line, out_of_memory
from engine.loading.memory.cache_size import CacheSize, check_least, per_token_on_each

__all__ = ["GpuBudget", "MemoryUse"]

log = logging.getLogger("verbatim.engine")

_SHARE = 0.94
"""Of a GPU's memory; the driver and other processes, such as a desktop's, take some at any time."""
_MARGIN = 256 * 2**20
"""For what is allocated outside torch: kernels that are loaded later, and workspaces of a second thread."""
_GRAPHS = 1.1
"""Graphs are measured all together, over a small cache; the allocator may cut the same memory another way."""
_TRIES = 6

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What the memory of one GPU is taken by, in bytes.

    Attributes:
        others: other models and other processes, CUDA's own included.
    """

    total: int
    weights: int
    activations: int
    graphs: int
    cache: int
    tokens: int
    """How many tokens the cache holds."""

    others: int

    def describe(self) -> str:
        """Write it in one line: `24.0 GiB: weights 15.3, cache 6.1 (50,000 tokens), activations 0.5, free 2.1`."""
        free = self.total - self.weights - self.activations - self.graphs - self.cache - self.others
        parts = [
            f"weights {_gib(self.weights)}",
            f"cache {_gib(self.cache)} ({self.tokens:,} tokens)" if self.cache else "",
            f"activations {_gib(self.activations)}" if self.activations else "",
            f"graphs {_gib(self.graphs)}" if self.graphs else "",
            f"others {_gib(self.others)}" if self.others else "",
            f"free {_gib(free)}",
        ]
        return f"{_gib(self.total)} GiB: {', '.join(part for part in parts if part)}"


class GpuBudget:
    """The memory of the GPUs that one model is computed on. Without a GPU it is empty, and does nothing.

    Attributes:
        activations: bytes that the largest step takes beside weights and cache, by device; set by `measure`.
        graphs: bytes that a captured step keeps, by device.
    """

    def __init__(self, gpus: Sequence[DeviceMemory], beside: Iterable[Mapping[torch.device, int]] = ()) -> None:
        """Take note of what other models hold. To be made before the weights are read.

        Args:
            beside: what a step of each other model of this process takes, by device. It looks free between steps.
        """
        self.gpus = tuple(gpus)
        self._beside = Counter[torch.device]()
        for steps in beside:
            self._beside.update(steps)
        self.activations: dict[torch.device, int] = {}
        self.graphs: dict[torch.device, int] = {}
        self._before = {gpu.device: gpu.allocated() for gpu in self.gpus}
        self._weights: dict[torch.device, int] = {}

    def note_weights(self) -> None:
        """Take everything that was allocated since this budget was made for weights."""
        self._weights = {gpu.device: max(gpu.allocated() - self._before[gpu.device], 0) for gpu in self.gpus}

    def measure(self, step: Callable[[], None], record: Callable[[], object]) -> None:
        """Run the largest step, and note the most memory that it takes on each GPU, and what graphs keep.

        Args:
            step: computes it, with a cache that exists already.
            record: makes a runner that serves, with its graphs if it has any, over a cache as small.
        """
        for gpu in self.gpus:
            gpu.release()
            gpu.forget_peak()
        held = {gpu.device: gpu.held() for gpu in self.gpus}
        step()
        for gpu in self.gpus:
            self.activations[gpu.device] = max(gpu.peak() - held[gpu.device], 0)
            gpu.release()
        held = {gpu.device: gpu.held() for gpu in self.gpus}
        try:
            kept = record()
        except Exception as error:  # as for a cache: what serves is tried with fewer blocks
            if not out_of_memory(error):
                raise
            log.warning("memory ran out while steps were recorded to measure them: %s", first_line(error))
            kept = None
        for gpu in self.gpus:
            gpu.release()
            self.graphs[gpu.device] = max(gpu.held() - held[gpu.device], 0)
        del kept

    def room(self) -> Mapping[torch.device, int]:
        """Return how many bytes the cache may take on each GPU; negative where a step alone does not fit."""
        found = {}
        for gpu in self.gpus:
            gpu.release()
            needed = self.activations.get(gpu.device, 0) + int(_GRAPHS * self.graphs.get(gpu.device, 0))
            needed += self._beside[gpu.device]
            found[gpu.device] = gpu.free() - int(gpu.total() * (1 - _SHARE)) - needed - _MARGIN
        return found

    def allocate(
        self,
        config: ModelConfig,
        size: CacheSize,
        layers: Sequence[LayerShape],
        make: Callable[[CacheSize], Made],
    ) -> tuple[CacheSize, Made]:
        """Make what holds the cache, with fewer blocks where memory runs out.

        Raises:
            NotEnoughMemory: one sequence of the length that the entry asks for does not fit.
        """
        for _ in range(_TRIES):
            try:
                return size, make(size)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                reason = first_line(error)
            for gpu in self.gpus:  # behind the handler: the error held on to what was allocated
                gpu.release()
            smaller = size.of_at_most(size.blocks * 7 // 8)
            log.warning(
                "%s: no memory for a cache of %d tokens (%s): trying %d", config.id, size.tokens, reason, smaller.tokens
            )
            check_least(config, smaller, self._least_room(layers))
            size = smaller
        needed = sum(layer.bytes_per_token for layer in layers) * size.tokens
        free = sum(gpu.free() for gpu in self.gpus)
        raise NotEnoughMemory(f"{config.id}: no memory for a cache of {size.tokens} tokens.", needed=needed, free=free)

    def _least_room(self, layers: Sequence[LayerShape]) -> tuple[int, int]:
        each = per_token_on_each(layers)
        gpu = min((gpu for gpu in self.gpus if gpu.device in each), key=lambda gpu: gpu.free() / each[gpu.device])
        return each[gpu.device], gpu.free()

    def use(self, size: CacheSize, layers: Sequence[LayerShape]) -> list[MemoryUse]:
        """Return what each GPU's memory is taken by, once everything is allocated."""
        each, found = per_token_on_each(layers), []
        for gpu in self.gpus:
            weights, cache = self._weights.get(gpu.device, 0), each.get(gpu.device, 0) * size.tokens
            total, free = gpu.total(), gpu.free()
            found.append(
                MemoryUse(
                    total=total,
                    weights=weights,
                    activations=self.activations.get(gpu.device, 0),
                    graphs=self.graphs.get(gpu.device, 0),
                    cache=cache,
                    tokens=size.tokens,
                    others=max(total - free - weights - cache, 0),
                )
            )
        return found

    def describe(self, size: CacheSize, layers: Sequence[LayerShape]) -> str:
        """Write what the memory is taken by in one line, the GPUs after each other; empty without one."""
        used = self.use(size, layers)
        if len(used) == 1:
            return used[0].describe()
        return "; ".join(f"{gpu.device} {use.describe()}" for gpu, use in zip(self.gpus, used, strict=True))


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
