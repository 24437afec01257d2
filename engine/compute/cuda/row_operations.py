"""Find the operations of a forward pass that may not treat every row by itself. Knows no model by name.

The law is promised where every operation is known to, and trials can only find faults. What a model computes beside
the operations that were replaced is watched in one pass: element-wise operations, views and copies are harmless; a
matrix product of a library or a sum over a row may take another way for another number of rows (torch's reductions
choose their shape by it), and is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.compute.attention import attention_through
from engine.compute.backend import AttentionSettings
from engine.compute.discovery import input_device

__all__ = ["doubtful_operations"]

_ROWS: Final = 37
"""Tokens of the watched pass: a prime that is the size of nothing else in a model, so that a dimension of this size, or
of a multiple of it, is one of tokens."""
_NEW: Final = "arange empty empty_like full new_empty new_full new_ones new_zeros ones scalar_tensor zeros zeros_like"
_VIEWS: Final = (
    "alias as_strided detach detach_ expand expand_as flatten lift_fresh movedim permute reshape squeeze t transpose "
    "unfold unsqueeze view view_as _unsafe_view"
)
_COPIES: Final = "clone contiguous copy copy_ dropout embedding repeat repeat_interleave to type_as _to_copy"
_HARMLESS: Final = frozenset(f"aten::{name}" for name in f"{_NEW} {_VIEWS} {_COPIES} __and__ __or__".split())
"""Dropout is off where a model is served."""
_TAKEN: Final = "cat chunk gather index index_select narrow select slice split split_with_sizes stack unbind"
_APART: Final = frozenset(f"aten::{name}" for name in _TAKEN.split())
"""Harmless unless tokens are taken apart or put together: a part of them, moved, would be a shift."""
_WITHIN: Final = frozenset(f"aten::{name}" for name in ("amax", "amin", "max", "min"))
_NORMS: Final = frozenset({"aten::layer_norm", "aten::native_layer_norm"})
"""Harmless unless they go over tokens. A maximum is the same in any order. `layer_norm` takes one block of threads for
each row, whose shape depends on the length of a row alone (aten/native/cuda/layer_norm_kernel.cu)."""
_PRODUCTS: Final = frozenset({"aten::bmm", "aten::mm", "aten::matmul"})
"""Harmless if one number is multiplied by one: rotary embeddings multiply positions and frequencies so."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.doubtful: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name: str = func._schema.name
        out = func(*args, **(kwargs or {}))
        if torch.Tag.pointwise not in func.tags and not _is_known(name, args, kwargs or {}, out):
            self.doubtful[name.removeprefix("aten::")] = None
        return out


def _is_known(name: str, args: Any, kwargs: Any, out: Any) -> bool:
    if name in _HARMLESS:
        return True
    if name in _PRODUCTS:
        return bool(args[0].shape[-1] == 1)
    given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
    if name in _APART:
        most = max(map(_tokens, given), default=0)
        joined = given if name in ("aten::cat", "aten::stack") else ()
        return not most or all(_tokens(tensor) == most for tensor in (*joined, *tree_leaves(out)))
    if name in _NORMS:
        return not any(size % _ROWS == 0 for size in args[1])
    if name in _WITHIN:
        found = next(tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor))
        return _tokens(given[0]) == _tokens(found)
    return False


def _tokens(tensor: Any) -> int:
    """Multiply the sizes of the dimensions that hold tokens; 0 if there is none."""
    sizes = [size for size in tensor.shape if size and size % _ROWS == 0] if isinstance(tensor, Tensor) else []
    return math.prod(sizes) if sizes else 0


class _NoAttention:
    """Attends to nothing: attention has operations of its own, and these are known."""

    def __init__(self) -> None:
        self.adapter_rows: Mapping[str, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])

    def finite(self) -> Tensor:
        return torch.ones(0, dtype=torch.bool)


@torch.inference_mode()
def doubtful_operations(model: nn.Module) -> list[str]:
    """Run some tokens as a step does, and name the operations that are not known to treat every row by itself.

    The model must have our attention function. Our own operations are launched as kernels, which are not seen here.
    """
    device = input_device(model)
    tokens, positions = (
        torch.zeros(1, _ROWS, dtype=torch.int64, device=device),
        torch.arange(_ROWS, device=device)[None],
    )
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.float32, device=device)
    with attention_through(_NoAttention()), _Watch() as watch:
        model(tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    return list(watch.doubtful)
