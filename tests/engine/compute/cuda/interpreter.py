"""Make Triton's interpreter compute as a GPU does: products in a fixed order, bfloat16 read and rounded as bfloat16.

The interpreter multiplies the bit patterns of bfloat16 as whole numbers, takes whole numbers for such patterns, cuts
float32 off where it narrows it, and leaves products to numpy, whose sums depend on the number of rows.
`tests/conftest.py` switches the interpreter on, before anything imports triton, where there is no GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_plain_cast = _Builder.cast_impl


def _float32(handle: Any) -> Any:
    if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _ordered_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    total, left, right = d.data.astype(np.float32, copy=True), _float32(a), _float32(b)
    for k in range(left.shape[1]):
        total += left[:, k, None] * right[None, k, :]
    return interpreter.TensorHandle(total, d.dtype.scalar)


def _bfloat16(data: Any) -> Any:
    wide = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
    return wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def _cast(self: Any, source: Any, target: Any) -> Any:
    if source.dtype.scalar != tl.bfloat16 and target.scalar == tl.bfloat16:
        return interpreter.TensorHandle(_bfloat16(source.data).reshape(source.data.shape), target.scalar)
    return _plain_cast(self, source, target)


@functools.cache
def install() -> None:
    """Correct the interpreter in this process."""
    _Builder.create_dot = _ordered_dot
    _Builder.cast_impl = _cast
