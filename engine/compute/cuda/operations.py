"""What the CUDA path computes with, as an interface. Knows tensors and tables; no model, request or graph.

`engine.compute.cuda.triton_operations` are the kernels. `engine.compute.cuda.reference` computes the same by torch, in
the same order, for tests without a GPU. Every operation treats each row by itself: its bits depend neither on the
number of rows nor on its place among them. None reads a number back from the device or allocates on the host, so that
a step may be captured in a CUDA graph: how much there is to do stands in device memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.compute.backend import AttentionSettings
from engine.compute.kv_cache import LayerShape

__all__ = ["AttentionWork", "LinearWeight", "NormKind", "Operations", "Partials"]

NormKind = Literal["weight", "one plus weight"]
"""How an RMS norm scales: `round(x / rms) * weight`, as Llama's does (the normed number is rounded to the dtype before
it is scaled), or `round(x / rms * (1 + weight))`, as Gemma's does (all in float32, rounded once)."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearWeight:
    """The weight of a linear layer, in the form that the kernel reads.

    Attributes:
        data: `exact`: `[out, in]` bfloat16, float16 or float32. `int8`: `[out, in] int8`. `int4`: `[out, in / 2]
            uint8`, two numbers a byte, see `engine.compute.cuda.weights`.
        kind: how the numbers are stored.
        scale: None for `exact`; `int8`: `[out] float32`; `int4`: `[out, in / group] float32`.
        bias: `[out]`, or None.
        zeros: `int4`: `[out, in / group] uint8`, what stands for 0 in a group, 0 to 15; None where it is always 8.
    """

    data: Tensor
    kind: Literal["exact", "int8", "int4"] = "exact"
    scale: Tensor | None = None
    bias: Tensor | None = None
    zeros: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.data.shape[0]

    @property
    def in_features(self) -> int:
        return self.data.shape[1] * (2 if self.kind == "int4" else 1)

    @property
    def group(self) -> int:
        """Numbers along `in` that share a scale: 32, 64 or 128 for `int4`, else all."""
        return (
            self.in_features // self.scale.shape[1]
            if self.kind == "int4" and self.scale is not None
            else self.in_features
        )


@dataclass(frozen=True, slots=True, eq=False)
class AttentionWork:
    """What the attention of one step has to do, in device memory, for layers with one shape of heads and key range.

    The tables are those of `engine.compute.cuda.steps.tables`, which says what their columns mean.

    Attributes:
        narrow: `[capacity, 8] int32`, work items of few rows; wide: those of many; merges: `[capacity, 4] int32`.
        counts: `[3] int32`: how many narrow items, wide items and merges there are.
        blocks: `[capacity] int32`: the block tables of all sequences.
    """

    narrow: Tensor
    wide: Tensor
    merges: Tensor
    counts: Tensor
    blocks: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Partials:
    """Room for the results of single splits, until they are merged.

    Attributes:
        sums: `[slots, heads, value_dim] float32`; peaks, totals: `[slots, heads] float32`.
    """

    sums: Tensor
    peaks: Tensor
    totals: Tensor


class Operations(Protocol):
    """The operations of a forward pass that treat every row by itself."""

    @property
    def tile_rows(self) -> tuple[int, int]:
        """Rows of a narrow and of a wide work item's tile, query heads that share a key head counted as rows."""

    def linear(self, x: Tensor, weight: LinearWeight, out_dtype: torch.dtype) -> Tensor:
        """Compute `x @ weight.T + bias`, summed in float32 along k in one order, rounded once.

        Args:
            x: `[rows, in]`, the last dimension contiguous.

        Returns:
            `[rows, out]` of `out_dtype`.
        """

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, kind: NormKind) -> Tensor:
        """Normalise the last dimension of `x [rows, n]` by its root mean square, in float32; same dtype as `x`."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Compute `silu(gate) * up` of `gate_up [rows, 2 n]`, gate first: `[rows, n]`.

        As torch does in that dtype: `silu(gate)` is rounded before it is multiplied.
        """

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
        """Write a step's keys and values into the cache.

        A row of which a key or value is not finite is written as zeros in that layer (all heads), and noted.

        Args:
            key: `[kv_heads, T, key_dim]`; value: `[kv_heads, T, value_dim]`; the last dimension contiguous.
            keys: `[kv_heads, slots, key_dim]`; values: `[kv_heads, slots, value_dim]`: the layer's cache.
            slots: `[T] int64`: where each row goes.
            num_rows: `[1] int32`: rows from there on are padding, and are not written.
            finite: `[T] int32`: set to 0 for rows that are not finite, else left as it is.
        """

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
        """Attend, each sequence over its own keys, in tiles and splits at absolute positions.

        Args:
            query: `[heads, T, key_dim]`, the last dimension contiguous.
            keys, values: the layer's cache, as in `store`.

        Returns:
            `[T, heads, value_dim]`; rows of no work item are zeros, or mean nothing where the memory is reused.
        """

    def copy_blocks(self, tensors: Sequence[Tensor], pairs: Tensor, num_pairs: Tensor) -> None:
        """Copy whole blocks of `tensors`, each `[heads, slots, dim]`, in the order of the pairs.

        A later pair may read what an earlier one wrote.

        Args:
            pairs: `[capacity, 2] int32`: from block, to block; num_pairs: `[1] int32`.
        """
