"""What the sampler is asked for each row, and what it answers: made of plain numbers. Touches no tensor.

A draw is decided here: `gumbel` is computed with the host's logarithm, for the few tokens that can win.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.errors import InvalidParameter, NumericalFault, VerbatimError
from engine.sampling.logits import log_mass
from engine.sampling.measures import rounded
from engine.sampling.rng import gap_of, gumbel, hash_token, stream_key
from engine.sampling.transfer import Rows
from engine.types.outputs import TokenCheck
from engine.types.sampling_params import SamplingParams

__all__ = ["Answers", "Described", "Sampled", "SamplingRow", "described"]

Top = tuple[tuple[int, float], ...]


class SamplingRow(Protocol):
    """What the sampler needs to know of one row. `engine.scheduling.schedule.Draw` is one."""

    @property
    def params(self) -> SamplingParams: ...
    @property
    def seed(self) -> int: ...
    @property
    def choice_index(self) -> int: ...
    @property
    def position(self) -> int:
        """Index of the token in the reply."""

    @property
    def generated(self) -> int:
        """Tokens of the reply that were generated before it: fewer than `position` where its beginning was given."""

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


@dataclass(slots=True)
class _Found:
    """What was read back for one row.

    Attributes:
        peak: its largest logit after the edits.
        token, place, score, perturbed: of what was drawn: its id, its place in `raw` and `edited`, its score, and its
            perturbed score, which there is none of at temperature 0.
        mass, processed_mass: the sums that log-probabilities are relative to.
        listed: scores and ids of the likeliest tokens.
        raw, edited: logits of the tokens among which the winner was, and of the expected one behind them.
        compared: perturbed score and closeness of an expected token that was not drawn.
    """

    peak: float = 0.0
    token: int = -1
    place: int = 0
    score: float = 0.0
    perturbed: float | None = None
    margin: float | None = None
    mass: float = 0.0
    processed_mass: float = 0.0
    listed: tuple[list[float], list[float]] = ([], [])
    raw: list[float] = field(default_factory=list)
    edited: list[float] = field(default_factory=list)
    compared: tuple[float, float] | None = None


class Answers:
    """Collects what was read back for the rows of one call, and makes the answers of it.

    Numbers come as rows of floats, in any order; a later one for the same row counts. Rows have their names, which are
    their numbers in the call.
    """

    def __init__(self, rows: Sequence[SamplingRow], sources: Sequence[int], width: int) -> None:
        self.rows = rows
        self.unsettled: list[int] = []
        """Rows whose winner is not certain yet."""
        self._sources = sources
        self._width = width
        self._found = [_Found() for _ in rows]
        self._faults: dict[int, VerbatimError] = {}
        self._raw_peaks: list[float] = []

    def add_peaks(self, names: list[int], raw: Rows, edited: Rows) -> None:
        """Add the largest logit of each row of the logits, and of each row after its edits."""
        self._raw_peaks = [peak for (peak,) in raw]
        for name, (peak,) in zip(names, edited, strict=True):
            self._found[name].peak = peak
            if fault := _fault(self.rows[name].position, self._raw_peaks[self._sources[name]], peak):
                self._faults[name] = fault

    def add_largest(self, names: list[int], tokens: Rows) -> None:
        """Add the tokens of rows that are not drawn from."""
        for name, (token,) in zip(names, tokens, strict=True):
            self._found[name].token = int(token)

    def add_contenders(self, names: list[int], ids: Rows, gaps: Rows, scores: Rows, settled: Rows) -> None:
        """Decide draws: the best perturbed score wins, the lowest id among equals.

        Args: as in `engine.sampling.contenders.Contenders`; whole numbers are below `2**53`, so their floats are exact.
        """
        for name, tokens, row_gaps, row_scores, (certain,) in zip(names, ids, gaps, scores, settled, strict=True):
            if name in self._faults:
                continue
            found, best, least = self._found[name], -math.inf, 0.0
            for place, score in enumerate(row_scores):
                if score == -math.inf:  # nor can those behind it win
                    break
                perturbed, token = score + gumbel(int(row_gaps[place])), tokens[place]
                if perturbed > best or (perturbed == best and token < least):
                    best, least, found.place, found.score = perturbed, token, place, score
            found.token, found.perturbed = int(least), best
            if not certain:
                self.unsettled.append(name)

    def add_best(self, names: list[int], scores: Rows, gaps: Rows | None = None) -> None:
        """Add the scores among which the two best are; the gaps of those that are drawn."""
        for j, (name, row) in enumerate(zip(names, scores, strict=True)):
            values = row if gaps is None else [s + gumbel(int(g)) for s, g in zip(row, gaps[j], strict=True)]
            self._found[name].margin = _ahead([value for value in values if value > -math.inf])

    def add_masses(self, names: list[int], masses: Rows) -> None:
        """Add the sums of the masses that log-probabilities are relative to."""
        for name, (mass,) in zip(names, masses, strict=True):
            self._found[name].mass = mass

    def add_processed(self, names: list[int], masses: Rows, scores: Rows, ids: Rows) -> None:
        """Add what processed log-probabilities are made of: the sums of masses, and the likeliest tokens."""
        for name, (mass,), *listed in zip(names, masses, scores, ids, strict=True):
            self._found[name].processed_mass = mass
            self._found[name].listed = listed[0], listed[1]

    def add_raw_list(self, names: list[int], logits: Rows, ids: Rows) -> None:
        """Add the likeliest tokens by the logits as they came."""
        for name, values, tokens in zip(names, logits, ids, strict=True):
            peak = self._raw_peak(name)
            self._found[name].listed = [value - peak for value in values], tokens

    def add_logits(self, names: list[int], raw: Rows, edited: Rows) -> None:
        """Add the logits of the tokens among which the winner is, before and after the edits; behind them that of the
        expected token, if the batch has any.
        """
        for name, before, after in zip(names, raw, edited, strict=True):
            self._found[name].raw, self._found[name].edited = before, after

    def add_closeness(self, name: int, own: float, needed: Rows) -> None:
        """Add by how much scores would have to change for the expected token to be drawn."""
        self._found[name].compared = own, max(*needed[0], 0.0)

    def pairs_to_compare(self) -> list[tuple[int, float]]:
        """Return the rows in which another token than the expected one was drawn, although that one could have been,
        and its perturbed score in each.
        """
        pairs = []
        for name, row in enumerate(self.rows):
            found, expected, temperature = self._found[name], row.expected, row.params.temperature
            if expected is None or name in self._faults or found.token == expected or expected >= self._width:
                continue
            if temperature and found.edited[-1] > -math.inf:
                gap = gap_of(hash_token(stream_key(row.seed, row.choice_index, row.position), expected))
                pairs.append((name, (found.edited[-1] - found.peak) / temperature + gumbel(gap)))
        return pairs

    def results(self) -> list[Sampled | VerbatimError]:
        """Return one answer a row."""
        return [self._faults.get(name) or self._result(name) for name in range(len(self.rows))]

    def _result(self, name: int) -> Sampled:
        row, found = self.rows[name], self._found[name]
        logprob, score, check = None, None, None
        top: Top = ()
        if row.params.logprobs:
            logprob, top = self._logprobs(name)
        if row.records or row.expected is not None:
            score, closeness = self._score(name)
            if row.expected is not None:
                check = TokenCheck(row.expected, found.token, *score, closeness)
        return Sampled(found.token, logprob, top, score, found.margin, check)

    def _logprobs(self, name: int) -> tuple[float, Top]:
        """Return the log-probability of what was drawn, and the likeliest tokens."""
        params, found = self.rows[name].params, self._found[name]
        if params.logprobs_mode == "raw":
            shift, own = log_mass(found.mass), found.raw[found.place] - self._raw_peak(name)
        else:
            shift, own = log_mass(found.processed_mass), found.score
        return own - shift, _top(params.top_logprobs, *found.listed, shift)

    def _score(self, name: int) -> tuple[tuple[float, float], float]:
        """Return the scores of what was drawn or, where a token was expected, of that one and how close it was."""
        row, found = self.rows[name], self._found[name]
        place = found.place if row.expected is None else -1
        perturbed, closeness = found.edited[place] if found.perturbed is None else found.perturbed, 0.0
        if row.expected is not None and row.expected != found.token:
            perturbed, closeness = -math.inf, math.inf  # of a token that a bias or a grammar forbids
            if found.compared is not None:
                perturbed, closeness = found.compared
            elif row.params.temperature == 0.0 and row.expected < self._width:
                perturbed, closeness = found.edited[-1], found.edited[found.place] - found.edited[-1]
        logprob = found.raw[place] - self._raw_peak(name) - log_mass(found.mass)
        return (rounded(logprob), rounded(perturbed)), closeness

    def _raw_peak(self, name: int) -> float:
        return self._raw_peaks[self._sources[name]]


def _top(limit: int, scores: list[float], ids: list[float], shift: float) -> Top:
    listed = zip(ids[:limit], scores, strict=False)
    return tuple((int(token), score - shift) for token, score in listed if score > -math.inf)


def _ahead(scores: list[float]) -> float | None:
    """Return how far the best of some scores is ahead of the second best; None if there is no second one."""
    best = sorted(scores, reverse=True)
    return best[0] - best[1] if len(best) > 1 else None


def _fault(position: int, raw_peak: float, peak: float) -> VerbatimError | None:
    """Return why a row cannot be answered, from its largest logit before and after the edits."""
    if not math.isfinite(raw_peak) or math.isnan(peak) or peak == math.inf:
        return NumericalFault(f"The model produced logits that are not finite for token {position}.")
    if peak == -math.inf:
        return InvalidParameter(
            f"logit_bias, min_tokens and the grammar together forbid every token at position {position}.",
            param="logit_bias",
            code="no_token_left",
        )
    return None


def described(
    token: int,
    limit: int,
    peak: float,
    score: float,
    mass: float,
    rank: float,
    scores: list[float],
    ids: list[float],
) -> Described | NumericalFault:
    """Make a description of what was read back for a token.

    Args:
        limit: how many of the likeliest tokens to list.
        peak: the largest logit; score: the token's logit less that; mass: the sum of all masses.
        rank: how many tokens are likelier.
        scores, ids: of the likeliest tokens.
    """
    if not math.isfinite(peak):
        return NumericalFault("The model produced logits that are not finite for a token of the prompt.")
    shift = log_mass(mass)
    return Described(token, score - shift, int(rank) + 1, _top(limit, scores, ids, shift))
