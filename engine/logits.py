"""From a model's logits to the set of tokens that may be drawn: edits, temperature, filters. Draws nothing.

Knows nothing of requests, seeds or steps; works on tensors and on lists of plain numbers. The order is the sampler's
(`bias`, `repetition`, `penalties`, `ban`, then `scaled` and the filters), each step is a function here.

How a row stays independent of its neighbours, of the thread count and of the way it was computed: every step is
element-wise, or a maximum, or a selection by a total order, or a sum of *integers*. Nothing rounds in an order that
somebody else chooses. Probability mass is counted in whole quanta of 2**-42 of the likeliest token's (`masses`), which
add up to the same number in any order; a vocabulary of 150,000 loses at most 4e-8 of the mass to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = [
    "MAX_VOCABULARY",
    "Cut",
    "Edits",
    "Kept",
    "keep_all",
    "keep_first",
    "largest",
    "log_mass",
    "masses",
    "order_keys",
    "scaled",
]

MASS_UNIT: Final = 2.0**-42
MAX_VOCABULARY: Final = 2**20  # 2**20 tokens of 2**42 quanta each: their sum still fits an int64
_NEGLIGIBLE: Final = -40.0  # e**-40 is less than one quantum


@dataclass(frozen=True, slots=True)
class Cut:
    """How one row is narrowed. `top_k` 0 keeps all; a temperature of 0 has no place here: it draws nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def sorts(self) -> bool:
        """Whether the kept set depends on the order of the tokens, not on each one alone."""
        return self.top_k > 0 or self.top_p < 1.0


@dataclass(frozen=True, slots=True)
class Kept:
    """The tokens of some rows that may be drawn.

    Attributes:
        rows: the batch rows that these are, `n` of them.
        scores: float64 `[n, m]`, `(logit - largest) / temperature`; -inf where the token is not kept. Each row has a 0.
        ids: int64 `[n, m]`, likeliest first, equals by lowest id; None where column `i` is token `i`.
    """

    rows: list[int]
    scores: Tensor
    ids: Tensor | None


