"""Weights that a model multiplies with by itself (`F.linear(x, self.weight)`), packed in place. Knows no model by name.

Routers are made so, and experts that a model visits one by one. torch's product of a few rows can have other bits than
the same rows among more, so which expert is chosen could depend on neighbours.

A pass is watched. A weight that was only ever an `F.linear`'s, or of which single parts were (`self.weight[expert]`),
is replaced by an `OwnWeight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine.compute.cpu.linear import NativeLinear
from engine.compute.linear import Make
from engine.errors import out_of_memory
from engine.host_memory import give_back_memory

__all__ = ["OwnWeight", "pack_own_weights"]

_SAME: Final = frozenset({"type", "to", "float", "contiguous", "detach"})
"""Functions that return a float32 weight as it is, if they are asked for nothing else."""
_DESCRIBING: Final = frozenset({"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_meta", "is_cuda"})
_ASKING: Final = frozenset({"size", "dim", "numel", "is_floating_point", "__len__"})
_TOKENS: Final = 2


class OwnWeight(Tensor):
    """A weight `[out, in]`, or several, `[n, out, in]`, in the kernels' layout; it has no memory of its own.

    `F.linear` multiplies with it, and `weight[i]` takes one of several. All that describes it is answered (its shape,
    its dtype); anything else that is done with it gets a widened copy.
    """

    layers: tuple[NativeLinear, ...]

    @staticmethod
    def of(layers: tuple[NativeLinear, ...], shape: torch.Size) -> OwnWeight:
        """Make one of layers without a bias."""
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        weight: OwnWeight = make(OwnWeight, shape, dtype=torch.float32, device="cpu")
        weight.layers = layers
        return weight

    def widened(self) -> Tensor:
        """Return a float32 copy of its shape."""
        return torch.stack([layer.weight for layer in self.layers]).view(self.shape)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is F.linear:
            x, weight, bias = _operands(args, kwargs)
            if isinstance(weight, OwnWeight) and len(weight.layers) == 1 and _is_plain(x):
                out = weight.layers[0](x)
                return out if bias is None else out + bias
        own = args[0] if args and isinstance(args[0], OwnWeight) else None
        if own is not None:
            if func is Tensor.__getitem__ and own.dim() == 3 and _is_number(args[1]):
                return OwnWeight.of((own.layers[int(args[1])],), own.shape[1:])
            if _is_same(name, args[1:], kwargs):
                return own
            if _describes(func):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
        if name.endswith("_") and not name.endswith("__"):
            raise RuntimeError(f"{name} of a weight that is packed")
        wide = [a.widened() if isinstance(a, OwnWeight) else a for a in args]
        return func(*wide, **{k: a.widened() if isinstance(a, OwnWeight) else a for k, a in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a weight that is packed")


def _describes(func: Any) -> bool:
    """Tell whether a function of a tensor, or the reading of an attribute, needs none of its numbers."""
    name = getattr(func, "__name__", "")
    return name in _ASKING or (name == "__get__" and getattr(func.__self__, "__name__", "") in _DESCRIBING)


def _operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return what an `F.linear` was given: input, weight and bias."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    return given.get("input"), given.get("weight"), given.get("bias")


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, OwnWeight) and x.dtype == torch.float32


def _is_number(index: Any) -> bool:
    """Tell whether an index takes one of several weights."""
    if isinstance(index, Tensor):
        return index.dim() == 0 and index.dtype in (torch.int32, torch.int64)
    return type(index) is int


def _is_same(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    given = [*args, *kwargs.values()]
    return name in _SAME and all(value in (torch.float32, torch.device("cpu"), "cpu") for value in given)


class _Watch(TorchFunctionMode):
    """Notes what is done with some weights.

    Attributes:
        linear: ids of weights that were multiplied by `F.linear`; others: of those with which something else was done.
    """

    def __init__(self, weights: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._weights = weights
        self._parts: dict[int, tuple[int, Tensor]] = {}  # a freed tensor's id could come back, so each is kept
        self.linear: set[int] = set()
        self.others: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [id(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        for key in given:
            base = key if key in self._weights else self._parts.get(key, (0,))[0]
            if base:
                self._note(func, args, kwargs, key, base, out)
        return out

    def _note(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], key: int, base: int, out: Any
    ) -> None:
        name = getattr(func, "__name__", "")
        if func is F.linear and key == id(_operands(args, kwargs)[1]):
            self.linear.add(base)
        elif func is Tensor.__getitem__ and self._weights[base].dim() == 3 and key == base and _is_number(args[1]):
            self._parts[id(out)] = base, out
        elif not _describes(func) and not (_is_same(name, args[1:], kwargs) and out is args[0]):
            self.others.add(base)


@torch.inference_mode()
def pack_own_weights(model: nn.Module, make: Make, exact: Make) -> int:
    """Pack the weights that a model's modules multiply with by themselves, in place. Returns how many.

    Found by watching a pass over two tokens. The originals are freed.

    Args:
        make: packs one of several weights (experts): its layer is taken; exact: packs a weight that stands alone.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    weights: dict[int, Tensor] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.dim() in (2, 3) and weight.dtype == torch.float32 and not weight.is_meta:
                owners.setdefault(id(weight), []).append((module, name))
                weights[id(weight)] = weight
    if not weights:
        return 0
    try:
        with _Watch(weights) as watch:
            model(torch.zeros(1, _TOKENS, dtype=torch.int64), use_cache=False)
    except Exception as error:  # an architecture that is called in another way
        if out_of_memory(error):
            raise
        return 0
    found = [key for key in weights if key in watch.linear - watch.others]
    for key in found:
        weight = weights.pop(key)
        parts = [weight] if weight.dim() == 2 else list(weight)
        kind = exact if weight.dim() == 2 else make
        layers: Any = tuple(kind(part.contiguous(), None) for part in parts)
        own = OwnWeight.of(layers, weight.shape)
        for module, name in owners.pop(key):
            del module._parameters[name]
            setattr(module, name, own)
        del weight, parts
        give_back_memory()
    return len(found)
