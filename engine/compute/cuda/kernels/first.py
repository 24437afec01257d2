"""The first kernel that is compiled on a machine: it says whether Triton works there at all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_one"]


@triton.jit
def _add_one(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0) + 1.0, mask=at < n)


def add_one(x: Tensor) -> Tensor:
    """Add 1 to `x [n] float32`."""
    y = torch.empty_like(x)
    _add_one[(triton.cdiv(len(x), 128),)](x, y, len(x), BLOCK=128)
    return y