class Edits:
    """Sparse changes to a batch of logits, gathered row by row, then applied with one operation a kind.

    Ids outside `0 … width - 1` are left out: they are banned in any case.

    Args:
        width: columns of the logits that will be edited.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._bias: tuple[list[int], list[float]] = ([], [])
        self._penalties: tuple[list[int], list[float]] = ([], [])
        self._repeats: list[tuple[Tensor, float]] = []
        self._repeated: tuple[list[int], list[float]] = ([], [])
        self._bans: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._bias[0] or self._penalties[0] or self._repeats or self._repeated[0] or self._bans)

    def bias(self, row: int, pairs: tuple[tuple[int, float], ...]) -> None:
        """`logit += bias`; -100 bans. Ids are unique."""
        inside = [(i, b) for i, b in pairs if 0 <= i < self.width]
        self._bias[0].extend(row * self.width + i for i, _ in inside)
        self._bias[1].extend(b if b > -100.0 else -math.inf for _, b in inside)

    def repetition(self, row: int, prompt_ids: Tensor, output_ids: list[int], penalty: float) -> None:
        """`logit / penalty` where positive, else `logit * penalty` (Keskar et al. 2019, as in transformers).

        Args:
            prompt_ids: int64 `[ids]`, all below `width`. An id that is given twice is penalised once.
        """
        self._repeats.append((prompt_ids + row * self.width, penalty))
        inside = [row * self.width + i for i in output_ids if i < self.width]
        self._repeated[0].extend(inside)
        self._repeated[1].extend([penalty] * len(inside))

    def penalties(self, row: int, counts: dict[int, int], frequency: float, presence: float) -> None:
        """`logit -= frequency * count + presence` for every id with a count."""
        inside = [(i, n) for i, n in counts.items() if n > 0 and i < self.width]
        self._penalties[0].extend(row * self.width + i for i, _ in inside)
        self._penalties[1].extend(-(frequency * n + presence) for _, n in inside)

    def ban(self, row: int, ids: tuple[int, ...]) -> None:
        self._bans.extend(row * self.width + i for i in ids if 0 <= i < self.width)

    def apply(self, logits: Tensor) -> None:
        """Change `logits` in place, in the fixed order: float32 `[rows, width]`, contiguous, owned by the caller."""
        flat, device = logits.view(-1), logits.device
        _add(flat, *self._bias)
        self._penalise_repeats(flat)
        _add(flat, *self._penalties)
        if self._bans:
            flat.index_fill_(0, torch.tensor(self._bans, device=device), -math.inf)

    def _penalise_repeats(self, flat: Tensor) -> None:
        if not self._repeats:
            return
        device = flat.device
        at = [*(ids for ids, _ in self._repeats), torch.tensor(self._repeated[0], dtype=torch.int64, device=device)]
        by = [ids.new_full(ids.shape, penalty, dtype=torch.float32) for ids, penalty in self._repeats]
        by.append(torch.tensor(self._repeated[1], dtype=torch.float32, device=device))
        index, penalty = torch.cat(at), torch.cat(by)
        before = flat[index]
        # An id that stands in the prompt and in the output is written twice, with the same value.
        flat[index] = torch.where(before > 0, before / penalty, before * penalty)


def _add(flat: Tensor, index: list[int], values: list[float]) -> None:
    if index:
        at = torch.tensor(index, device=flat.device)
        flat.index_add_(0, at, torch.tensor(values, dtype=torch.float32, device=flat.device))


def order_keys(logits: Tensor) -> Tensor:
    """One integer per token that sorts by logit downward, equals by lowest id upward: no two are the same.

    So a partial selection and a full sort cannot disagree, and no tie is left to a kernel. The bits of a float32,
    those of negative numbers flipped, compare like the number itself.

    Args:
        logits: float32 `[rows, width]`, no NaN.

    Returns:
        int64 `[rows, width]`; token `id` of key `k` is `(-k) & 0xFFFFFFFF`.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: minus zero and zero are one number
    keys = (bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)).long()
    return keys.bitwise_left_shift_(32).sub_(torch.arange(logits.shape[-1], device=logits.device))


def largest(keys: Tensor, count: int) -> Tensor:
    """Ids of the first `count` tokens in the order of `order_keys`: int64 `[rows, count]`."""
    return keys.topk(count, dim=-1).values.neg_().bitwise_and_(0xFFFFFFFF)


def scaled(logits: Tensor, peaks: Tensor, temperatures: Tensor | float = 1.0) -> Tensor:
    """`(logit - peak) / temperature` in float64: the formula's `logit / T` but for a shift that all tokens share.

    The shift changes no draw and no probability, and keeps the smallest temperatures from overflowing.

    Args:
        logits: float32 `[n, m]`.
        peaks: float64 `[n, 1]`, the largest logit of each row, finite.
        temperatures: float64 `[n, 1]`, above 0.

    Returns:
        float64 `[n, m]`, at most 0, owned by the caller.
    """
    return logits.double().sub_(peaks).div_(temperatures)


def masses(scores: Tensor) -> Tensor:
    """The weight `e**score` of each token in whole quanta, rounded down: int64, `2**42` for the likeliest."""
    return scores.clamp(min=_NEGLIGIBLE).exp_().mul_(1 / MASS_UNIT).long()


def log_mass(total: int) -> float:
    """The logarithm of a sum of `masses`: `score - log_mass(total)` is a log-probability."""
    return math.log(total * MASS_UNIT)


def keep_all(rows: list[int], logits: Tensor, peaks: Tensor, cuts: list[Cut]) -> Kept:
    """Temperature and min_p, which look at each token alone: nothing is sorted.

    min_p keeps `p >= min_p * p_max`, taken as `score >= ln(min_p)`.

    Args:
        rows: names of the rows, passed on.
        logits: float32 `[n, width]`, left as it is.
        peaks: float64 `[n, 1]`, the largest logit of each row.
        cuts: one a row.
    """
    scores = scaled(logits, peaks, _column([c.temperature for c in cuts], logits))
    _apply_min_p(scores, cuts)
    return Kept(rows, scores, None)


