"""Packed weights that a model's modules multiply with by themselves: a tensor to them. Knows no module and no model.

Routers are made so (`F.linear(x, self.weight)`), and experts (`F.linear(x, self.gate_up_proj[expert])`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.packed_weight import PackedWeight, Product
from engine.compute.cpu.stored_linear import copied

__all__ = ["OwnWeight", "describes", "is_number", "is_same", "operands"]

_SAME: Final = frozenset({"type", "to", "float", "contiguous", "detach"})
"""Functions that return a float32 weight as it is, if they are asked for nothing else."""
_DESCRIBING: Final = frozenset({"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_meta", "is_cuda"})
_ASKING: Final = frozenset({"size", "dim", "numel", "is_floating_point", "__len__"})


class OwnWeight(Tensor):
    """A weight `[out, in]`, or several, `[n, out, in]`, in the kernels' layout; it has no memory of its own.

    What describes it is answered (its shape, its dtype), `weight[i]` takes one of several, and `F.linear` multiplies.
    Anything else that is done with it gets a widened copy, of which a change in place raises `WeightChanged`.

    Attributes:
        parts: the weights, without biases.
        plain: multiply as plain transformers does, in torch with a widened copy; until the backend has fused the model.
    """

    kernels: Kernels
    parts: tuple[PackedWeight, ...]
    plain: bool
    _products: tuple[Product, ...]

    @staticmethod
    def of(kernels: Kernels, parts: Sequence[PackedWeight], shape: torch.Size, *, plain: bool = False) -> OwnWeight:
        """Make one of `shape`, all of whose parts have its last two dimensions."""
        return OwnWeight._make(kernels, tuple(parts), tuple(kernels.group([part]) for part in parts), shape, plain)

    @staticmethod
    def _make(
        kernels: Kernels, parts: tuple[PackedWeight, ...], products: tuple[Product, ...], shape: torch.Size, plain: bool
    ) -> OwnWeight:
        wrapper: Any = Tensor._make_wrapper_subclass
        weight: OwnWeight = wrapper(OwnWeight, shape, dtype=torch.float32, device="cpu")
        weight.kernels, weight.parts, weight.plain, weight._products = kernels, parts, plain, products
        return weight

    def install(self, module: nn.Module, name: str) -> None:
        """Take the place of a module's parameter."""
        module._parameters.pop(name, None)
        setattr(module, name, self)

    def widened(self) -> Tensor:
        """Return a float32 copy of its shape."""
        return torch.stack([self.kernels.widen(part) for part in self.parts]).view(*self.shape)

    def part(self, index: int) -> Tensor:
        """Return one of several weights: a widened copy if this is `plain`."""
        if self.plain:
            return copied(self.kernels.widen(self.parts[index]))
        return OwnWeight._make(self.kernels, (self.parts[index],), (self._products[index],), self.shape[1:], False)

    def multiplied(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T` for a single weight: `[…, out]`."""
        out: Tensor = self._products[0](x.reshape(-1, x.shape[-1]))[0]
        return out.view(*x.shape[:-1], out.shape[-1])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is F.linear:
            x, weight, bias = operands(args, kwargs)
            single = isinstance(weight, OwnWeight) and len(weight.parts) == 1 and not weight.plain
            if single and type(x) is Tensor and x.dtype == torch.float32:
                out = weight.multiplied(x)
                return out if bias is None else out + bias
        own = args[0] if args and isinstance(args[0], OwnWeight) else None
        if own is not None:
            if describes(func):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func is Tensor.__getitem__ and own.dim() == 3 and is_number(args[1]):
                return own.part(int(args[1]))
            if is_same(name, args[1:], kwargs):
                return own
        wide, named = tree_map_only(OwnWeight, lambda weight: copied(weight.widened()), (args, dict(kwargs)))
        return func(*wide, **named)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} of a weight that is packed")


def describes(func: Any) -> bool:
    """Tell whether a function of a tensor, or the reading of an attribute, needs none of its numbers."""
    name = getattr(func, "__name__", "")
    return name in _ASKING or (name == "__get__" and getattr(func.__self__, "__name__", "") in _DESCRIBING)


def operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return what an `F.linear` was given: input, weight and bias."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
    return given.get("input"), given.get("weight"), given.get("bias")


def is_number(index: Any) -> bool:
    """Tell whether an index takes one of several weights."""
    if isinstance(index, Tensor):
        return index.dim() == 0 and index.dtype in (torch.int32, torch.int64)
    return type(index) is int


def is_same(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a function, by its name and what it was given, returns a float32 weight on a CPU as it is."""
    given = [*args, *kwargs.values()]
    return (
        name in _SAME
        and (bool(given) or name not in ("type", "to"))
        and all(value in (torch.float32, torch.device("cpu"), "cpu") for value in given)
    )
