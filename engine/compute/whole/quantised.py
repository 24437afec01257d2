"""Read the linear layers of checkpoints that others have quantised: numbers, scales and zeros. Knows only tensors.

Every format is read into the same three, and no number changes; what is not understood is refused by name. Two layouts
are made of them: `engine.compute.whole.groups` for a CPU, `engine.compute.cuda.weights` for a GPU. Sources:
AutoGPTQ and GPTQModel (`qlinear`, `dequantize_weight`), AutoAWQ (`awq/modules/linear/gemm.py`), compressed-tensors
(`compressors/quantized_compressors/{pack_quantized,naive_quantized}.py`, `quantization/lifecycle/forward.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from engine.compute.whole.groups import Groups
from engine.errors import LoadError

__all__ = ["METHODS", "Quantised", "check", "groups_of", "order_of", "read"]

METHODS: Final = ("gptq", "awq", "compressed-tensors")
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours AutoAWQ stores first, second, …, in a word."""
_SIZES: Final = (128, 64, 32, 16)
"""Groups that a weight on a CPU can have."""


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A layer of which number `[o, i]` stands for `scales[o, g] · (numbers[o, i] - zeros[o, g])`, with `g = i // size`.

    Attributes:
        method: by which it was made, for messages.
        bits: 4 or 8.
        size: inputs that share a scale; the last group may have fewer.
        numbers: `[out, in] uint8`.
        scales: `[out, groups]`, float16, bfloat16 or float32.
        zeros: `[out, groups] uint8`, or None where each is half of `2 ** bits`.
        order: `[in] int64`: the layer's input `order[i]` is multiplied with column i; None where that is i.
        bias: `[out]`, or None.
    """

    method: str
    bits: int
    size: int
    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None = None
    bias: Tensor | None = None

    @property
    def middle(self) -> int:
        """What stands for 0 where there are no `zeros`."""
        return 1 << (self.bits - 1)


def read(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Quantised:
    """Read one quantised layer of a checkpoint.

    Args:
        tensors: of the layer, by their names in it (`qweight`, `weight_packed`, `bias`, …).
        settings: the checkpoint's `quantization_config`.

    Raises:
        LoadError: the method or its form is not known, or tensors do not fit. Says what; the caller knows the layer.
    """
    readers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}
    check(settings)
    return readers[str(settings["quant_method"])](tensors, settings)


def order_of(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the `order` of a layer that `read` takes, without its numbers."""
    index = tensors.get("g_idx", tensors.get("weight_g_idx"))
    order = None if index is None else index.cpu().to(torch.int64).argsort(stable=True)
    in_place = order is None or torch.equal(order, torch.arange(len(order), dtype=torch.int64))
    return None if in_place else order


def check(settings: Mapping[str, Any]) -> None:
    """Refuse a `quantization_config` of which no layer can be read, whatever its tensors are.

    Raises:
        LoadError: says what is not understood.
    """
    method = str(settings.get("quant_method"))
    if method == "gptq":
        _gptq_version(settings)
    elif method == "awq":
        _awq_version(settings)
    elif method == "compressed-tensors":
        _bits(method, {"bits": _scheme(settings)[1].get("num_bits")})
    else:
        raise LoadError(f"weights quantised by {method} have no kernel; those by {', '.join(METHODS)} have.")


