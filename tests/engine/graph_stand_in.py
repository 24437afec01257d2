"""A CUDA graph's stand-in for a CPU: the operations of one call with the very tensors they used, run again.

What a recording forbids on a GPU is forbidden here: reading a number back, and shapes that depend on data. What it
freezes without a word is frozen here: numbers of Python, and tensors made of them. So a step that replays rightly here
has no way from the host into the graph but through the buffers that are sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from engine.compute.cuda.operations import Operations
from engine.compute.cuda.steps.graphs import NotCapturable

READS = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::_assert_async"),
}
"""Operations that read the device, or whose shapes depend on what is in it."""

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        masks = name == "aten::index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        sized = func._schema.overload_name == "Tensor" and kwargs.get("output_size") is None
        if name in READS or masks or (name == "aten::repeat_interleave" and sized):
            raise NotCapturable(name)
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


class WholeOperations:
    """Operations that a recording takes for one launch each, as it does kernels."""

    def __init__(self, inner: Operations) -> None:
        self._inner = inner
        self.recording: _Recording | None = None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any) -> Any:
            with _disable_current_modes():
                out = found(*args)
            if self.recording is None:
                return out
            self.recording.calls.append((found, args, {}, out))
            return out

        return call


class _Replay:
    def __init__(self, calls: list[Call], output: Tensor) -> None:
        self._calls, self.output = calls, output

    @torch.inference_mode()
    def replay(self) -> None:
        for function, args, kwargs, out in self._calls:
            schema = getattr(function, "_schema", None)
            writes = schema is not None and any(
                r.alias_info is not None and r.alias_info.is_write for r in schema.returns
            )
            known = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            if results and schema is not None and not writes and all(_storage(t) in known for t in results):
                continue  # a view, and it still is one: `reshape` may be that or a copy
            fresh = [t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, Tensor)]
            if not writes:
                for old, new in zip(results, fresh, strict=True):
                    if _storage(old) != _storage(new):
                        old.copy_(new)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class StandInRecorder:
    """Records on a CPU (see `engine.compute.cuda.steps.graphs.Recorder`)."""

    def __init__(self, operations: WholeOperations) -> None:
        self._operations = operations
        self.launches = 0

    def record(self, run: Callable[[], Tensor]) -> _Replay:
        run()
        recording = _Recording()
        self._operations.recording = recording
        try:
            with recording:
                output = run()
        finally:
            self._operations.recording = None
        self.launches = len(recording.calls)
        return _Replay(recording.calls, output)
