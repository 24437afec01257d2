"""A mixture of experts as one call of a compiled kernel. Knows weights; no module of a model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.compute.cpu.kernel_calls import ACTIVATIONS, Calls, Experts, Matrix
from engine.compute.cpu.packed_weight import KINDS, PackedWeight, checked


class ExpertsKernel:
    """`Σ weight · down(activation(gate(x)) · up(x))` over the experts chosen for a row, in the order they are given.

    A row's bits depend on its own input, choices and weights alone.
    """

    def __init__(
        self, calls: Calls, gate_up: Sequence[PackedWeight], down: Sequence[PackedWeight], activation: str
    ) -> None:
        """gate_up, down: of each expert, `[2 · inner, dim]`, with the columns of gate first, and `[dim, inner]`.

        Raises:
            ValueError: they do not fit together.
        """
        inner, dim = down[0].depth, down[0].columns
        shapes = [{(w.columns, w.depth) for w in group} for group in (gate_up, down)]
        if shapes != [{(2 * inner, dim)}, {(dim, inner)}] or len(gate_up) != len(down):
            raise ValueError("these weights are no experts that there is a kernel for")
        self._dim = dim
        tables = [(Matrix * len(group))(*(w.matrix() for w in group)) for group in (gate_up, down)]
        self._kept = (gate_up, down, tables)  # the memory that the record points to
        layouts = {(w.depth, KINDS[w.kind]) for w in (*gate_up, *down)}
        self._record = Experts(
            *map(ctypes.addressof, tables),
            dim=dim,
            inner=inner,
            experts=len(down),
            row_bytes=max(-(-calls.scratch(*layout) // 64) * 64 for layout in layouts),
            activation=ACTIVATIONS[activation],
        )
        self._address = ctypes.addressof(self._record)
        self._call, self._scratch = calls.experts, calls.experts_scratch

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Compute the sums.

        Args:
            x: `[rows, dim] float32`.
            chosen: `[rows, choices]` int64, experts' numbers; those that are none add nothing.
            weights: `[rows, choices] float32`.

        Returns:
            `[rows, dim]`.
        """
        x, weights = checked(x, self._dim), checked(weights, chosen.shape[-1])
        rows, choices = chosen.shape
        if x.shape[0] != rows or weights.shape != chosen.shape:
            raise ValueError(f"{x.shape[0]} rows with choices for {rows} and weights for {weights.shape[0]}")
        chosen = chosen.to(torch.int64).contiguous()
        out = torch.empty_like(x)
        scratch = torch.empty(self._scratch(self._address, rows, choices), dtype=torch.uint8)
        self._call(
            self._address,
            x.data_ptr(),
            chosen.data_ptr(),
            weights.data_ptr(),
            out.data_ptr(),
            scratch.data_ptr(),
            rows,
            choices,
            torch.get_num_threads(),
        )
        return out
