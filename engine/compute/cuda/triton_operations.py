"""The CUDA path's operations by Triton kernels. Knows tensors and tables; no model, request or graph.

Everything is launched on the current stream of the tensors' device, and only allocates its result, so that a step may
be captured in a CUDA graph. What is prepared once, at the first call, is a table of the cache's tensors and what
Triton compiles: run a step before it is captured.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.compute.backend import AttentionSettings
from engine.compute.cuda.kernels import attention, linear, rows
from engine.compute.cuda.operations import AttentionWork, LinearWeight, NormKind, Partials
from engine.compute.cuda.tiles import Family, family, tile_for
from engine.compute.kv_cache import LayerShape

__all__ = ["TritonOperations"]

PROGRAMS_PER_PROCESSOR = 4
"""Programs of attention for each multiprocessor: several of them hide each other's waits for memory."""
_INTERPRETED = 2
"""Programs of attention on a CPU, where Triton interprets the kernels one after the other."""


class TritonOperations:
    """See `engine.compute.cuda.operations.Operations`."""

    def __init__(self) -> None:
        self._caches: dict[tuple[tuple[object, ...], ...], rows.CacheTable] = {}

    @property
    def tile_rows(self) -> tuple[int, int]:
        """Rows of a narrow and of a wide work item's tile; of a larger group of heads, an item has one position."""
        return attention.NARROW, attention.WIDE

    def linear(self, x: Tensor, weight: LinearWeight, out_dtype: torch.dtype) -> Tensor:
        """Multiply with a tile that depends on the GPU's family, the weight and the number of rows; no bit does."""
        numbers = x.dtype.itemsize
        tile = tile_for(_family(x.device), weight.kind, numbers, x.shape[0], weight.out_features, weight.group)
        with _on(x.device):
            return linear.linear(x, weight, out_dtype, tile)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, kind: NormKind) -> Tensor:
        """Normalise rows, or the heads of `[rows, heads, n]`; the result is contiguous."""
        with _on(x.device):
            return rows.rms_norm(x, weight, epsilon, kind)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Activate rows of any stride; the result is contiguous."""
        with _on(gate_up.device):
            return rows.silu_mul(gate_up)

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
        """Write a step's keys and values into the cache, each row by a program of its own."""
        with _on(keys.device):
            rows.store(key, value, keys, values, slots, num_rows, finite)

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
        """Attend; rows of no work item mean nothing. Tables of no capacity are not launched for."""
        with _on(keys.device):
            programs = _programs(keys.device)
            return attention.attend(query, keys, values, work, partials, shape, settings, programs=programs)

    def copy_blocks(self, tensors: Sequence[Tensor], pairs: Tensor, num_pairs: Tensor) -> None:
        """Copy blocks of all tensors in one launch. They are on one device, as the pairs are, and outlive this."""
        cache = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)
        with _on(pairs.device):
            if cache not in self._caches:
                self._caches[cache] = rows.CacheTable(tensors)
            rows.copy_blocks(self._caches[cache], pairs, num_pairs)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a device current: Triton launches on the current one, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _family(device: torch.device) -> Family:
    """Return whose tiles are used; on a CPU, where Triton interprets the kernels, those of any GPU."""
    found = family(torch.cuda.get_device_capability(device)) if device.type == "cuda" else "ampere"
    assert found is not None, f"no tiles for {device}"
    return found


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