def keep_first(rows: list[int], logits: Tensor, peaks: Tensor, cuts: list[Cut]) -> list[Kept]:
    """top_k, then top_p, then min_p, on tokens in order: likeliest first, equals by lowest id.

    top_k keeps exactly k. top_p keeps the shortest run whose mass is at least top_p of what top_k left, and at least
    one token. Only as many tokens are brought into order as it takes; rows that need more get more, alone.

    Args: as `keep_all`. The rows come back in one or several parts, in any order.
    """
    width = logits.shape[-1]
    temperatures = _column([c.temperature for c in cuts], logits)
    keys = order_keys(logits)
    totals = torch.zeros(peaks.shape, dtype=torch.int64, device=peaks.device)
    if whole := [i for i, c in enumerate(cuts) if not c.top_k]:  # for the others, the mass of their first k is all
        at = slice(None) if len(whole) == len(cuts) else torch.tensor(whole, device=logits.device)
        totals[at] = masses(scaled(logits[at], peaks[at], temperatures[at])).sum(-1, keepdim=True)
    parts: list[Kept] = []
    waiting, span = list(range(len(rows))), 0
    while waiting:
        span = min(width, span * 16 or max(64, *(cuts[i].top_k for i in waiting)))
        pick = slice(None) if len(waiting) == len(rows) else torch.tensor(waiting, device=logits.device)
        ids = largest(keys[pick], span)
        scores = scaled(logits[pick].gather(1, ids), peaks[pick], temperatures[pick])
        some = [cuts[i] for i in waiting]
        reached = _cut(scores, totals[pick], some)
        _apply_min_p(scores, some)
        done = [j for j, enough in enumerate(reached) if enough or span == width]
        part = Kept([rows[waiting[j]] for j in done], scores, ids)
        if len(done) < len(waiting):
            at = torch.tensor(done, dtype=torch.int64, device=logits.device)
            part = Kept(part.rows, scores[at], ids[at])
        if done:
            parts.append(part)
        waiting = [i for j, i in enumerate(waiting) if j not in set(done)]
    return parts


def _cut(scores: Tensor, totals: Tensor, cuts: list[Cut]) -> list[bool]:
    """Ban what top_k and top_p leave out of sorted `scores` `[n, span]`, in place; say which rows needed no more."""
    span = scores.shape[-1]
    mass = masses(scores)
    if any(c.top_k for c in cuts):
        first = _column([c.top_k or span for c in cuts], scores, torch.int64)
        outside = torch.arange(span, device=scores.device) >= first
        scores.masked_fill_(outside, -math.inf)
        mass.masked_fill_(outside, 0)
        totals = torch.where(
            _column([c.top_k > 0 for c in cuts], scores, torch.bool), mass.sum(-1, keepdim=True), totals
        )
    if all(c.top_p >= 1.0 for c in cuts):
        return [True] * len(cuts)
    upto = mass.cumsum(-1)
    # At least one quantum: the first token always stands before it. No limit at all for top_p = 1.
    limit = totals.double() * _column([c.top_p if c.top_p < 1.0 else math.inf for c in cuts], scores)
    limit.clamp_(min=1.0)
    scores.masked_fill_((upto - mass).double() >= limit, -math.inf)
    reached = (upto[:, -1:].double() >= limit).flatten().tolist()
    return [enough or c.top_k > 0 for enough, c in zip(reached, cuts, strict=True)]


def _apply_min_p(scores: Tensor, cuts: list[Cut]) -> None:
    if any(c.min_p > 0.0 for c in cuts):
        floors = _column([math.log(c.min_p) if c.min_p > 0.0 else -math.inf for c in cuts], scores)
        scores.masked_fill_(scores < floors, -math.inf)


def _column(values: list[float] | list[int] | list[bool], like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device).unsqueeze(1)
