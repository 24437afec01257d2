"""Finds the few tokens among which the winner of a draw must be. Decides nothing: the host does, by `gumbel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from engine.sampling.rng import GAP_UNIT

__all__ = ["Contenders", "contenders"]

_SLACK: Final = 1.0 + 2.0**-14
_BLOCK: Final = 512  # columns of which the least is found first
_FEW_COLUMNS: Final = 16 * _BLOCK  # up to which looking at blocks first gains nothing


@dataclass(frozen=True, slots=True)
class Contenders:
    """The few tokens of each row that can still win.

    Attributes:
        columns: int64 `[n, k]`, where in the row each is.
        gaps: int64 `[n, k]`, of each; see `engine.sampling.rng`.
        scores: float64 `[n, k]`, of each; -inf for one that cannot win, and for all behind it.
        complete: bool `[n, 1]`, whether the winner is certainly among them.
        likely: int64 `[n, 1]`, which of them wins by the device's own logarithm. The host's can decide otherwise only
            where two are within one unit in the last place.
    """

    columns: Tensor
    gaps: Tensor
    scores: Tensor
    complete: Tensor
    likely: Tensor


def contenders(scores: Tensor, token_gaps: Tensor, count: int) -> Contenders:
    """Return at most `count` tokens a row, among which the winner is wherever `complete` is true.

    Maximising `score + gumbel` is minimising `e / w`, where `w = exp(score)` and `e = -log(1 - v)`, `v` being the gap
    as a fraction. As `v <= e`, every token has `v / w <= e / w`: cheap to compute and a lower bound. Take the `count`
    tokens with the least `v / w`, and let `b` be the least `e / w` among them. The winner's `e / w` is at most `b`, so
    its `v / w` is, too: if the largest `v / w` that was taken is above `b`, no token that was not taken can win, and of
    those taken only the ones up to `b` can.

    `v / w` is computed in float32 and compared with a bound that is widened by 6e-5, ten times what rounding can amount
    to: the winner is not worse than the likeliest token, for which `e / w` is at most `-log(2**-53) < 37`, so its score
    is above -41, the float32 neighbour of its score is off by 2e-6 at most, its exponential by 3e-6 of itself. `b` is
    computed in float64. It counts only as a bound, so nothing depends on its last digit.

    Args:
        scores: float64 `[n, m]`, at most 0, a 0 in each row; -inf for tokens that are not kept. A row with NaN gives
            columns that exist and no other promise.
        token_gaps: int64, shaped as `scores`.
        count: at least 1; all tokens are taken if there are no more.
    """
    width = scores.shape[-1]
    race = _race(scores, token_gaps)
    least, columns = _smallest(race, min(count, width), width)
    chosen, found = token_gaps.gather(1, columns), scores.gather(1, columns)
    exact = (chosen.double() * -GAP_UNIT).log1p_().neg_().div_(found.exp())  # e / w; infinite where w is 0
    bound, likely = exact.min(-1, keepdim=True)
    wide = bound * (_SLACK / GAP_UNIT)
    found = found.masked_fill(least > wide, -torch.inf)
    complete = least[:, -1:] > wide if count < width else torch.ones_like(likely, dtype=torch.bool)
    return Contenders(columns, chosen, found, complete, likely)


def _race(scores: Tensor, token_gaps: Tensor) -> Tensor:
    """Return the gap by the weight, float32, shaped as `scores`: `v / w` in units of `GAP_UNIT`."""
    weight = scores.float().clamp_(min=-80.0).exp_()  # e**-80 cannot win either, and is no denormal, which are slow
    return token_gaps.float().div_(weight)


def _smallest(race: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the `count` smallest numbers of each row, ascending, and their columns.

    In a wide row the least of every block is found first: the smallest numbers lie in the `count` blocks that have the
    smallest ones. So most of the row is read once, by a plain minimum.
    """
    blocks = width // _BLOCK
    if width <= _FEW_COLUMNS or count >= blocks:
        return race.topk(count, largest=False)
    body, tail = race[:, : blocks * _BLOCK].view(-1, blocks, _BLOCK), race[:, blocks * _BLOCK :]
    where = body.amin(-1).topk(count, largest=False, sorted=False).indices
    inside = body.gather(1, where.unsqueeze(-1).expand(-1, -1, _BLOCK)).flatten(1)
    least, at = torch.cat([inside, tail], 1).topk(count, largest=False)
    taken = count * _BLOCK
    block = where.gather(1, (at // _BLOCK).clamp_(max=count - 1))
    return least, torch.where(at < taken, block * _BLOCK + at % _BLOCK, blocks * _BLOCK + at - taken)
