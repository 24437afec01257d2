"""Turns edited logits into the tokens that may be drawn: temperature and filters. Draws nothing.

Knows nothing of requests, seeds or steps; works on tensors and on lists of plain numbers. Each step is a function here;
the sampler calls them after `engine.sampling.edits`. None but `keep_mass` reads a number back from the device.

A row does not depend on its neighbours or on the number of threads, because every step is element-wise, or a maximum,
or a selection by a total order, or a sum of *integers*: no sum rounds in an order that the batch decides. Probability
mass is counted in whole quanta of 2**-42 of the likeliest token's (`masses`), which add up to the same number in any
order; a vocabulary of 150,000 loses at most 4e-8 of the mass to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = [
    "MAX_VOCABULARY",
    "Filter",
    "Filters",
    "Kept",
    "keep_all",
    "keep_first",
    "keep_mass",
    "largest",
    "log_mass",
    "masses",
    "order_keys",
    "scaled",
    "sum_masses",
]

MASS_UNIT: Final = 2.0**-42
MAX_VOCABULARY: Final = 2**20  # 2**20 tokens of 2**42 quanta each: their sum still fits an int64
_NEGLIGIBLE: Final = -40.0  # e**-40 is less than one quantum
_PIECE: Final = 2**15  # columns
_FEW: Final = 64  # tokens that are sorted at first: enough for a peaked row
_SMALL: Final = 8192  # logits up to which sorting all is faster than searching
_RANGES: Final = 4096  # of scores between `_NEGLIGIBLE` and 0, 0.01 wide each


@dataclass(frozen=True, slots=True)
class Filter:
    """Temperature and filters of one row. `top_k` 0 keeps all. At temperature 0 nothing is drawn, so it is above 0."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def sorts(self) -> bool:
        """Whether the kept set depends on the order of the tokens, not on each one alone."""
        return self.top_k > 0 or self.top_p < 1.0


class Filters:
    """The filters of `n` rows, as numbers here and as one table on the device of the logits.

    Args:
        filters: of each row.
        table: float64 `[n, 4]`, the `numbers` of the same filters.
    """

    def __init__(self, filters: list[Filter], table: Tensor) -> None:
        self._filters = filters
        self._table = table

    @staticmethod
    def numbers(filters: list[Filter]) -> list[float]:
        """Return what the table of some filters holds, row by row: temperature, top_p, top_k and the logarithm of
        min_p, infinite where nothing is cut.
        """
        values: list[float] = []
        for c in filters:
            floor = math.log(c.min_p) if c.min_p > 0.0 else -math.inf
            values += (c.temperature, c.top_p, c.top_k or math.inf, floor)
        return values

    @property
    def temperatures(self) -> Tensor:
        return self._table[:, 0:1]

    @property
    def top_ps(self) -> Tensor:
        return self._table[:, 1:2]

    @property
    def firsts(self) -> Tensor:
        """How many tokens top_k keeps; infinity for all."""
        return self._table[:, 2:3]

    def __len__(self) -> int:
        return len(self._filters)

    def __iter__(self) -> Iterator[Filter]:
        return iter(self._filters)

    def part(self, start: int, end: int) -> Filters:
        return self if end - start == len(self) else Filters(self._filters[start:end], self._table[start:end])

    def apply_min_p(self, scores: Tensor) -> None:
        if any(c.min_p > 0.0 for c in self._filters):
            scores.masked_fill_(scores < self._table[:, 3:4], -math.inf)


@dataclass(frozen=True, slots=True)
class Kept:
    """The tokens of `n` rows that may be drawn.

    Attributes:
        scores: float64 `[n, m]`, `(logit - largest) / temperature`; -inf where the token is not kept. Each row has a 0.
        ids: int64 `[n, m]`, likeliest first, equals by lowest id; None where column `i` is token `i`.
        settled: bool `[n, 1]`, whether these are all tokens that may be drawn; None where that is so in every row.
    """

    scores: Tensor
    ids: Tensor | None
    settled: Tensor | None = None


