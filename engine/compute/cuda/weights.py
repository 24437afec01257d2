"""Make the weights that the linear kernel reads, from float weights or from checkpoints that others have quantised.

How an int4 weight is stored: numbers along `in` form groups of 32, 64 or 128, which share a scale. A number is
`(q - zero) * scale`, where q is 0 to 15 and zero is the group's `zeros`, or 8. Byte `j` of a group holds the q of
column `j` in its low four bits and that of column `group / 2 + j` in its high four: so the two halves of a group are
two contiguous pieces of the input.

Other formats hold the same numbers in another order, and are brought into this one without rounding anything; what
cannot be is refused by name. Sources of the formats: AutoGPTQ and GPTQModel (`qlinear`, `dequantize_weight`), AutoAWQ
(`awq/modules/linear/gemm.py`), compressed-tensors (`compressors/quantized_compressors/pack_quantized.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from engine.compute.cuda.operations import LinearWeight
from engine.errors import LoadError

__all__ = ["concatenated", "exact", "from_checkpoint", "int4", "int8", "mergeable", "part", "widened"]

GROUPS: Final = (128, 64, 32)
"""Sizes of group that the kernel has."""
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours AutoAWQ stores first, second, …, in a word."""


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
    readers = {"gptq": _from_gptq, "awq": _from_awq, "compressed-tensors": _from_compressed_tensors}
    method = str(settings.get("quant_method"))
    if method not in readers:
        raise LoadError(f"weights quantised by {method} have no kernel; those by {', '.join(readers)} have.")
    return readers[method](tensors, settings)


