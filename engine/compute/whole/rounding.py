"""Round float weights to whole numbers in groups: 4 bits with a minimum, or 6 bits. Knows tensors; no kernel or file.

The same weight gives the same bits on every machine: every step is one IEEE operation on each number, sums of a group
are formed in pairs of halves (`_sum`), and largest and smallest numbers have no order. A CPU's kernel does the same in
a fraction of the time (`engine/compute/cpu/native/rounding.h`); a test compares the bits.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from engine.compute.whole.groups import Groups
from engine.errors import LoadError

__all__ = ["GROUP", "PER", "four_bits", "six_bits"]

GROUP: Final = 32
"""Numbers that share a scale."""
PER: Final = 8
"""Groups of which scales and minima are multiples of one number."""
_SHRINK: Final = (1.0, 0.88)
"""Shares of a group's range that are tried first: the outermost numbers may be cut off to come nearer to the others."""
_FITS: Final = 2
"""Times that scale and minimum are fitted to the rounded numbers."""
_LEAST: Final = 1e-30
"""Scales below it are 0: their inverse would overflow."""
_PIECE: Final = 1 << 18  # numbers rounded at once: they stay in the processor's cache


@torch.inference_mode()
def four_bits(weight: Tensor) -> Groups:
    """Round `weight [columns, depth]`, floats, to 0 … 15 in groups of 32: `scale · number - minimum`.

    Scales and minima are bytes times a bfloat16 for each eight groups: 4.6 bits a number. Of several ranges the one
    with the least squared error is taken.

    Raises:
        LoadError: a number is not finite.
    """
    parts = [_four_bits(piece) for piece in _pieces(weight)]
    numbers, scales, minima, supers, minimum_supers = (torch.cat(part) for part in zip(*parts, strict=True))
    return Groups(numbers, 4, GROUP, scales, supers, minima, minimum_supers, 0, PER)


@torch.inference_mode()
def six_bits(weight: Tensor) -> Groups:
    """Round `weight [columns, depth]`, floats, to 1 … 63 around 32, in groups of 32: `scale · (number - 32)`.

    Scales are bytes times a bfloat16 for each eight groups: 6.3 bits a number. They come from each group's largest
    number: fitting them as four bits are gains 3 % of the squared error.

    Raises:
        LoadError: a number is not finite.
    """
    parts = [_six_bits(piece) for piece in _pieces(weight)]
    numbers, scales, supers = (torch.cat(part) for part in zip(*parts, strict=True))
    return Groups(numbers, 6, GROUP, scales, supers, zeros=32, per=PER)


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(_PIECE // max(weight.shape[1], 1), 1))


def _four_bits(weight: Tensor) -> tuple[Tensor, ...]:
    """Return numbers, scales, minima and the supers of both, for some rows."""
    x = _grouped(weight, GROUP * PER)
    scale, low = _fitted(x)
    groups = -(-weight.shape[1] // GROUP)
    scales, supers = _in_bytes(scale)
    minima, minimum_supers = _in_bytes(-low)
    found = scales.to(torch.float32) * _spread(supers)
    taken = minima.to(torch.float32) * _spread(minimum_supers)
    numbers = _rounded(x, found, -taken).to(torch.uint8).flatten(1)[:, : weight.shape[1]]
    return numbers.contiguous(), scales[:, :groups], minima[:, :groups], supers, minimum_supers


def _six_bits(weight: Tensor) -> tuple[Tensor, ...]:
    """Return numbers, scales and their supers, for some rows."""
    x = _grouped(weight, GROUP * PER)
    scales, supers = _in_bytes(x.abs().amax(dim=2) / 31)
    wide = scales.to(torch.float32) * _spread(supers)
    numbers = (x * _inverse(wide)[:, :, None]).round_().clamp_(-31, 31).add_(32)
    groups = -(-weight.shape[1] // GROUP)
    return numbers.to(torch.uint8).flatten(1)[:, : weight.shape[1]].contiguous(), scales[:, :groups], supers


def _grouped(weight: Tensor, multiple: int) -> Tensor:
    """Return `[rows, groups, 32] float32`, filled up with zeros to a multiple of numbers."""
    wide = weight.to(torch.float32)
    if not bool(wide.isfinite().all()):
        raise LoadError("a weight is not a finite number, and cannot be rounded.")
    missing = -wide.shape[1] % multiple
    if missing:
        wide = torch.nn.functional.pad(wide, (0, missing))
    return wide.reshape(len(wide), -1, GROUP)


def _fitted(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each group of `x [rows, groups, 32]` the scale, and what 0 stands for, which is not above 0."""
    lowest = x.amin(dim=2).clamp(max=0)
    step = torch.maximum(x.amax(dim=2), lowest) / 15 - lowest / 15
    total = _sum(x)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for share in _SHRINK:
        scale, low = step * share, lowest * share
        for _ in range(_FITS):
            q = _rounded(x, scale, low)
            scale, low = _fit(x, q, total, scale, low)
        off = (q * scale[:, :, None] + low[:, :, None]) - x
        error = _sum(off * off)
        if best is None:
            best = error, scale, low
        else:
            better = error < best[0]
            best = (error, torch.where(better, scale, best[1]), torch.where(better, low, best[2]))
    assert best is not None
    return best[1], best[2]


def _fit(x: Tensor, q: Tensor, total: Tensor, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale, and the low that is not above 0, for which `scale · q + low` is nearest to x (least squares).

    Those that are given stay where there are none: all of q alike, or sums too large for float32.
    """
    ones, squares, products = _sum(q), _sum(q * q), _sum(x * q)
    spread = GROUP * squares - ones * ones
    fitted = (GROUP * products - ones * total) / spread
    base = (total - fitted * ones) / GROUP
    above = base > 0
    fitted, base = torch.where(above, products / squares, fitted), torch.where(above, 0.0, base)
    good = (spread > 0) & (fitted > 0) & fitted.isfinite() & base.isfinite()
    return torch.where(good, fitted, scale), torch.where(good, base, low)


def _rounded(x: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """Return the whole numbers 0 … 15, as floats, nearest to `(x - low) / scale`."""
    return ((x - low[:, :, None]) * _inverse(scale)[:, :, None]).round_().clamp_(0, 15)


def _in_bytes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return `values [rows, groups]`, none below 0, as bytes, and the bfloat16 of eight groups that they multiply."""
    rows, values = len(values), values + 0.0  # of two zeros the one without a sign: which is the largest has no order
    supers = _up(values.view(rows, -1, PER).amax(dim=2) / 255)
    bytes_ = (values * _inverse(_spread(supers))).round_().clamp_(0, 255)
    return bytes_.to(torch.uint8), supers


def _spread(supers: Tensor) -> Tensor:
    return supers.to(torch.float32).repeat_interleave(PER, dim=1)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > _LEAST, 1 / scale, 0.0)


def _up(values: Tensor) -> Tensor:
    """Round floats, none below 0, up to bfloat16."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def _sum(values: Tensor) -> Tensor:
    """Add up the last dimension, 32 numbers, half to half: the order is part of what is computed."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]