def order_keys(logits: Tensor) -> Tensor:
    """Give each token one integer that sorts by logit, largest first, and equal logits by lowest id. No two are equal.

    So a partial selection and a full sort agree, and no kernel decides a tie. The bits of a float32, those of negative
    numbers flipped, compare like the number itself.

    Args:
        logits: float32 `[rows, width]`, no NaN.

    Returns:
        int64 `[rows, width]`; token `id` of key `k` is `(-k) & 0xFFFFFFFF`.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: minus zero and zero are one number
    keys = (bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)).long()
    return keys.bitwise_left_shift_(32).sub_(torch.arange(logits.shape[-1], device=logits.device))


def largest(keys: Tensor, count: int) -> Tensor:
    """Return the ids of the first `count` tokens in the order of `order_keys`: int64 `[rows, count]`."""
    return keys.topk(count, dim=-1).values.neg_().bitwise_and_(0xFFFFFFFF)


def scaled(logits: Tensor, peaks: Tensor, temperatures: Tensor | float = 1.0) -> Tensor:
    """Compute `(logit - peak) / temperature` in float64.

    That is `logit / temperature` up to a shift that all tokens share. The shift changes no draw and no probability, and
    keeps the smallest temperatures from overflowing.

    Args:
        logits: float32 `[n, m]`.
        peaks: float64 `[n, 1]`, the largest logit of each row, finite.
        temperatures: float64 `[n, 1]`, above 0.

    Returns:
        float64 `[n, m]`, at most 0, owned by the caller.
    """
    scores = logits.double().sub_(peaks)
    return scores if isinstance(temperatures, float) and temperatures == 1.0 else scores.div_(temperatures)


def masses(scores: Tensor) -> Tensor:
    """Return each token's weight `e**score` in whole quanta, rounded down: int64, `2**42` for the likeliest token."""
    return scores.clamp(min=_NEGLIGIBLE).exp_().mul_(1 / MASS_UNIT).long()


def sum_masses(logits: Tensor, peaks: Tensor) -> Tensor:
    """Return the sum of the `masses` of each row at temperature 1, int64 `[n, 1]`, without large temporaries.

    Whole numbers add up to the same in any order. Small pieces stay in memory that the process has already.

    Args: as `scaled`.
    """
    total = torch.zeros(peaks.shape, dtype=torch.int64, device=logits.device)
    for part in torch.split(logits, _PIECE, dim=-1):
        scores = part.double().sub_(peaks)
        total += scores.clamp_(min=_NEGLIGIBLE).exp_().mul_(1 / MASS_UNIT).long().sum(-1, keepdim=True)
    return total


def log_mass(total: float) -> float:
    """Return the logarithm of a sum of `masses`: `score - log_mass(total)` is a log-probability."""
    return math.log(total * MASS_UNIT)


def keep_all(logits: Tensor, peaks: Tensor, filters: Filters) -> Kept:
    """Apply temperature and min_p, which look at each token alone: nothing is sorted.

    min_p keeps `p >= min_p * p_max`, taken as `score >= ln(min_p)`.

    Args:
        logits: float32 `[n, width]`, left as it is.
        peaks: float64 `[n, 1]`, the largest logit of each row.
        filters: of the same rows.
    """
    scores = scaled(logits, peaks, filters.temperatures)
    filters.apply_min_p(scores)
    return Kept(scores, None)


def keep_first(logits: Tensor, peaks: Tensor, filters: Filters, head: int | None = None) -> Kept:
    """Apply top_k, then top_p, then min_p to tokens in order: likeliest first, equals by lowest id.

    top_k keeps exactly k. top_p keeps the shortest run whose mass is at least top_p of what top_k left, and at least
    one token. For a peaked row it is enough to sort the first few tokens. A flat one, whose mass they do not reach, is
    not settled: it needs a larger `head`, or `keep_mass`.

    Args: as `keep_all`, but every filter must be one that sorts, and
        head: how many tokens to sort, at least the largest top_k. None: a few.
    """
    assert all(c.sorts for c in filters)
    width = logits.shape[-1]
    if head is None:
        head = width if logits.numel() <= _SMALL else _FEW
    head = min(width, max(head, *(c.top_k for c in filters)))
    totals = _totals(logits, peaks, filters)
    ids = largest(order_keys(logits), head)
    scores = scaled(logits.gather(1, ids), peaks, filters.temperatures)
    reached = _ban_rest(scores, totals, filters)
    filters.apply_min_p(scores)
    return Kept(scores, ids, None if head == width else reached)