def _from_gptq(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LinearWeight:
    """Read `qweight [in / 8, out] int32`, neighbours along `in` in a word, and `qzeros [groups, out / 8] int32`.

    The first version of the format stores zeros less one in each place of the word, borrows included.
    """
    bits = _bits("GPTQ", settings)
    version = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if version not in ("gptq", "gptq_v2"):
        raise LoadError(f"GPTQ in the format {version} cannot be read; gptq and gptq_v2 can.")
    if settings.get("dynamic"):
        raise LoadError("GPTQ with other settings for some layers (dynamic) cannot be read.")
    packed, scale = _tensor(tensors, "qweight"), _tensor(tensors, "scales")
    numbers = _unpacked(packed, bits, dim=0)
    size = _group_size("GPTQ", settings, len(numbers), len(scale))
    if "g_idx" in tensors:
        _check_order("GPTQ", tensors["g_idx"], len(numbers), size)
    elif settings.get("desc_act"):
        raise LoadError("GPTQ with desc_act and without g_idx cannot be read: the order of the columns is unknown.")
    stored = _tensor(tensors, "qzeros")
    if version == "gptq":
        ones = sum(1 << at for at in range(0, 32, bits))
        stored = stored + ones  # of int32: it wraps around
    zeros = _unpacked(stored, bits, dim=1)
    return _weight("GPTQ", bits, numbers.t(), scale.t(), zeros.t(), tensors.get("bias"))


def _from_awq(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LinearWeight:
    """Read `qweight [in, out / 8] int32`, neighbours along `out` in a word, in AutoAWQ's order; so are the zeros."""
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm" or _bits("AWQ", settings) != 4:
        raise LoadError(f"AWQ in the format {version} with {settings['bits']} bits cannot be read; gemm with 4 can.")
    numbers = _unpacked(_tensor(tensors, "qweight"), 4, dim=1, order=_AWQ_ORDER)
    zeros = _unpacked(_tensor(tensors, "qzeros"), 4, dim=1, order=_AWQ_ORDER)
    scale = _tensor(tensors, "scales")
    _group_size("AWQ", settings, len(numbers), len(scale))
    return _weight("AWQ", 4, numbers.t(), scale.t(), zeros.t(), tensors.get("bias"))


def _from_compressed_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LinearWeight:
    """Read `weight_packed [out, in / 8] int32`, neighbours along `in` in a word, zeros packed along `out`."""
    schemes = list(settings.get("config_groups", {}).values())
    if not schemes or any(scheme.get("weights") != schemes[0].get("weights") for scheme in schemes):
        raise LoadError("compressed-tensors with other settings for some layers (config_groups) cannot be read.")
    form = str(schemes[0].get("format") or settings.get("format"))
    given: Mapping[str, Any] = schemes[0].get("weights") or {}
    if form != "pack-quantized" or given.get("type", "int") != "int":
        raise LoadError(f"compressed-tensors in the format {form} cannot be read; pack-quantized can.")
    if schemes[0].get("input_activations"):
        raise LoadError("compressed-tensors with quantised activations (input_activations) cannot be read.")
    bits = _bits("compressed-tensors", {"bits": given.get("num_bits")})
    rows, columns = _tensor(tensors, "weight_shape").tolist()
    numbers = _unpacked(_tensor(tensors, "weight_packed"), bits, dim=1)[:, :columns]
    if list(numbers.shape) != [rows, columns]:
        raise LoadError(f"compressed-tensors: a weight_packed of {list(numbers.shape)} is no {[rows, columns]}.")
    scale = _tensor(tensors, "weight_scale")
    scale = scale.reshape(rows, -1) if scale.numel() > 1 else scale.reshape(1, 1).expand(rows, 1)
    if "weight_g_idx" in tensors:
        _check_order("compressed-tensors", tensors["weight_g_idx"], columns, columns // scale.shape[1])
    zeros = tensors.get("weight_zero_point")
    if zeros is not None and zeros.dtype == torch.int32:
        zeros = _unpacked(zeros, bits, dim=0)[:rows]
    elif zeros is not None:  # whole numbers around zero, one in a byte
        zeros = (
            (zeros.to(torch.int32) + (1 << (bits - 1)))
            .to(torch.uint8)
            .reshape(-1, zeros.shape[-1] if zeros.ndim else 1)
        )
        zeros = zeros.expand(scale.shape)
    return _weight("compressed-tensors", bits, numbers, scale, zeros, tensors.get("bias"))


def _weight(
    method: str, bits: int, numbers: Tensor, scale: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> LinearWeight:
    """Build a weight of `numbers [out, in] uint8`, `scale [out, groups]` and `zeros [out, groups] uint8`."""
    rows, columns = numbers.shape
    groups = scale.shape[1]
    middle = 1 << (bits - 1)
    if scale.shape[0] != rows or columns % groups or (zeros is not None and zeros.shape != scale.shape):
        shapes = [list(t.shape) for t in (numbers, scale, zeros) if t is not None]
        raise LoadError(f"{method}: weights, scales and zeros do not fit each other: {shapes}.")
    scale = scale.to(torch.float32)
    if zeros is not None and bool((zeros == middle).all()):
        zeros = None
    if bits == 8:
        if groups > 1 or zeros is not None:
            raise LoadError(f"{method} with 8 bits cannot be read with groups or zero points: the kernel has neither.")
        signed = (numbers.to(torch.int16) - middle).to(torch.int8)
        return LinearWeight(signed.contiguous(), "int8", scale[:, 0].contiguous(), _plain(bias))
    size = columns // groups
    group = next((known for known in GROUPS if size % known == 0), None)
    if group is None:
        raise LoadError(f"{method} in groups of {size} columns cannot be read; multiples of 32 can.")
    scale = scale.repeat_interleave(size // group, dim=1).contiguous()
    if zeros is not None:
        zeros = zeros.repeat_interleave(size // group, dim=1).contiguous()
    return LinearWeight(_packed(numbers.reshape(rows, -1, group), group), "int4", scale, _plain(bias), zeros)


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise LoadError(f"the tensor {name} of a quantised layer is missing; there are {', '.join(sorted(tensors))}.")
    return tensors[name]


def _bits(method: str, settings: Mapping[str, Any]) -> int:
    bits = settings.get("bits")
    if bits not in (4, 8):
        raise LoadError(f"{method} with {bits} bits cannot be read; 4 and 8 can.")
    return int(bits)


def _group_size(method: str, settings: Mapping[str, Any], columns: int, groups: int) -> int:
    """Return the columns of a group: all, where the settings say -1."""
    size = int(settings.get("group_size", 128))
    size = columns if size == -1 else size
    if size <= 0 or columns != size * groups:
        raise LoadError(f"{method}: {columns} columns are not {groups} groups of {size} (group_size).")
    return size


def _check_order(method: str, g_idx: Tensor, columns: int, size: int) -> None:
    """Refuse groups of scattered columns (act order): our groups are neighbours."""
    if not torch.equal(g_idx.cpu().to(torch.int64), torch.arange(columns) // size):
        raise LoadError(f"{method} with columns out of order (desc_act, actorder) cannot be read: its g_idx says so.")


def _unpacked(words: Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> Tensor:
    """Unpack the numbers in `words` (int32, two dimensions) along `dim`, lowest bits first: uint8.

    Args:
        order: place of the first, second, … number of a word among its neighbours.
    """
    if words.dtype != torch.int32:
        raise LoadError(f"quantised weights are read from words of int32, not of {words.dtype}.")
    each = 32 // bits
    shape = list(words.shape)
    shape[dim] *= each
    numbers = torch.empty(shape, dtype=torch.uint8, device=words.device)
    for position, place in enumerate(order or range(each)):  # one after the other: peak memory stays low
        part = ((words >> (position * bits)) & ((1 << bits) - 1)).to(torch.uint8)
        if dim == 0:
            numbers[place::each] = part
        else:
            numbers[:, place::each] = part
    return numbers


def _packed(numbers: Tensor, group: int) -> Tensor:
    """Pack `numbers [out, groups, group] uint8`, each 0 to 15, as the module says: `[out, in / 2] uint8`."""
    half = group // 2
    return (numbers[:, :, :half] | numbers[:, :, half:] << 4).reshape(len(numbers), -1).contiguous()


def _safe(scale: Tensor) -> Tensor:
    """Replace scales of 0, where all numbers are 0, by 1."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _plain(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().contiguous()
