"""Replace RMS norms and SiLU by single-pass kernels, in place. Recognises modules by their results, not their names.

transformers computes them in four to six tensor operations, each of which costs more than its arithmetic on one token.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.compute.cpu.kernels import Kernels
from engine.compute.linear import quasi_random


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


@torch.inference_mode()
def replace_pointwise(model: nn.Module, kernels: Kernels) -> int:
    """Replace the modules that are RMS norms or SiLU. Returns how many."""
    targets = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    count = 0
    for parent, name, child in targets:
        replacement = _as_norm(child, kernels) or _as_silu(child, kernels)
        if replacement is not None:
            setattr(parent, name, replacement)
            count += 1
    return count


def _takes_one(module: nn.Module) -> bool:
    """Tell whether a module takes one tensor and nothing else: a gated norm without its gate looks like a plain one."""
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
    # Small numbers, too: there the epsilon decides.
    x = quasi_random(3, weight.shape[0]) * torch.tensor([[1.0], [1e-3], [1e3]], dtype=torch.float32)
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
    x = quasi_random(4, 64) * torch.tensor([[1.0], [1e-3], [30.0], [1e4]], dtype=torch.float32)
    silu = NativeSiLU(kernels)
    try:
        y = module(x)
        same = y.dtype == x.dtype and torch.allclose(y, F.silu(x), rtol=1e-5, atol=1e-6)
    except Exception:  # called in another way: not SiLU
        return None
    return silu if same and torch.allclose(silu(x), y, rtol=1e-5, atol=1e-6) else None
