"""Read the blocks of GGUF's quantised tensors as whole numbers in groups. Knows bytes; no file, no kernel, no model.

Nothing is rounded: the groups stand for the very numbers that ggml's own dequantisation gives. Kinds of 2 and 3 bits
are held as 4. The layouts are those of ggml's `ggml-common.h`, and of `gguf.quants`, which the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from engine.compute.whole.groups import Groups

__all__ = ["KINDS", "Kind", "NotFinite", "read_groups"]

_PIECE: Final = 1 << 20
"""Numbers that are unpacked at once: the memory for what is in between stays small."""


class NotFinite(ValueError):
    """A scale is infinite or no number."""


class _Block(NamedTuple):
    """What blocks `[n, size]` hold: numbers `[n, values] uint8`, scales and minima `[n, groups]`, supers `[n, 1]`."""

    numbers: Tensor
    scales: Tensor
    minima: Tensor | None = None
    supers: Tensor | None = None
    minimum_supers: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """How ggml lays out one kind of tensor.

    Attributes:
        values, size: numbers and bytes of a block; unpack: takes blocks `[n, size] uint8` apart.
        bits, group, zero: of the groups that it becomes: see `Groups`.
    """

    values: int
    size: int
    bits: int
    group: int
    zero: int
    unpack: Callable[[Tensor], _Block]

    def row_bytes(self, depth: int) -> int:
        """Return the bytes of a row of `depth` numbers."""
        return depth // self.values * self.size


def read_groups(kind: Kind, columns: int, depth: int, rows: Callable[[slice], Tensor]) -> Groups:
    """Unpack a tensor of `columns` rows, each of `depth` numbers.

    Args:
        rows: returns the bytes of some rows, `[n, bytes] uint8`. It is asked for a few at a time, in order.

    Raises:
        NotFinite: a scale or a minimum is no finite number.
    """
    if depth % kind.values:
        raise ValueError(f"a row of {depth} numbers is no row of blocks of {kind.values}")
    numbers = torch.empty(columns, depth, dtype=torch.uint8)
    parts: list[_Block] = []
    step = max(_PIECE // depth, 1)
    for start in range(0, columns, step):
        piece = kind.unpack(rows(slice(start, start + step)).reshape(-1, kind.size))
        numbers[start : start + step] = piece.numbers.view(-1, depth)
        parts.append(piece._replace(numbers=piece.numbers.new_empty(0)))
    found = {
        name: torch.cat([getattr(part, name) for part in parts]).view(columns, -1)
        for name in ("scales", "minima", "supers", "minimum_supers")
        if getattr(parts[0], name) is not None
    }
    for values in found.values():
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise NotFinite("it has scales that are not finite")
    return Groups(
        numbers=numbers,
        bits=kind.bits,
        group=kind.group,
        zeros=kind.zero,
        per=kind.values // kind.group if "supers" in found else 1,
        **found,
    )


# -- blocks of 32 with a scale each -----------------------------------------------------------------------------------


def _halves(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at a byte of each block: `[n, 1]`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _nibbles(packed: Tensor) -> Tensor:
    """Return the low halves of bytes `[…, k]`, then the high ones: `[…, 2 k]`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _fifth(blocks: Tensor, at: int) -> Tensor:
    """Return 16 where a number's fifth bit is set, by the 32 bits at a byte of each block: `[n, 32]`."""
    return ((blocks[:, at : at + 4, None] >> _shifts(range(8))) & 1).flatten(1) << 4


def _shifts(by: range) -> Tensor:
    return torch.tensor([*by], dtype=torch.uint8)


def _q4_0(blocks: Tensor) -> _Block:
    return _Block(_nibbles(blocks[:, 2:]), _halves(blocks, 0))


def _q4_1(blocks: Tensor) -> _Block:
    return _Block(_nibbles(blocks[:, 4:]), _halves(blocks, 0), -_halves(blocks, 2))


