"""How near a draw was to another one: margins, and how far a given token is from being drawn. Draws nothing.

The perturbed score of a token is what a draw maximises: `(logit - largest) / temperature + gumbel`, and the processed
logit at temperature 0. Candidates are found with torch's logarithm, whose last digit depends on a number's place in a
tensor; the host computes what counts from them one number at a time, as in `engine.sampling.rng`. Nothing here waits
for the device.
"""

from __future__ import annotations

import math
import struct
from typing import Final

import torch
from torch import Tensor

from engine.sampling.logits import Filter, Kept, masses, order_keys, scaled
from engine.sampling.rng import GAP_UNIT

__all__ = ["best_two", "closeness", "near_best", "rounded"]

_CANDIDATES: Final = 8
"""Tokens among which the best two are looked for, by an approximate score that is off by 1e-14 at most."""


def rounded(value: float) -> float:
    """Round to float32, the format in which receipts hold scores."""
    try:
        number: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return number


def near_best(kept: Kept, token_gaps: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens among which the two best of each row are: their scores, float64 `[n, k]`, and their gaps, int64.

    Args:
        token_gaps: int64, shaped as `kept.scores`.
    """
    scores = kept.scores
    near = (scores + _gumbels(token_gaps)).topk(min(_CANDIDATES, scores.shape[-1]), dim=-1).indices
    return scores.gather(1, near), token_gaps.gather(1, near)


def best_two(logits: Tensor) -> Tensor:
    """Return the two largest logits of each row, float32 `[n, 2]`; `[n, 1]` of rows of one."""
    return logits.topk(min(2, logits.shape[-1]), dim=-1).values


def closeness(logits: Tensor, cut: Filter, token_gaps: Tensor, expected: int, own: float) -> Tensor:
    """Compute by how much scores would have to change so that `expected`, which was not drawn, would have been.

    A token can lose in two ways: others that are kept have better perturbed scores, or a filter cuts it off. To win, it
    must overtake each better one, unless that one is itself about to be cut off; and it must be kept.

    Args:
        logits: float32 `[width]`, edited and masked; that of `expected` is not -inf.
        token_gaps: int64 `[width]`, of this draw.
        own: the perturbed score of `expected`.

    Returns:
        float64 `[1, 2]`: what each of the two ways asks for. The larger one counts, and at least 0.
    """
    scores = scaled(logits.unsqueeze(0), logits.max().double().view(1, 1), cut.temperature)[0]
    excess = _excess(logits, scores, cut)
    ahead = (scores + _gumbels(token_gaps)).sub_(own).minimum(-excess)
    ahead[expected] = 0.0
    return torch.stack([ahead.max(), excess[expected]]).unsqueeze(0)


def _excess(logits: Tensor, scores: Tensor, cut: Filter) -> Tensor:
    """Return by how much scores would have to change for each token to be kept or, if negative, to be cut off.

    Args:
        logits: float32 `[width]`; scores: float64 `[width]`, the same after temperature.

    Returns:
        float64 `[width]`.
    """
    excess = torch.full_like(scores, -math.inf)
    if cut.min_p > 0.0:
        excess = excess.maximum(math.log(cut.min_p) - scores)
    if not cut.sorts:
        return excess
    order = order_keys(logits.unsqueeze(0))[0].argsort(descending=True)
    sorted_scores = scores[order]
    kept = torch.ones_like(sorted_scores, dtype=torch.bool)
    if cut.top_k:
        last, next_one = sorted_scores[cut.top_k - 1], sorted_scores[cut.top_k]
        kept[cut.top_k :] = False
        edge = torch.where(kept, next_one - sorted_scores, last - sorted_scores)
        excess[order] = excess[order].maximum(edge.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf))
    if cut.top_p < 1.0:
        mass = masses(sorted_scores) * kept
        before = mass.cumsum(0) - mass
        limit = max(cut.top_p, 1e-30) * mass.sum()  # a mass that changes by a factor: scores that change by its log
        excess[order] = excess[order].maximum((before / limit).log())
    return excess


def _gumbels(token_gaps: Tensor) -> Tensor:
    """Return `gumbel` of each gap, to within 1e-14."""
    return (token_gaps.double() * -GAP_UNIT).log1p_().neg_().log_().neg_()
