"""Make the weights that the linear kernel reads, from float weights or from checkpoints that others have quantised.

How an int4 weight is stored: numbers along `in` form groups of 32, 64 or 128, which share a scale. A number is
`(q - zero) * scale`, where q is 0 to 15 and zero is the group's `zeros`, or 8. Byte `j` of a group holds the q of
column `j` in its low four bits and that of column `group / 2 + j` in its high four: so the two halves of a group are
two contiguous pieces of the input.

Other formats (`engine.compute.whole.quantised`) hold the same numbers in another order, and are brought into this one
without rounding anything; what cannot be is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from engine.compute.cuda.operations import LinearWeight
from engine.compute.whole import quantised
from engine.errors import LoadError

__all__ = ["concatenated", "exact", "from_checkpoint", "int4", "int8", "mergeable", "part", "widened"]

GROUPS: Final = (128, 64, 32)
"""Sizes of group that the kernel has."""


def exact(weight: Tensor, bias: Tensor | None) -> LinearWeight:
    """Take `weight [out, in]` and `bias [out]`, floats of any size, as they are."""
    return LinearWeight(weight.detach().contiguous(), bias=_plain(bias))


def int8(weight: Tensor, bias: Tensor | None) -> LinearWeight:
    """Round `weight [out, in]` to whole numbers from -127 to 127, times a scale for each output.

    The scale is the largest magnitude over 127; ties go to the even number.
    """
    wide = weight.detach().to(torch.float32)
    scale = _safe(wide.abs().amax(dim=1) / 127)
    numbers = (wide / scale[:, None]).round_().clamp_(-127, 127)
    return LinearWeight(numbers.to(torch.int8).contiguous(), "int8", scale, _plain(bias))


def int4(weight: Tensor, bias: Tensor | None, group: int = 128) -> LinearWeight:
    """Round `weight [out, in]` to whole numbers from -8 to 7, times a scale for each group of columns.

    The scale is such that the number of largest magnitude, of either sign, becomes -8; ties go to the even number.

    Raises:
        LoadError: the columns are no multiple of `group`, or the kernel has no groups of that size.
    """
    out, columns = weight.shape
    if group not in GROUPS or columns % group:
        raise LoadError(f"int4 wants groups of 32, 64 or 128 columns; {columns} columns in groups of {group} are none.")
    wide = weight.detach().to(torch.float32).reshape(out, -1, group)
    largest = wide.gather(2, wide.abs().argmax(dim=2, keepdim=True))[:, :, 0]
    scale = _safe(largest / -8)
    numbers = (wide / scale[:, :, None]).round_().clamp_(-8, 7) + 8
    return LinearWeight(_packed(numbers.to(torch.uint8), group), "int4", scale, _plain(bias))


def widened(weight: LinearWeight) -> Tensor:
    """Return the numbers that a weight stands for, `[out, in] float32`, without the bias."""
    if weight.scale is None:
        return weight.data.to(torch.float32)
    if weight.kind == "int8":
        return weight.data * weight.scale[:, None]
    pairs = weight.data.reshape(weight.out_features, -1, weight.group // 2)
    numbers = torch.cat([pairs & 15, pairs >> 4], dim=2).to(torch.int8)
    zeros = 8 if weight.zeros is None else weight.zeros.to(torch.int8)[:, :, None]
    return ((numbers - zeros) * weight.scale[:, :, None]).reshape(weight.out_features, weight.in_features)


def mergeable(weights: Sequence[LinearWeight]) -> bool:
    """Whether layers with the same input can be one layer, of which every number has the bits it has alone."""
    first = weights[0]
    return all(
        (w.kind, w.data.dtype, w.in_features, w.group) == (first.kind, first.data.dtype, first.in_features, first.group)
        and (w.bias is None) == (first.bias is None)  # adding zero makes 0 of -0
        for w in weights
    )


def concatenated(weights: Sequence[LinearWeight]) -> LinearWeight:
    """Merge layers with the same input into one whose outputs are theirs, one after the other; see `mergeable`."""
    assert mergeable(weights)
    scales = [w.scale for w in weights if w.scale is not None]
    biases = [w.bias for w in weights if w.bias is not None]
    zeros = None
    if any(w.zeros is not None for w in weights):
        zeros = torch.cat(
            [
                torch.full_like(s, 8, dtype=torch.uint8) if w.zeros is None else w.zeros
                for w, s in zip(weights, scales, strict=True)
            ]
        )
    return LinearWeight(
        torch.cat([w.data for w in weights]),
        weights[0].kind,
        torch.cat(scales) if scales else None,
        torch.cat(biases) if biases else None,
        zeros,
    )


def part(weight: LinearWeight, start: int, end: int) -> LinearWeight:
    """Return the outputs `start … end - 1` of a layer, as views of its tensors."""
    scale, bias, zeros = (None if t is None else t[start:end] for t in (weight.scale, weight.bias, weight.zeros))
    return LinearWeight(weight.data[start:end], weight.kind, scale, bias, zeros)


# -- checkpoints that others have quantised ----------------------------------------------------------------------------


def from_checkpoint(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LinearWeight:
    """Bring one quantised layer of a checkpoint into our layout. No number changes.

    Args:
        tensors: of the layer, by their names in it (`qweight`, `weight_packed`, `bias`, …).
        settings: the checkpoint's `quantization_config`.

    Raises:
        LoadError: the method is unknown, or has something that our layout cannot represent. Says what; the caller knows
            which layer it is.
    """
    layer = quantised.read(tensors, settings)
    if layer.order is not None:
        raise LoadError(
            f"{layer.method} with columns out of order (desc_act, actorder) cannot be read: its g_idx says so."
        )
    columns, groups, scale, zeros = layer.numbers.shape[1], layer.scales.shape[1], layer.scales, layer.zeros
    if columns % groups or columns != layer.size * groups:
        raise LoadError(f"{layer.method}: {columns} columns are not {groups} whole groups of {layer.size}.")
    scale = scale.to(torch.float32)
    if layer.bits == 8:
        if groups > 1 or zeros is not None:
            raise LoadError(
                f"{layer.method} with 8 bits cannot be read with groups or zero points: the kernel has neither."
            )
        signed = (layer.numbers.to(torch.int16) - layer.middle).to(torch.int8)
        return LinearWeight(signed.contiguous(), "int8", scale[:, 0].contiguous(), _plain(layer.bias))
    group = next((known for known in GROUPS if layer.size % known == 0), None)
    if group is None:
        raise LoadError(f"{layer.method} in groups of {layer.size} columns cannot be read; multiples of 32 can.")
    scale = scale.repeat_interleave(layer.size // group, dim=1).contiguous()
    if zeros is not None:
        zeros = zeros.repeat_interleave(layer.size // group, dim=1).contiguous()
    numbers = layer.numbers.reshape(len(layer.numbers), -1, group)
    return LinearWeight(_packed(numbers, group), "int4", scale, _plain(layer.bias), zeros)


def _packed(numbers: Tensor, group: int) -> Tensor:
    """Pack `numbers [out, groups, group] uint8`, each 0 to 15, as the module says: `[out, in / 2] uint8`."""
    half = group // 2
    return (numbers[:, :, :half] | numbers[:, :, half:] << 4).reshape(len(numbers), -1).contiguous()


def _safe(scale: Tensor) -> Tensor:
    """Replace scales of 0, where all numbers are 0, by 1."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _plain(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().contiguous()
