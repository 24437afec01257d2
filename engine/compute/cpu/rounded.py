"""Round float weights to whole numbers in groups by a kernel: the bits of `engine.compute.whole.rounding`."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.compute.cpu.kernel_calls import Calls
from engine.compute.cpu.packed_weight import Columns, Pieces
from engine.compute.whole.groups import Groups
from engine.compute.whole.rounding import GROUP, PER
from engine.errors import LoadError

__all__ = ["round_pieces"]


def round_pieces(calls: Calls, read: Columns, pieces: Pieces, columns: int, depth: int, bits: int) -> Groups:
    """Round a weight `[columns, depth]`, of which some columns are read at a time, to 4 or 8 bits.

    Raises:
        LoadError: a number is not finite.
    """
    groups = _empty(columns, depth, bits)
    parts = (groups.numbers, groups.scales, groups.minima, groups.supers, groups.minimum_supers)
    for start, end in pieces:
        weight = read(start, end).detach().to(torch.float32).contiguous()
        out = (None if part is None else part[start:end].data_ptr() for part in parts)
        if calls.round(weight.data_ptr(), *out, end - start, depth, bits, torch.get_num_threads()):
            raise LoadError("a weight is not a finite number, and cannot be rounded.")
    return groups


def _empty(columns: int, depth: int, bits: int) -> Groups:
    of = -(-depth // GROUP)

    def part(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(columns, count, dtype=dtype)

    numbers = part(depth, torch.uint8)
    if bits == 8:
        return Groups(numbers, 8, GROUP, part(of, torch.bfloat16), zeros=128)
    whole, supers = (of, torch.uint8), (-(-of // PER), torch.bfloat16)
    return Groups(numbers, 4, GROUP, part(*whole), part(*supers), part(*whole), part(*supers), 0, PER)
