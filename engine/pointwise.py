"""Norms and activations whose rows are independent. Replaces modules in place, known by what they compute, not by name.

* Our own kernels for root-mean-square norms and SiLU: transformers writes a norm as four to six tensor operations, of
  which each costs more than what it does to one token.
* Any other activation (GELU, tanh, xIELU, …) in pieces of whole vectors. torch computes most numbers of a tensor with
  vector instructions and what is left at the end of each thread's share one by one, and the two differ in their last
  bits. Which numbers are left depends on the number of rows (docs/log.md, 2026-11-26).
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.linear import quasi_random
from engine.native import Kernels


class NativeNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, in one pass."""

    def __init__(self, kernels: Kernels, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.kernels, self.variance_epsilon = kernels, epsilon
        self.weight = nn.Parameter(weight.detach().to(torch.float32).contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.variance_epsilon)


class NativeSiLU(nn.Module):
    """`x / (1 + exp(-x))`."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.silu(x)


class RowSafeActivation(nn.Module):
    """An activation, computed such that each number takes the same path wherever it stands.

    torch computes a piece of up to 16,384 numbers on one thread, and one of 64, 128, … numbers by vectors only.
    """

    PIECE, VECTORS = 16384, 64

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        size = flat.shape[0]
        missing = -size % self.VECTORS
        if missing:
            flat = F.pad(flat, (0, missing))
        if flat.shape[0] <= self.PIECE:
            out = self.inner(flat)
        else:
            out = torch.cat([self.inner(piece) for piece in torch.split(flat, self.PIECE)])
        result: Tensor = out[:size].view(x.shape)
        return result


@torch.inference_mode()
def replace_pointwise(model: nn.Module, kernels: Kernels | None) -> int:
    """Replace the layers that are RMS norms or activations; without kernels the latter only. Returns how many."""
    targets = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    count = 0
    for parent, name, child in targets:
        replacement: nn.Module | None = None
        if kernels is not None:
            replacement = _as_norm(child, kernels) or _as_silu(child, kernels)
        replacement = replacement or _as_activation(child)
        if replacement is not None:
            setattr(parent, name, replacement)
            count += 1
    return count


def _takes_one(module: nn.Module) -> bool:
    """Whether a module is given one tensor and nothing else: a gated norm without its gate looks like a plain one."""
    return len(inspect.signature(module.forward).parameters) == 1


def _as_norm(module: nn.Module, kernels: Kernels) -> NativeNorm | None:
    weight = dict(module.named_parameters()).get("weight")
    if len(list(module.parameters())) != 1 or len(list(module.modules())) != 1 or weight is None or weight.dim() != 1:
        return None
    epsilon = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if (
        not _takes_one(module)
        or not isinstance(epsilon, float)
        or weight.dtype != torch.float32
        or weight.device.type != "cpu"
    ):
        return None
    # Small numbers, too: there the epsilon is what is left.
    x = quasi_random(3, weight.shape[0]) * torch.tensor([[1.0], [1e-3], [1e3]])
    for candidate in (weight, 1 + weight):  # Gemma keeps the difference to one
        norm = NativeNorm(kernels, candidate, epsilon)
        try:
            same = torch.allclose(module(x), norm(x), rtol=1e-5, atol=1e-6)
        except Exception:  # called in another way: not a norm
            return None
        if same:
            return norm
    return None


def _as_silu(module: nn.Module, kernels: Kernels) -> NativeSiLU | None:
    if next(module.parameters(), None) is not None or len(list(module.modules())) > 1 or isinstance(module, NativeSiLU):
        return None
    if not _takes_one(module):
        return None
    x = quasi_random(4, 64) * torch.tensor([[1.0], [1e-3], [30.0], [1e4]])
    silu = NativeSiLU(kernels)
    try:
        y = module(x)
        same = y.dtype == x.dtype and torch.allclose(y, F.silu(x), rtol=1e-5, atol=1e-6)
    except Exception:  # called in another way: not SiLU
        return None
    return silu if same and torch.allclose(silu(x), y, rtol=1e-5, atol=1e-6) else None


def _as_activation(module: nn.Module) -> RowSafeActivation | None:
    """Wrap a module that computes each number from that number alone; not one that returns what it was given."""
    if isinstance(module, NativeSiLU | RowSafeActivation) or len(list(module.modules())) > 1 or not _takes_one(module):
        return None
    if any(parameter.numel() > 1 for parameter in module.parameters()):
        return None
    x = quasi_random(4, 96) * torch.tensor([[1.0], [1e-3], [30.0], [1.0]])
    try:
        y = module(x)
        if y is x or y.dtype != x.dtype or torch.equal(x, y):
            return None
        mixed = module(x.flip(0).T.contiguous())  # the same numbers in other places and another shape
        same = torch.allclose(mixed.T.flip(0), y, rtol=1e-5, atol=1e-6)
    except Exception:  # called in another way: not an activation
        return None
    return RowSafeActivation(module) if same else None