def _q5_0(blocks: Tensor) -> _Block:
    return _Block(_nibbles(blocks[:, 6:]) | _fifth(blocks, 2), _halves(blocks, 0))


def _q5_1(blocks: Tensor) -> _Block:
    return _Block(_nibbles(blocks[:, 8:]) | _fifth(blocks, 4), _halves(blocks, 0), -_halves(blocks, 2))


def _q8_0(blocks: Tensor) -> _Block:
    return _Block(blocks[:, 2:] ^ 128, _halves(blocks, 0))  # signed bytes, from -128 on


# -- blocks of 256 whose scales are whole numbers themselves ----------------------------------------------------------


def _spread(packed: Tensor, width: int, bits: int) -> Tensor:
    """Take `bits` after `bits` from runs of `width` bytes: `[n, bytes]` to `[n, bytes · 8 / bits]`."""
    runs = packed.reshape(packed.shape[0], -1, 1, width)
    return ((runs >> _shifts(range(0, 8, bits))[:, None]) & ((1 << bits) - 1)).flatten(1)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return eight scales and eight minima of six bits each, from twelve bytes: `[n, 8]` twice."""
    low, high, rest = packed.view(-1, 3, 4).unbind(1)
    scales = torch.cat([low & 63, (rest & 15) | ((low >> 2) & 48)], dim=1)
    return scales, torch.cat([high & 63, (rest >> 4) | ((high >> 2) & 48)], dim=1)


def _q2_k(blocks: Tensor) -> _Block:
    scales = blocks[:, :16]
    return _Block(_spread(blocks[:, 16:80], 32, 2), scales & 15, scales >> 4, _halves(blocks, 80), _halves(blocks, 82))


def _q3_k(blocks: Tensor) -> _Block:
    numbers = _spread(blocks[:, 32:96], 32, 2) | _spread(blocks[:, :32], 32, 1) << 2
    scales = _spread(blocks[:, 96:104], 8, 4) | _spread(blocks[:, 104:108], 4, 2) << 4
    return _Block(numbers, scales.view(torch.int8) - 32, None, _halves(blocks, 108))


def _q4_k(blocks: Tensor) -> _Block:
    scales, minima = _six_bits(blocks[:, 4:16].contiguous())
    return _Block(_spread(blocks[:, 16:], 32, 4), scales, minima, _halves(blocks, 0), _halves(blocks, 2))


def _q5_k(blocks: Tensor) -> _Block:
    scales, minima = _six_bits(blocks[:, 4:16].contiguous())
    numbers = _spread(blocks[:, 48:], 32, 4) | _spread(blocks[:, 16:48], 32, 1) << 4
    return _Block(numbers, scales, minima, _halves(blocks, 0), _halves(blocks, 2))


def _q6_k(blocks: Tensor) -> _Block:
    numbers = _spread(blocks[:, :128], 64, 4) | _spread(blocks[:, 128:192], 32, 2) << 4
    return _Block(numbers, blocks[:, 192:208].contiguous().view(torch.int8), None, _halves(blocks, 208))


KINDS: Final[Mapping[str, Kind]] = {
    "Q4_0": Kind(32, 18, 4, 32, 8, _q4_0),
    "Q4_1": Kind(32, 20, 4, 32, 0, _q4_1),
    "Q5_0": Kind(32, 22, 5, 32, 16, _q5_0),
    "Q5_1": Kind(32, 24, 5, 32, 0, _q5_1),
    "Q8_0": Kind(32, 34, 8, 32, 128, _q8_0),
    "Q2_K": Kind(256, 84, 4, 16, 0, _q2_k),
    "Q3_K": Kind(256, 110, 4, 16, 4, _q3_k),
    "Q4_K": Kind(256, 144, 4, 32, 0, _q4_k),
    "Q5_K": Kind(256, 176, 5, 32, 0, _q5_k),
    "Q6_K": Kind(256, 210, 6, 16, 32, _q6_k),
}
"""The kinds that stay packed, by ggml's names. Others (`IQ…`, `TQ…`, `MXFP4`) are tables of values, or floats."""