def _totals(logits: Tensor, peaks: Tensor, filters: Filters) -> Tensor:
    """Return the mass of each whole row, int64 `[n, 1]`; means nothing for rows with top_k, which do not need it."""
    totals = torch.zeros(peaks.shape, dtype=torch.int64, device=peaks.device)
    if whole := [i for i, c in enumerate(filters) if not c.top_k]:
        # A slice needs no index on the device. The sampler puts these rows side by side.
        at = slice(whole[0], whole[-1] + 1)
        totals[at] = masses(scaled(logits[at], peaks[at], filters.temperatures[at])).sum(-1, keepdim=True)
    return totals


def _ban_rest(scores: Tensor, totals: Tensor, filters: Filters) -> Tensor | None:
    """Ban what top_k and top_p leave out of sorted `scores` `[n, head]`, in place.

    Returns:
        Which rows that settles, bool `[n, 1]`; None for all of them.
    """
    mass = None
    if any(c.top_k for c in filters):
        outside = torch.arange(scores.shape[-1], device=scores.device) >= filters.firsts
        scores.masked_fill_(outside, -math.inf)
        mass = masses(scores)
        totals = torch.where(filters.firsts < math.inf, mass.sum(-1, keepdim=True), totals)
    if all(c.top_p >= 1.0 for c in filters):
        return None
    mass = masses(scores) if mass is None else mass
    upto = mass.cumsum(-1)
    limits = _limits(totals, filters)
    scores.masked_fill_(upto - mass >= limits, -math.inf)
    if all(c.top_k for c in filters):
        return None
    return (upto[:, -1:] >= limits) | (filters.firsts < math.inf)


def keep_mass(logits: Tensor, peaks: Tensor, filters: Filters) -> Kept:
    """Apply top_p and min_p without sorting all: a histogram finds the narrow range of scores where the mass is
    reached.

    Tokens above that range are kept, tokens below are not, and only those inside are sorted. This is exact, since every
    sum is of integers and the range of a token is a monotone function of its logit. Much cheaper on a CPU than sorting
    all. The host reads how many tokens are in the range, so a GPU would have to be waited for.

    Args: as `keep_all`; no filter has top_k.
    """
    assert not any(c.top_k for c in filters)
    scores = scaled(logits, peaks, filters.temperatures)
    mass = masses(scores)
    limits = _limits(mass.sum(-1, keepdim=True), filters)
    place = (scores * (_RANGES / _NEGLIGIBLE)).clamp_(max=_RANGES - 1).long()
    histogram = torch.zeros(len(scores), _RANGES, dtype=torch.int64, device=scores.device).scatter_add_(1, place, mass)
    upto = histogram.cumsum(-1)
    edge = (upto < limits).sum(-1, keepdim=True)
    scores.masked_fill_(place > edge, -math.inf)

    row, column = (place == edge).nonzero().unbind(1)
    order = logits[row, column].argsort(descending=True, stable=True)  # stable: equals stay by lowest id
    order = order[row[order].argsort(stable=True)]  # by row, and within a row likeliest first
    row, column = row[order], column[order]
    inside = mass[row, column]
    # The mass before a token: earlier ranges of its row, and earlier tokens of its row in the list.
    within = histogram.gather(1, edge)
    earlier_rows = within.cumsum(0) - within
    before = (upto.gather(1, edge) - within - earlier_rows)[row, 0] + inside.cumsum(0) - inside
    beyond = before >= limits[row, 0]
    scores[row, column] = scores[row, column].masked_fill_(beyond, -math.inf)
    filters.apply_min_p(scores)
    return Kept(scores, None)


def _limits(totals: Tensor, filters: Filters) -> Tensor:
    """Return the mass before a token from which on top_p leaves the token out: int64 `[n, 1]`, at least one quantum."""
    # 0 for top_p = 0 would leave out even the first token; 1 leaves out all but it. Nothing is left out at top_p = 1.
    shares = (totals.double() * filters.top_ps).ceil_().clamp_(min=1.0).long()
    return torch.where(filters.top_ps < 1.0, torch.minimum(shares, totals), 2**62)
