"""What the sampler is asked for each row, and what it answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import NumericalFault
from engine.sampling.logits import largest, log_mass, masses, order_keys
from engine.types.outputs import TokenCheck
from engine.types.sampling_params import SamplingParams

__all__ = ["Answers", "Described", "Sampled", "SamplingRow", "described"]


class SamplingRow(Protocol):
    """What the sampler needs to know of one row. `engine.scheduling.schedule.Draw` is one."""

    @property
    def params(self) -> SamplingParams: ...
    @property
    def seed(self) -> int: ...
    @property
    def choice_index(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def prompt_token_ids(self) -> tuple[int, ...]: ...
    @property
    def output_counts(self) -> Counter[int]: ...
    @property
    def records(self) -> bool:
        """Whether the scores of the draw are wanted."""

    @property
    def expected(self) -> int | None:
        """A token to compare the draw with; None if there is none."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token.

    Attributes:
        logprob: None unless `params.logprobs`. At most 0; finite.
        top: the `params.top_logprobs` likeliest (id, logprob), downward, equals by lowest id. Holds only ids that the
            tokenizer knows and whose probability is not zero, so it may be shorter than asked.
        score: of a row that is recorded: its raw log-probability and its perturbed score, each rounded to float32.
        margin: if asked for: how far its perturbed score is ahead of the second best; None if there is no other token.
        check: of a row with an expected token: how that token compares.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    score: tuple[float, float] | None = None
    margin: float | None = None
    check: TokenCheck | None = None


@dataclass(frozen=True, slots=True)
class Described:
    """A given token among all that could stand in its place: its raw log-probability and its rank, 1 for the
    likeliest.

    Attributes:
        top: as in `Sampled`.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class Answers:
    """Collects the answers of one batch, row by row."""

    def __init__(self, rows: Sequence[SamplingRow]) -> None:
        self.rows = rows
        self.results: dict[int, Sampled] = {}
        self.perturbed: dict[int, float] = {}
        """The perturbed score of what was drawn; none at temperature 0."""

    def token(self, row: int) -> int:
        return self.results[row].token_id

    def choose(self, rows: Sequence[int], tokens: list[int], perturbed: Sequence[float] = ()) -> None:
        self.results.update((i, Sampled(token)) for i, token in zip(rows, tokens, strict=True))
        self.perturbed.update(zip(rows, perturbed, strict=False))

    def add_margins(self, rows: list[int], values: list[float | None]) -> None:
        for i, value in zip(rows, values, strict=True):
            self.results[i] = replace(self.results[i], margin=value)

    def add_score(self, row: int, score: tuple[float, float], close: float) -> None:
        """Add the scores of what was drawn or, where a token was expected, of that one and how close it was."""
        expected, found = self.rows[row].expected, self.results[row]
        check = None if expected is None else TokenCheck(expected, found.token_id, *score, close)
        self.results[row] = replace(found, score=score, check=check)

    def describe(self, rows: list[int], scores: Tensor, chosen: Tensor, ids: Tensor | None, logits: Tensor) -> None:
        """Add log-probabilities.

        Args:
            scores: float64 `[n, m]`, the logarithms of unnormalised probabilities, the largest 0.
            chosen: int64 `[n, 1]`, the column of the chosen token.
            ids: int64 `[n, m]`, if the columns are tokens in order; else None, and column `i` is token `i`.
            logits: float32 `[n, width]`, by which to find the likeliest if `ids` is None.
        """
        wanted = [self.rows[i].params.top_logprobs for i in rows]
        count = min(max(wanted), scores.shape[-1] if ids is not None else logits.shape[-1])
        columns = [scores.gather(1, chosen), masses(scores).sum(-1, keepdim=True)]
        if count and ids is None:
            ids = largest(order_keys(logits), count)
            columns += [scores.gather(1, ids), ids]
        elif count and ids is not None:
            columns += [scores[:, :count], ids[:, :count]]
        # One transfer; ids and masses are rounded to float64, ids exactly.
        for i, limit, values in zip(rows, wanted, torch.cat(columns, dim=1).tolist(), strict=True):
            shift = log_mass(values[1])
            top = zip(values[2 + count :][:limit], values[2 : 2 + count], strict=False)
            listed = tuple((int(token), score - shift) for token, score in top if score > -math.inf)
            self.results[i] = replace(self.results[i], logprob=values[0] - shift, top=listed)


def described(token: int, limit: int, count: int, values: list[float], peak: float) -> Described | NumericalFault:
    """Read a row of `describe`: score, mass, rank, then `count` scores and `count` ids."""
    if not math.isfinite(peak):
        return NumericalFault("The model produced logits that are not finite for a token of the prompt.")
    shift = log_mass(int(values[1]))
    top = zip(values[3 + count :][:limit], values[3 : 3 + count], strict=False)
    listed = tuple((int(token), score - shift) for token, score in top if score > -math.inf)
    return Described(token, values[0] - shift, int(values[2]) + 1, listed)
