"""A weight as whole numbers in groups that share a scale, as quantised checkpoints hold it. Knows only tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Groups"]


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """A weight `[columns, depth]`: numbers standing for `scale · (number - zero) - minimum`, rounded to float32 twice.

    Groups are neighbours along `depth`; the last may be shorter. A scale, and a minimum, is a float, or a whole number
    times the float of its super-group, which are `per` groups.

    Attributes:
        numbers: `[columns, depth] uint8`, each less than `2 ** bits`.
        bits: 4, 5, 6 or 8.
        group: numbers in a group: 16, 32, 64 or 128.
        scales: `[columns, groups]`: float16, bfloat16 or float32; uint8 or int8 where there are `supers`.
        supers: `[columns, super-groups]` float16, bfloat16 or float32, or None.
        minima, minimum_supers: likewise; None where nothing is taken off.
        zeros: one for all, or `[columns, groups] uint8`.
        per: groups in a super-group.
    """

    numbers: Tensor
    bits: int
    group: int
    scales: Tensor
    supers: Tensor | None = None
    minima: Tensor | None = None
    minimum_supers: Tensor | None = None
    zeros: int | Tensor = 0
    per: int = 8

    @property
    def columns(self) -> int:
        return self.numbers.shape[0]

    @property
    def depth(self) -> int:
        return self.numbers.shape[1]

    def widened(self) -> Tensor:
        """Return the numbers that the weight stands for: `[columns, depth] float32`."""
        zeros = self.zeros if isinstance(self.zeros, int) else self._spread(self.zeros.to(torch.float32))
        out = (self.numbers.to(torch.float32) - zeros) * self._spread(self._product(self.scales, self.supers))
        if self.minima is not None:
            out -= self._spread(self._product(self.minima, self.minimum_supers))
        return out

    def _product(self, values: Tensor, supers: Tensor | None) -> Tensor:
        """Return `[columns, groups] float32`."""
        wide = values.to(torch.float32)
        if supers is None:
            return wide
        spread = supers.to(torch.float32).repeat_interleave(self.per, dim=1)
        return wide * spread[:, : wide.shape[1]]

    def _spread(self, of_groups: Tensor) -> Tensor:
        """Repeat what belongs to each group for each of its numbers."""
        return of_groups.repeat_interleave(self.group, dim=1)[:, : self.depth]
