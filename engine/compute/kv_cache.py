"""The tensors behind the blocks. Knows slots and layers; nothing of sequences, requests or who may read what.

A slot is one token's place: block b holds slots `b·block_size … (b+1)·block_size − 1`. Keys and values are laid out
`[heads, slots, dim]`, so that consecutive slots of one head are consecutive in memory and a run of consecutive blocks
is read as a view; where the native attention kernel serves a layer, each block's keys lie transposed, `[dim, 16]`, and
the kernel reads and writes them itself. Everything is finite at all times (zeroed at birth, only finite values are
written): a masked slot then contributes an exact zero, whatever it holds.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compute.attention_mask import ALL_BEFORE, KeyRange
from engine.compute.cpu.kernels import Kernels
from engine.scheduling.block_pool import BLOCK_SIZE

KEY_BLOCK = 512
"""Attention reads keys in spans of a multiple of this many slots.

The key block of torch's CPU attention kernel: with it, a row's bits do not depend on how many keys lie behind its own.
"""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores per token, and which of it a token sees."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    seen: KeyRange = ALL_BEFORE

    @property
    def bytes_per_token(self) -> int:
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive slots."""

    start: int
    length: int


def runs_of(table: Sequence[int], block_size: int, length: int) -> tuple[Run, ...]:
    """The slots of a table's first `length` tokens, consecutive blocks joined."""
    runs: list[Run] = []
    left = length
    for block in table:
        if left <= 0:
            break
        start, count = block * block_size, min(block_size, left)
        if runs and runs[-1].start + runs[-1].length == start:
            runs[-1] = Run(runs[-1].start, runs[-1].length + count)
        else:
            runs.append(Run(start, count))
        left -= count
    assert left <= 0, "the table does not cover the tokens"
    return tuple(runs)


class KVCache:
    """Keys and values of every layer.

    Attributes:
        keys: per layer `[heads, slots + KEY_BLOCK, key_dim]`.
        values: per layer `[heads, slots + KEY_BLOCK, value_dim]`.
        kernels: what serves the layers of which `native` is True; for the others there are `write` and `read`.
    """

    def __init__(
        self, layers: Sequence[LayerShape], num_blocks: int, block_size: int, kernels: Kernels | None = None
    ) -> None:
        self.layers = tuple(layers)
        self.block_size = block_size
        self.num_blocks = num_blocks
        # A padded view may run past the last block by up to one span.
        slots = num_blocks * block_size + KEY_BLOCK
        self.kernels = kernels
        self.native = tuple(kernels is not None and _is_native(s, block_size, kernels) for s in layers)
        self.keys = [_zeros((s.heads, slots, s.key_dim), s) for s in layers]
        self.values = [_zeros((s.heads, slots, s.value_dim), s) for s in layers]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, in order: a later pair may read what an earlier one wrote."""
        size = self.block_size
        for source, target in pairs:
            if source == target:
                continue
            for tensor in (*self.keys, *self.values):
                tensor[:, target * size : (target + 1) * size] = tensor[:, source * size : (source + 1) * size]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys [heads, n, key_dim]` and `values [heads, n, value_dim]`, all finite, at `slots [n] int64`."""
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)

    def read(self, layer: int, runs: Sequence[Run], padded: int) -> tuple[Tensor, Tensor]:
        """Keys `[heads, padded, key_dim]` and values of some runs, then of whatever lies behind, up to `padded`.

        One run is a view; several are gathered into a copy.
        """
        return _gather(self.keys[layer], runs, padded), _gather(self.values[layer], runs, padded)


def _is_native(shape: LayerShape, block_size: int, kernels: Kernels) -> bool:
    fits = shape.dtype == torch.float32 and shape.device.type == "cpu" and block_size == BLOCK_SIZE
    return fits and kernels.can_attend(shape.key_dim, shape.value_dim)


def _zeros(shape: tuple[int, int, int], layer: LayerShape) -> Tensor:
    """Zeros; on a CPU from fresh anonymous memory, whose pages cost nothing until they are first written.

    `torch.zeros` writes them all: an unused cache would take its full size at once.
    """
    if layer.device.type != "cpu":
        return torch.zeros(shape, dtype=layer.dtype, device=layer.device)
    memory = mmap.mmap(-1, math.prod(shape) * layer.dtype.itemsize)
    return torch.frombuffer(memory, dtype=layer.dtype).view(shape)


def _gather(pool: Tensor, runs: Sequence[Run], padded: int) -> Tensor:
    if len(runs) == 1:
        return pool[:, runs[0].start : runs[0].start + padded]
    parts = [pool[:, r.start : r.start + r.length] for r in runs]
    missing = padded - sum(r.length for r in runs)
    if missing:
        end = runs[-1].start + runs[-1].length
        parts.append(pool[:, end : end + missing])
    return torch.cat(parts, dim=1)