def groups_of(layer: Quantised) -> Groups:
    """Bring a layer into groups, inputs in the order of its columns. A larger group becomes several with one scale.

    Raises:
        LoadError: its groups are no multiples of 16.
    """
    groups = layer.scales.shape[1]
    group = next((known for known in _SIZES if layer.size % known == 0), _SIZES[0] if groups == 1 else 0)
    if not group:
        raise LoadError(f"{layer.method} in groups of {layer.size} columns cannot be read; multiples of 16 can.")
    depth = layer.numbers.shape[1]
    times, whole = -(-min(layer.size, depth) // group), -(-depth // group)

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(times, dim=1)[:, :whole].contiguous()

    zeros: int | Tensor = layer.middle if layer.zeros is None else spread(layer.zeros)
    return Groups(layer.numbers.contiguous(), layer.bits, group, spread(layer.scales), zeros=zeros)


# -- the formats -------------------------------------------------------------------------------------------------------


def _gptq(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Quantised:
    """Read `qweight [in / 8, out] int32`, neighbours along `in` in a word, and `qzeros [groups, out / 8] int32`.

    The first version of the format stores zeros less one in each place of the word, borrows included.
    """
    bits, version = _gptq_version(settings)
    packed, scale = _tensor(tensors, "qweight"), _tensor(tensors, "scales")
    numbers = _unpacked(packed, bits, dim=0)
    size = _group_size("GPTQ", settings, len(numbers), len(scale))
    if "g_idx" not in tensors and settings.get("desc_act"):
        raise LoadError("GPTQ with desc_act and without g_idx cannot be read: the order of the columns is unknown.")
    order = _order("GPTQ", tensors.get("g_idx"), len(numbers), size)
    stored = _tensor(tensors, "qzeros")
    if version == "gptq":
        ones = sum(1 << at for at in range(0, 32, bits))
        stored = stored + ones  # of int32: it wraps around
    zeros = _unpacked(stored, bits, dim=1)
    return _layer("GPTQ", bits, size, numbers.t(), scale.t(), zeros.t(), order, tensors.get("bias"))


def _awq(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Quantised:
    """Read `qweight [in, out / 8] int32`, neighbours along `out` in a word, in AutoAWQ's order; so are the zeros."""
    _awq_version(settings)
    numbers = _unpacked(_tensor(tensors, "qweight"), 4, dim=1, order=_AWQ_ORDER)
    zeros = _unpacked(_tensor(tensors, "qzeros"), 4, dim=1, order=_AWQ_ORDER)
    scale = _tensor(tensors, "scales")
    size = _group_size("AWQ", settings, len(numbers), len(scale))
    return _layer("AWQ", 4, size, numbers.t(), scale.t(), zeros.t(), None, tensors.get("bias"))


def _compressed_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Quantised:
    """Read `weight_packed [out, in / 8] int32`, neighbours along `in` in a word, zeros packed along `out`; or
    `weight [out, in] int8` around 0."""
    form, given = _scheme(settings)
    bits = _bits("compressed-tensors", {"bits": given.get("num_bits")})
    middle = 1 << (bits - 1)
    if form == "int-quantized":
        stored = _tensor(tensors, "weight")
        if stored.dtype != torch.int8 or stored.ndim != 2:
            raise LoadError(
                f"compressed-tensors: a weight of {stored.dtype} {list(stored.shape)} is no matrix of int8."
            )
        numbers = _unsigned(stored, middle)
    else:
        shape, packed = _tensor(tensors, "weight_shape").tolist(), _tensor(tensors, "weight_packed")
        if len(shape) != 2 or list(packed.shape) != [shape[0], -(-shape[1] * bits // 32)]:
            raise LoadError(
                f"compressed-tensors: a weight_packed of {list(packed.shape)} is no weight of {shape} with {bits} bits."
            )
        numbers = _unpacked(packed, bits, dim=1)[:, : shape[1]]
    rows, columns = numbers.shape
    scale = _scale(_tensor(tensors, "weight_scale"), str(given["strategy"]), rows)
    size = -(-columns // scale.shape[1])
    if given["strategy"] == "group":
        size = _group_size("compressed-tensors", given, columns, scale.shape[1])
    if given.get("actorder") in (True, "group", "dynamic"):
        _tensor(tensors, "weight_g_idx")  # the order of the columns
    order = _order("compressed-tensors", tensors.get("weight_g_idx"), columns, size)
    zeros = None
    if "weight_zero_point" in tensors or not given.get("symmetric", True):
        zeros = _zeros(_tensor(tensors, "weight_zero_point"), bits, scale)
    return _layer("compressed-tensors", bits, size, numbers, scale, zeros, order, tensors.get("bias"))


def _scale(scale: Tensor, strategy: str, rows: int) -> Tensor:
    """Return the scales `[rows, groups]`: stored so, but for one scale of all numbers, or one of each row."""
    if strategy == "tensor" and scale.numel() == 1:
        return scale.reshape(1, 1).expand(rows, 1)
    if strategy == "channel" and scale.shape == (rows,):
        return scale[:, None]
    if strategy == "tensor" or scale.ndim != 2 or len(scale) != rows or (strategy == "channel" and scale.shape[1] != 1):
        raise LoadError(
            f"compressed-tensors: a weight_scale of {list(scale.shape)} is none of a weight of {rows} rows with the "
            f"strategy {strategy}."
        )
    return scale


def _zeros(zeros: Tensor, bits: int, scale: Tensor) -> Tensor:
    """Return the zeros `[rows, groups]` from 0 on: stored packed along the rows, or in a byte each, around 0."""
    rows, groups = scale.shape
    if zeros.dtype == torch.int32 and zeros.shape == (-(-rows * bits // 32), groups):
        return _unpacked(zeros, bits, dim=0)[:rows]
    if zeros.dtype == torch.int8 and (zeros.shape == scale.shape or (groups == 1 and zeros.numel() in (1, rows))):
        return _unsigned(zeros, 1 << (bits - 1)).reshape(-1, groups).expand(rows, groups)
    raise LoadError(
        f"compressed-tensors: a weight_zero_point of {list(zeros.shape)} and {zeros.dtype} is none for scales of "
        f"{[rows, groups]}."
    )


def _gptq_version(settings: Mapping[str, Any]) -> tuple[int, str]:
    """Return the bits, and the version of the format."""
    bits = _bits("GPTQ", settings)
    version = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if version not in ("gptq", "gptq_v2"):
        raise LoadError(f"GPTQ in the format {version} cannot be read; gptq and gptq_v2 can.")
    if settings.get("dynamic"):
        raise LoadError("GPTQ with other settings for some layers (dynamic) cannot be read.")
    return bits, version


def _awq_version(settings: Mapping[str, Any]) -> None:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm" or _bits("AWQ", settings) != 4:
        raise LoadError(f"AWQ in the format {version} with {settings['bits']} bits cannot be read; gemm with 4 can.")


def _scheme(settings: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the format, and how weights are quantised, where that is one for all layers and only of weights."""
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    if not all(isinstance(scheme, Mapping) for scheme in schemes):
        raise LoadError("compressed-tensors with config_groups that are only names cannot be read.")
    if not schemes or any(scheme.get("weights") != schemes[0].get("weights") for scheme in schemes):
        raise LoadError("compressed-tensors with other settings for some layers (config_groups) cannot be read.")
    form = str(schemes[0].get("format") or settings.get("format"))
    given: dict[str, Any] = dict(schemes[0].get("weights") or {})
    if form not in ("pack-quantized", "int-quantized") or given.get("type", "int") != "int":
        raise LoadError(
            f"compressed-tensors in the format {form} cannot be read; pack-quantized and int-quantized can."
        )
    for key in ("input_activations", "output_activations"):
        if any(scheme.get(key) for scheme in schemes):
            raise LoadError(f"compressed-tensors with quantised activations ({key}) cannot be read.")
    if settings.get("kv_cache_scheme"):
        raise LoadError("compressed-tensors with a quantised cache (kv_cache_scheme) cannot be read.")
    if settings.get("transform_config"):
        raise LoadError("compressed-tensors with weights that are rotated (transform_config) cannot be read.")
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise LoadError("compressed-tensors with weights that are left out (sparsity_config) cannot be read.")
    size = given.get("group_size")
    given["strategy"] = given.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if given["strategy"] not in ("tensor", "channel", "group"):
        raise LoadError(
            f"compressed-tensors with the strategy {given['strategy']} cannot be read; tensor, channel and group can."
        )
    if form == "int-quantized" and given.get("num_bits") != 8:
        raise LoadError(f"compressed-tensors in the format {form} with {given.get('num_bits')} bits cannot be read.")
    return form, given


def _layer(
    method: str,
    bits: int,
    size: int,
    numbers: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
) -> Quantised:
    """Check that `numbers [out, in]`, `scale [out, groups]` and `zeros [out, groups]` fit; put columns in order."""
    rows, columns = numbers.shape
    fits = scale.shape == (rows, -(-columns // size)) and (zeros is None or zeros.shape == scale.shape)
    if not fits or (bias is not None and bias.shape != (rows,)):
        shapes = [list(t.shape) for t in (numbers, scale, zeros, bias) if t is not None]
        raise LoadError(f"{method}: weights, scales and zeros do not fit each other: {shapes}.")
    if not scale.is_floating_point() or not bool(scale.isfinite().all()):
        raise LoadError(f"{method}: a scale is not a finite number.")
    if zeros is not None and bool((zeros == 1 << (bits - 1)).all()):
        zeros = None
    if order is not None:
        numbers = numbers[:, order]
    return Quantised(method, bits, size, numbers, scale, zeros, order, bias)


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
    size = settings.get("group_size", 128)
    if type(size) is not int:
        raise LoadError(f"{method}: a group_size of {size!r:.40} is no whole number.")
    size = columns if size == -1 else size
    if size <= 0 or -(-columns // size) != groups:
        raise LoadError(f"{method}: {columns} columns are not {groups} groups of {size} (group_size).")
    return size


def _order(method: str, g_idx: Tensor | None, columns: int, size: int) -> Tensor | None:
    """Return the columns sorted by their groups: `[in] int64`; None where they are (act order scatters them).

    Raises:
        LoadError: groups do not have `size` members each.
    """
    if g_idx is None:
        return None
    if g_idx.is_floating_point():
        raise LoadError(f"{method}: a g_idx of {g_idx.dtype} holds no numbers of groups.")
    found, wanted = g_idx.cpu().to(torch.int64), torch.arange(columns, dtype=torch.int64) // size
    if torch.equal(found, wanted):
        return None
    order = found.argsort(stable=True)
    if found.shape != (columns,) or not torch.equal(found[order], wanted):
        raise LoadError(f"{method} with columns out of order (desc_act, actorder): its g_idx has no groups of {size}.")
    return order


def _unsigned(numbers: Tensor, middle: int) -> Tensor:
    """Turn whole numbers around 0 into such from 0 on: uint8."""
    return (numbers.to(torch.int16) + middle).to(torch.uint8)


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
