"""The key and value tensors behind the blocks. Knows slots and layers; nothing of sequences, requests or sharing.

A slot holds one token: block b holds slots `b·BLOCK_SIZE … (b+1)·BLOCK_SIZE − 1`. Keys and values are laid out `[heads,
slots, dim]`, so that consecutive slots of one head are consecutive in memory and a run of consecutive blocks is read as
a view. A backend may lay out the inside of a block in another way. Everything is finite at all times (allocated as
zeros, only finite values are written): a masked slot then contributes an exact zero, whatever it holds.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compute.attention_mask import ALL_BEFORE, KeyRange
from engine.scheduling.block_pool import BLOCK_SIZE

KEY_BLOCK = 512
"""Attention reads keys in spans of a multiple of this many slots.

The key block of torch's CPU attention kernel: with it, a row's bits do not depend on how many keys lie behind its own.
"""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores per token, and which stored keys a token sees."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    seen: KeyRange = ALL_BEFORE
    groups: int = 1
    """Query heads that share a key head."""

    @property
    def bytes_per_token(self) -> int:
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Run:
    """A range of consecutive slots."""

    start: int
    length: int


def runs_of(table: Sequence[int], length: int) -> tuple[Run, ...]:
    """Return the slots of a block table's first `length` tokens, consecutive blocks joined."""
    runs: list[Run] = []
    left = length
    for block in table:
        if left <= 0:
            break
        start, count = block * BLOCK_SIZE, min(BLOCK_SIZE, left)
        if runs and runs[-1].start + runs[-1].length == start:
            runs[-1] = Run(runs[-1].start, runs[-1].length + count)
        else:
            runs.append(Run(start, count))
        left -= count
    assert left <= 0, "the table does not cover the tokens"
    return tuple(runs)


class KVCache:
    """Keys and values of every layer, in plain layout.

    Attributes:
        keys: per layer `[heads, slots + KEY_BLOCK, key_dim]`.
        values: per layer `[heads, slots + KEY_BLOCK, value_dim]`.
    """

    def __init__(self, layers: Sequence[LayerShape], num_blocks: int) -> None:
        self.layers = tuple(layers)
        self.num_blocks = num_blocks
        # A padded view may run past the last block by up to one span.
        slots = num_blocks * BLOCK_SIZE + KEY_BLOCK
        self.keys = [_zeros((s.heads, slots, s.key_dim), s) for s in layers]
        self.values = [_zeros((s.heads, slots, s.value_dim), s) for s in layers]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, in order: a later pair may read what an earlier one wrote."""
        for source, target in pairs:
            if source == target:
                continue
            here, there = (slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE) for block in (source, target))
            for tensor in (*self.keys, *self.values):
                tensor[:, there] = tensor[:, here]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys [heads, n, key_dim]` and `values [heads, n, value_dim]`, all finite, at `slots [n] int64`."""
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)


def _zeros(shape: tuple[int, int, int], layer: LayerShape) -> Tensor:
    """Allocate zeros; on a CPU from fresh anonymous memory, whose pages cost nothing until they are first written.

    `torch.zeros` writes them all: an unused cache would take its full size at once.
    """
    if layer.device.type != "cpu":
        return torch.zeros(shape, dtype=layer.dtype, device=layer.device)
    memory = mmap.mmap(-1, math.prod(shape) * layer.dtype.itemsize)
    return torch.frombuffer(memory, dtype=layer.dtype).view(shape)


def gather(pool: Tensor, runs: Sequence[Run], padded: int) -> Tensor:
    """Read runs of `pool [heads, slots, dim]`, padded with the slots behind the last: `[heads, padded, dim]`.

    One run is a view; several are gathered into a copy.
    """
    if len(runs) == 1:
        return pool[:, runs[0].start : runs[0].start + padded]
    parts = [pool[:, r.start : r.start + r.length] for r in runs]
    missing = padded - sum(r.length for r in runs)
    if missing:
        end = runs[-1].start + runs[-1].length
        parts.append(pool[:, end : end + missing])
    return torch.cat(parts, dim=1)
