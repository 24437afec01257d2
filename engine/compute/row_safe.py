"""Batch-invariant activations: a result's bits do not depend on its place in the tensor. Knows no model.

On a CPU torch computes most numbers of a float32 tensor with vector instructions, and the last few of each
thread's part one by one, by another formula. For sigmoid, SiLU, softplus and GELU the two differ in their last bits,
and which numbers come last depends on the number of rows. `exp`, `log1p`, `tanh`, `erf` and arithmetic do not differ,
so the four are computed with those here (measured on AVX2 and AVX-512, docs/log.md, 2026-11-26).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _sigmoid(x: Tensor) -> Tensor:
    return (torch.exp(-x) + 1).reciprocal_()


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    out = x / (torch.exp(-x) + 1)
    return x.copy_(out) if inplace else out


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    scaled = x * beta
    return torch.where(scaled > threshold, x, torch.log1p(torch.exp(scaled)) / beta)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate != "tanh":
        return 0.5 * x * (1 + torch.erf(x * 0.7071067811865476))
    return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


_SAFE: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
    torch.special.expit: _sigmoid,
    F.silu: _silu,
    F.softplus: _softplus,
    F.gelu: _gelu,
}


def _replacement(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the function to call in place of `function`: itself if it needs no replacement."""
    safe = _SAFE.get(function)
    if safe is None or "out" in kwargs:
        return function
    x = args[0] if args else kwargs.get("input")
    return safe if isinstance(x, Tensor) and x.dtype == torch.float32 and x.device.type == "cpu" else function


class RowSafeFunctions(TorchFunctionMode):
    """A mode in which torch's activations are replaced by those of this file.

    Attributes:
        used: whether one was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call = _replacement(func, args, kwargs)
        if call is not func:
            self.used = True
            kwargs = {("x" if name == "input" else name): value for name, value in kwargs.items()}
        return call(*args, **kwargs)
