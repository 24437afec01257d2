"""Weights in the layout of the compiled kernels, and products with them. Knows pointers; no layer of a model."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from engine.compute.cpu.kernel_calls import Calls, Matrix

KINDS: Final = {"float32": 0, "bfloat16": 1, "int8": 2}
"""How a packed weight is stored; the numbers of kernels.c."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight `[columns, depth]` in the kernels' layout, and its bias.

    Attributes:
        kind: `float32`, `bfloat16` (of which no number was rounded) or `int8`.
    """

    data: Tensor
    bias: Tensor | None
    columns: int
    depth: int
    kind: str


def pack_weight(calls: Calls, weight: Tensor, bias: Tensor | None, kind: str) -> PackedWeight:
    """Bring `weight [columns, depth]` and `bias [columns]`, of any float dtype, into the kernels' layout.

    `exact` keeps every number: as bfloat16 if that loses nothing, else as float32. `int8` rounds, see kernels.c.
    """
    weight = weight.detach().to(torch.float32).contiguous()
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    columns, depth = weight.shape
    for stored in ("bfloat16", "float32") if kind == "exact" else (kind,):
        number = KINDS[stored]
        data = _memory(calls.packed_bytes(columns, depth, number))
        lost = calls.pack(weight.data_ptr(), data.data_ptr(), columns, depth, number, torch.get_num_threads())
        if not lost:
            return PackedWeight(data, bias, columns, depth, stored)
    raise AssertionError("float32 holds every float32")


class Product:
    """Computes `x @ weight.T + bias` for several weights at once: the input is read, and for int8 rounded, once.

    Attributes:
        columns: of each weight; depth: theirs; kind: how they are stored, a number of `KINDS`; address: of their table.
    """

    def __init__(self, calls: Calls, weights: Sequence[PackedWeight]) -> None:
        first = weights[0]
        if any((w.kind, w.depth) != (first.kind, first.depth) for w in weights):
            raise ValueError("weights of one product must have one kind and depth")
        self.weights = tuple(weights)  # keeps the memory that the table points to
        self.columns = tuple(w.columns for w in weights)
        self.depth, self.kind = first.depth, KINDS[first.kind]
        self._call = calls.linear
        self._scratch = calls.scratch(self.depth, self.kind)
        self._table = (Matrix * len(weights))(
            *(Matrix(w.data.data_ptr(), None if w.bias is None else w.bias.data_ptr(), w.columns) for w in weights)
        )
        self.address = ctypes.addressof(self._table)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Multiply `x [rows, depth] float32` by each weight: `[rows, columns] float32`; rows are independent."""
        rows, x = x.shape[0], checked(x, self.depth)
        size = rows * sum(self.columns)
        # One allocation: results, then the kernel's scratch space.
        out = torch.empty(size + -(-rows * self._scratch // 4), dtype=torch.float32)
        start = out.data_ptr()
        self._call(
            x.data_ptr(),
            start + 4 * size,
            start,
            self.address,
            rows,
            self.depth,
            len(self.columns),
            self.kind,
            torch.get_num_threads(),
        )
        parts, at = [], 0
        for columns in self.columns:
            parts.append(out[at : at + rows * columns].view(rows, columns))
            at += rows * columns
        return parts


def checked(x: Tensor, last: int) -> Tensor:
    """Return `x` dense; raise TypeError if the kernels would misread it: a pointer has no shape to check."""
    if x.dtype != torch.float32 or x.shape[-1] != last or x.device.type != "cpu":
        raise TypeError(f"the kernels take float32 [..., {last}] on a CPU, not {x.dtype} {list(x.shape)} on {x.device}")
    return x.contiguous()


def _memory(size: int) -> Tensor:
    """Allocate `[size] uint8` in huge pages, where the system has them: weights are read from end to end."""
    memory = mmap.mmap(-1, size)
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
