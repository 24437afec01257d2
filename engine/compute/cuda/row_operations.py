"""Find the operations of a forward pass that may not treat every row by itself. Knows no model by name.

The law is promised where every operation is known to, and trials can only find faults. What a model computes beside
the operations that were replaced is watched in one pass: element-wise operations, views and copies are harmless; a
matrix product of a library or a sum over a row may take another way for another number of rows (torch's reductions
choose their shape by it), and is named.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.compute.attention import attention_through
from engine.compute.backend import AttentionSettings
from engine.compute.discovery import input_device

__all__ = ["doubtful_operations"]

_NEW: Final = "arange empty empty_like full new_empty new_full new_ones new_zeros ones scalar_tensor zeros zeros_like"
_VIEWS: Final = (
    "alias as_strided chunk detach detach_ expand expand_as flatten lift_fresh movedim narrow permute reshape select "
    "slice split split_with_sizes squeeze t transpose unbind unfold unsqueeze view view_as _unsafe_view"
)
_COPIES: Final = (
    "cat clone contiguous copy copy_ embedding gather index index_select repeat repeat_interleave stack to type_as "
    "_to_copy __and__ __or__"
)
_ROWS: Final = "dropout layer_norm native_layer_norm"
"""Dropout is off where a model is served. `layer_norm` takes one block of threads
for each row, whose shape depends on the length of a row alone (aten/native/cuda/layer_norm_kernel.cu)."""
_HARMLESS: Final = frozenset(f"aten::{name}" for name in f"{_NEW} {_VIEWS} {_COPIES} {_ROWS}".split())
_WITHIN_ROWS: Final = frozenset({"aten::amax", "aten::amin", "aten::max", "aten::min"})
"""Harmless over the last dimension alone: a maximum is the same in any order, and over rows it would couple them."""
_PRODUCTS: Final = frozenset({"aten::bmm", "aten::mm", "aten::matmul"})
"""Harmless if one number is multiplied by one: rotary embeddings multiply positions and frequencies so."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.doubtful: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name: str = func._schema.name
        out = func(*args, **(kwargs or {}))
        known = torch.Tag.pointwise in func.tags or name in _HARMLESS or _is_outer(name, args)
        if name == "aten::slice":
            known = _keeps_rows(args[0], out)
        elif name in _WITHIN_ROWS:
            given = (args[1] if len(args) > 1 else None) or (kwargs or {}).get("dim")
            dims = [given] if isinstance(given, int) else list(given or ())
            known = dims in ([-1], [args[0].dim() - 1]) or (torch.Tag.pointwise in func.tags)
        if not known:
            self.doubtful[name.removeprefix("aten::")] = None
        return out


def _keeps_rows(before: Tensor, after: Tensor) -> bool:
    """Tell whether a slice leaves all but the last dimension whole: part of the rows, moved, would be a shift."""
    return before.dim() < 2 or before.shape[:-1] == after.shape[:-1]


def _is_outer(name: str, args: Any) -> bool:
    return name in _PRODUCTS and args[0].shape[-1] == 1


class _NoAttention:
    """Attends to nothing: attention has operations of its own, and these are known."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])

    def finite(self) -> Tensor:
        return torch.ones(0, dtype=torch.bool)


@torch.inference_mode()
def doubtful_operations(model: nn.Module) -> list[str]:
    """Run two tokens as a step does, and name the operations that are not known to treat every row by itself.

    The model must have our attention function. Our own operations are launched as kernels, which are not seen here.
    """
    device = input_device(model)
    tokens, positions = torch.zeros(1, 2, dtype=torch.int64, device=device), torch.arange(2, device=device)[None]
    mask = torch.zeros(1, 1, 1, 1, device=device)
    with attention_through(_NoAttention()), _Watch() as watch:
        model(tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    return list(watch.doubtful)
