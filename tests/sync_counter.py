"""`SyncCounter`: counts, on a CPU, the places where a GPU's host would wait for the GPU or send to it.

    with SyncCounter() as seen:
        engine.step()
    assert len(seen.reads) == 1, seen.reads

A read is any operation whose result or shape depends on numbers that the device has computed. An upload makes a tensor
of numbers on the host. Each is listed as `name at file:line`, the line being the innermost one in `engine`. What
compiled kernels do is not seen, nor copies between devices, of which there are none on a CPU.
"""

from __future__ import annotations

import functools
import sys
from types import TracebackType
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS: Final = {
    *("tolist", "item", "numpy", "cpu", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"),
    *("equal", "allclose", "is_nonzero", "bincount", "repeat_interleave"),
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__"),
}
"""Functions of torch and methods of a tensor."""
_ATEN_READS: Final = {
    *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "bincount", "_unique2"),
    *("unique_dim", "unique_consecutive", "unique_dim_consecutive", "repeat_interleave", "allclose"),
}
"""What the same come to below Python, or are called by there."""
_UPLOADS: Final = {"tensor", "as_tensor", "asarray", "new_tensor"}
_UNSEEN_UPLOADS: Final = ("frombuffer", "from_numpy")
"""Functions that no mode of torch is told of."""


class SyncCounter:
    """Lists reads and uploads while it is entered.

    Attributes:
        reads, uploads: `name at file:line`, in order.
    """

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.uploads: list[str] = []
        self.inside = False
        """Whether a read is being computed: what it is made of is no other read."""
        self._modes = (_Functions(self), _Operations(self))

    def __enter__(self) -> SyncCounter:
        for mode in self._modes:
            mode.__enter__()
        self._functions = {name: getattr(torch, name) for name in _UNSEEN_UPLOADS}
        for name, function in self._functions.items():
            setattr(torch, name, functools.partial(self._upload, name, function))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, function in self._functions.items():
            setattr(torch, name, function)
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)

    def _upload(self, name: str, function: Any, *arguments: Any, **keywords: Any) -> Any:
        self.uploads.append(f"{name} at {_place()}")
        return function(*arguments, **keywords)

    def read(self, name: str, function: Any, arguments: Any, keywords: Any) -> Any:
        """Note a read and compute it."""
        if self.inside:
            return function(*arguments, **keywords)
        self.reads.append(f"{name} at {_place()}")
        self.inside = True
        try:
            return function(*arguments, **keywords)
        finally:
            self.inside = False


class _Functions(TorchFunctionMode):
    """What Python asks for."""

    def __init__(self, seen: SyncCounter) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _UPLOADS:
            self._seen.uploads.append(f"{name} at {_place()}")
        if name in _READS:
            return self._seen.read(name, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """What reaches the library, from Python or from within."""

    def __init__(self, seen: SyncCounter) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in _ATEN_READS or (name in ("index", "index_put", "index_put_") and _has_mask(args[1])):
            return self._seen.read(name, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    """Whether an index has a shape that only its numbers tell."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _place() -> str:
    frame, outer = sys._getframe(2), ""
    while frame is not None and "/engine/" not in frame.f_code.co_filename.replace("/tests/engine/", "/tests/"):
        outer = outer or f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return outer if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
