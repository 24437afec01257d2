"""Chooses the next token of every row: logits in, token ids and log-probabilities out.

Knows nothing of text, of stopping or of the model. A draw is the Gumbel-max trick with the stateless bits of
`engine.sampling.rng`, so it depends on the row's logits, parameters, seed, choice and position alone.

    token = argmax over kept ids i of  (logit_i - largest) / T + gumbel(seed, choice, position, i)    lowest id on ties

(float64; the shift by the largest logit is shared by all tokens and changes no draw.) The Gumbel value is computed for
a handful of tokens only, those that can still win: see `_contenders`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from engine.errors import InvalidParameter, NumericalFault, VerbatimError
from engine.sampling.answers import Answers, Described, Sampled, SamplingRow, described
from engine.sampling.logits import (
    MAX_VOCABULARY,
    Edits,
    Filter,
    Filters,
    Kept,
    keep_all,
    keep_first,
    largest,
    log_mass,
    masses,
    order_keys,
    scaled,
    sum_masses,
)
from engine.sampling.measures import closeness, closeness_of_largest, margins, margins_of_largest, rounded
from engine.sampling.rng import GAP_UNIT, gaps, gumbel, stream_key, token_steps
from engine.types.sampling_params import SamplingParams

__all__ = ["Described", "Sampled", "Sampler", "SamplingRow"]

_CHUNK_CPU: Final = 2**18  # logits looked at together: the temporaries of one such chunk stay in the cache
_CHUNK_DEVICE: Final = 2**24
_SLACK: Final = 1.0 + 2.0**-14
_CACHED_PROMPTS: Final = 64


class Sampler:
    """Samples batches for one model. Use it from one thread at a time.

    Args:
        vocab_size: columns of the model's logits, padding rows included.
        invalid_ids: columns that are no token of the tokenizer; never produced, never listed.
        end_ids: tokens that end a reply; banned, with `stop_token_ids`, before `min_tokens`.
        device: where the logits will be.

    Raises:
        ValueError: a vocabulary that is too large, or in which no id is valid.
    """

    def __init__(
        self, vocab_size: int, invalid_ids: Sequence[int], end_ids: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        if vocab_size > MAX_VOCABULARY:
            raise ValueError(f"a vocabulary may have at most {MAX_VOCABULARY} tokens, not {vocab_size}")
        self.vocab_size = vocab_size
        self.end_ids = tuple(end_ids)
        self.device = torch.device(device)
        invalid = {i for i in invalid_ids if 0 <= i < vocab_size}
        if len(invalid) == vocab_size:
            raise ValueError(f"none of the {vocab_size} token ids is valid")
        # Padding rows stand at the end: columns from `width` on are never looked at, which needs no mask.
        self._width = 1 + max(i for i in range(vocab_size) if i not in invalid)
        self._holes = torch.tensor(sorted(i for i in invalid if i < self._width), dtype=torch.int64, device=self.device)
        self._steps = token_steps(self._width, self.device)
        self._chunk = max(1, (_CHUNK_CPU if self.device.type == "cpu" else _CHUNK_DEVICE) // vocab_size)
        self._prompts: OrderedDict[int, tuple[tuple[int, ...], Tensor]] = OrderedDict()

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        rows: Sequence[SamplingRow],
        logit_rows: Sequence[int] | None = None,
        allowed: Tensor | None = None,
    ) -> list[Sampled | VerbatimError]:
        """Choose one token for every row.

        `logprobs_mode` raw: of the untouched logits over the whole model vocabulary. processed: of the distribution
        that is drawn from, after temperature and filters; for temperature 0, of the edited and masked logits. Both in
        float64, from an integer sum of masses: the same bits in any batch (see `engine.sampling.logits`).

        Args:
            logits: float32 `[logit rows, vocab_size]`; remains the caller's, never written to.
            rows: what to choose, in the order of the answer.
            logit_rows: which row of `logits` each of `rows` draws from; several may share one. None: the same order.
            allowed: bool `[rows, vocab_size]`, False where a grammar forbids the token. Applied last.

        Returns:
            One result a row. A row that cannot be answered holds an error, the others are unaffected: `NumericalFault`
            where the logits hold NaN or +inf, or nothing but -inf; `InvalidParameter` (code `no_token_left`) where
            biases, `min_tokens` and the grammar together forbid every token.
        """
        if not rows:
            return []
        assert logits.dtype == torch.float32, logits.dtype
        assert logits.shape[1] == self.vocab_size, logits.shape
        # Rows of one group are put side by side, so that each group is one slice of the batch.
        ways = [self._way(row.params) for row in rows]
        order = sorted(range(len(rows)), key=ways.__getitem__)
        ranked = [rows[i] for i in order]
        sources = order if logit_rows is None else [logit_rows[i] for i in order]
        work = self._edited(logits, ranked, sources, None if allowed is None else allowed[order])
        raw_peaks, peaks = logits.amax(-1), work.amax(-1)  # NaN wins a maximum
        faults = _faults(ranked, sources, raw_peaks.tolist(), peaks.tolist())
        if faults:
            return self._sample_others(logits, rows, logit_rows, allowed, {order[i]: e for i, e in faults.items()})
        answers = Answers(ranked)
        self._choose(answers, work, peaks.double().unsqueeze(1), [ways[i] for i in order])
        self._describe_raw(answers, logits, raw_peaks.double().unsqueeze(1), sources)
        self._measure(answers, logits, raw_peaks, work, sources)
        place = {i: rank for rank, i in enumerate(order)}
        return [answers.results[place[i]] for i in range(len(rows))]

    def _sample_others(
        self,
        logits: Tensor,
        rows: Sequence[SamplingRow],
        logit_rows: Sequence[int] | None,
        allowed: Tensor | None,
        faults: dict[int, VerbatimError],
    ) -> list[Sampled | VerbatimError]:
        """Sample again without the rows that cannot be answered. This is rare."""
        others = [i for i in range(len(rows)) if i not in faults]
        sources = others if logit_rows is None else [logit_rows[i] for i in others]
        found = self.sample(logits, [rows[i] for i in others], sources, None if allowed is None else allowed[others])
        results = dict(zip(others, found, strict=True))
        return [faults[i] if i in faults else results[i] for i in range(len(rows))]

    def _way(self, params: SamplingParams) -> int:
        """Return the group that a row is computed with: 0 greedy, 1 nothing to sort, else by how many tokens are
        sorted.

        So a row that wants 100,000 tokens sorted does not slow down those that want 50.
        """
        if params.temperature == 0.0:
            return 0
        cut = self._filter(params)
        return 1 + (max(64, cut.top_k) - 1).bit_length() if cut.sorts else 1

    def _filter(self, params: SamplingParams) -> Filter:
        top_k = params.top_k if params.top_k < self._width else 0
        return Filter(params.temperature, top_k, params.top_p, params.min_p)

    # Edits

    def _edited(
        self, logits: Tensor, rows: Sequence[SamplingRow], sources: list[int], allowed: Tensor | None
    ) -> Tensor:
        """Return the logits to choose from, `[rows, width]`: a view of the caller's if nothing changes, else a copy."""
        edits = Edits(self._width)
        for i, row in enumerate(rows):
            p = row.params
            if p.logit_bias:
                edits.bias(i, p.logit_bias)
            if p.repetition_penalty != 1.0:
                prompt = self._prompt_ids(row.prompt_token_ids)
                edits.repetition(i, prompt, list(row.output_counts), p.repetition_penalty)
            if p.frequency_penalty or p.presence_penalty:
                edits.penalties(i, row.output_counts, p.frequency_penalty, p.presence_penalty)
            if row.position < p.min_tokens:
                edits.ban(i, self.end_ids + p.stop_token_ids)
        tokens = logits[:, : self._width]
        untouched = not edits and allowed is None and not self._holes.numel()
        if untouched and sources == list(range(len(rows))):
            return tokens[: len(rows)]
        work = tokens.index_select(0, torch.tensor(sources, device=self.device))
        edits.apply(work)
        if self._holes.numel():
            work.index_fill_(1, self._holes, -math.inf)
        if allowed is not None:
            work.masked_fill_(~allowed[:, : self._width], -math.inf)
        return work

    def _prompt_ids(self, prompt: tuple[int, ...]) -> Tensor:
        """Return the distinct ids of a prompt. They are kept, because each step of a reply has the same prompt."""
        name = id(prompt)  # stays its own as long as the entry holds the tuple
        if name not in self._prompts:
            ids = sorted({i for i in prompt if i < self._width})
            self._prompts[name] = (prompt, torch.tensor(ids, dtype=torch.int64, device=self.device))
            if len(self._prompts) > _CACHED_PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(name)
        return self._prompts[name][1]

    # Choosing

    def _choose(self, answers: Answers, work: Tensor, peaks: Tensor, ways: list[int]) -> None:
        """Choose for all rows of `work` `[n, width]`, whose `ways` ascend; `peaks` float64 `[n, 1]`."""
        greedy = bisect_right(ways, 0)
        for start, end in self._parts(0, greedy):
            best = work[start:end].argmax(-1, keepdim=True)  # the first of equals: the lowest id
            rows = range(start, end)
            answers.choose(rows, best.flatten().tolist())
            if wanted := [i for i in rows if answers.rows[i].params.margins]:
                answers.add_margins(wanted, margins_of_largest(_take(work, wanted)))
            if wanted := [i for i in rows if _wants(answers.rows[i], "processed")]:
                some = _take(work, wanted)
                scores = scaled(some, _take(peaks, wanted))
                answers.describe(wanted, scores, _take(best, [i - start for i in wanted]), None, some)
        if greedy < len(ways):
            self._choose_by_draw(answers, work, peaks, ways, greedy)

    def _choose_by_draw(self, answers: Answers, work: Tensor, peaks: Tensor, ways: list[int], first: int) -> None:
        drawing = answers.rows[first:]
        filters = Filters.of([self._filter(r.params) for r in drawing], self.device)
        keys = [stream_key(r.seed, r.choice_index, r.position) for r in drawing]
        key = torch.tensor(keys, dtype=torch.int64, device=self.device).unsqueeze(1)
        start = first
        while start < len(ways):
            after = bisect_right(ways, ways[start])
            for i, j in self._parts(start, after):
                group = list(range(i, j)), work[i:j], peaks[i:j], filters.part(i - first, j - first)
                for kept in [keep_all(*group)] if ways[start] == 1 else keep_first(*group):
                    self._draw(answers, kept, _take(key, [row - first for row in kept.rows]), work)
            start = after

    def _draw(self, answers: Answers, kept: Kept, keys: Tensor, work: Tensor) -> None:
        steps = self._steps if kept.ids is None else self._steps[kept.ids]
        token_gaps = gaps(keys, steps)
        winners = _gumbel_argmax(kept, token_gaps)
        answers.choose(kept.rows, [token for _, token, _ in winners], [score for _, _, score in winners])
        if wanted := [j for j, i in enumerate(kept.rows) if answers.rows[i].params.margins]:
            answers.add_margins([kept.rows[j] for j in wanted], margins(kept, token_gaps, wanted))
        if wanted := [j for j, i in enumerate(kept.rows) if _wants(answers.rows[i], "processed")]:
            names = [kept.rows[j] for j in wanted]
            chosen = torch.tensor([[winners[j][0]] for j in wanted], device=self.device)
            ids = None if kept.ids is None else _take(kept.ids, wanted)
            answers.describe(names, _take(kept.scores, wanted), chosen, ids, _take(work, names))

    def _describe_raw(self, answers: Answers, logits: Tensor, peaks: Tensor, sources: list[int]) -> None:
        wanted = [i for i, row in enumerate(answers.rows) if _wants(row, "raw")]
        for start, end in self._parts(0, len(wanted)):
            names = wanted[start:end]
            at = [sources[i] for i in names]
            some = _take(logits, at)
            tokens = some[:, : self._width]
            if self._holes.numel():
                tokens = tokens.index_fill(1, self._holes, -math.inf)
            chosen = torch.tensor([[answers.results[i].token_id] for i in names], device=self.device)
            answers.describe(names, scaled(some, _take(peaks, at)), chosen, None, tokens)

    # Measures

    def _measure(self, answers: Answers, logits: Tensor, raw_peaks: Tensor, work: Tensor, sources: list[int]) -> None:
        """Add the scores of rows that are recorded, and the checks of rows with an expected token."""
        wanted = [i for i, row in enumerate(answers.rows) if row.records or row.expected is not None]
        for start, end in self._parts(0, len(wanted)):
            names = wanted[start:end]
            at = [sources[i] for i in names]
            tokens = [token if (token := answers.rows[i].expected) is not None else answers.token(i) for i in names]
            where = torch.tensor([names, at, tokens], device=self.device)
            chosen = where[2].unsqueeze(1)
            some, peaks = _take(logits, at), raw_peaks[where[1]].double().unsqueeze(1)
            columns = [scaled(some.gather(1, chosen), peaks)]
            columns.append(work[where[0], where[2].clamp(max=self._width - 1)].unsqueeze(1))
            columns.append(sum_masses(some, peaks))
            for i, token, (score, edited, mass) in zip(names, tokens, torch.cat(columns, 1).tolist(), strict=True):
                perturbed, close = answers.perturbed.get(i, edited), 0.0
                if token != answers.token(i):
                    perturbed, close = self._closeness(answers.rows[i], work[i], answers.token(i), token)
                answers.add_score(i, (rounded(score - log_mass(mass)), rounded(perturbed)), close)

    def _closeness(self, row: SamplingRow, logits: Tensor, drawn: int, expected: int) -> tuple[float, float]:
        if expected >= self._width:
            return -math.inf, math.inf
        if row.params.temperature == 0.0:
            return closeness_of_largest(logits, drawn, expected)
        key = torch.tensor([[stream_key(row.seed, row.choice_index, row.position)]], device=self.device)
        return closeness(logits, self._filter(row.params), gaps(key, self._steps)[0], expected)

    @torch.inference_mode()
    def describe(
        self, logits: Tensor, rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
    ) -> list[Described | NumericalFault]:
        """Describe given tokens by the raw distribution over the whole model vocabulary. Chooses nothing.

        Args:
            logits: as in `sample`.
            rows: which row of `logits` describes each of `tokens`.
            tops: how many of the likeliest tokens to tell beside each.
        """
        found: list[Described | NumericalFault] = []
        for start, end in self._parts(0, len(rows)):
            some = _take(logits, list(rows[start:end]))
            listed = some[:, : self._width]
            if self._holes.numel():
                listed = listed.index_fill(1, self._holes, -math.inf)
            peaks, keys = some.amax(-1), order_keys(listed.nan_to_num())
            chosen = torch.tensor(tokens[start:end], device=self.device).unsqueeze(1)
            ranks = (keys > keys.gather(1, chosen)).sum(-1, keepdim=True)
            scores = scaled(some, peaks.double().unsqueeze(1))
            columns = [scores.gather(1, chosen), masses(scores.nan_to_num()).sum(-1, keepdim=True), ranks]
            if count := min(max(tops[start:end]), self._width):
                ids = largest(keys, count)
                columns += [scores.gather(1, ids), ids]
            values = zip(
                tokens[start:end], tops[start:end], torch.cat(columns, 1).tolist(), peaks.tolist(), strict=True
            )
            found += [described(token, top, count, row, peak) for token, top, row, peak in values]
        return found

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Split a range of rows into small parts, so that temporary tensors stay small."""
        return ((i, min(i + self._chunk, end)) for i in range(start, end, self._chunk))


def _wants(row: SamplingRow, mode: str) -> bool:
    return row.params.logprobs and row.params.logprobs_mode == mode


def _take(tensor: Tensor, rows: list[int]) -> Tensor:
    """Return some rows of a tensor: a view if they are consecutive, so do not write to them."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] : rows[0] + len(rows)]
    return tensor.index_select(0, torch.tensor(rows, device=tensor.device))


def _faults(
    rows: Sequence[SamplingRow], sources: list[int], raw_peaks: list[float], peaks: list[float]
) -> dict[int, VerbatimError]:
    """Return the rows that cannot be answered, and why, from each row's largest logit before and after the edits."""
    found: dict[int, VerbatimError] = {}
    for i, row in enumerate(rows):
        if not math.isfinite(raw_peaks[sources[i]]) or math.isnan(peaks[i]) or peaks[i] == math.inf:
            found[i] = NumericalFault(f"The model produced logits that are not finite for token {row.position}.")
        elif peaks[i] == -math.inf:
            found[i] = InvalidParameter(
                f"logit_bias, min_tokens and the grammar together forbid every token at position {row.position}.",
                param="logit_bias",
                code="no_token_left",
            )
    return found


def _gumbel_argmax(kept: Kept, token_gaps: Tensor) -> list[tuple[int, int, float]]:
    """Return the winner of each row: its column, its token id and its perturbed score.

    Args:
        token_gaps: int64, shaped as `kept.scores`.
    """
    width = kept.scores.shape[-1]
    at = _contenders(kept.scores, token_gaps)
    columns = [at, token_gaps.view(-1)[at], kept.scores.view(-1)[at]]
    if kept.ids is not None:
        columns.append(kept.ids.view(-1)[at])
    best = [(-math.inf, 0, 0)] * len(kept.rows)
    # One transfer; every integer here is below 2**53, so float64 holds it exactly.
    for place, gap, score, *ids in torch.stack(columns, dim=1).tolist():
        row, column = divmod(int(place), width)
        token = int(ids[0]) if ids else column
        best[row] = max(best[row], (score + gumbel(int(gap)), -token, column))
    return [(column, -token, score) for score, token, column in best]


def _contenders(scores: Tensor, token_gaps: Tensor) -> Tensor:
    """Return the few tokens among which the winner must be: flat indices, int64 `[about 2 a row]`.

    Maximising `score + gumbel` is minimising `e / w`, where `w = exp(score)` and `e = -log(u)`, `u = 1 - v`. As
    `v <= e`, every token has `v / w <= e / w`: cheap to compute and a lower bound. Let `b` be the least `v / w` of a
    row, had by token j. No weight exceeds 1, so `v_j <= b`, and since `-log(1 - v) / v` grows with v,

        e_j / w_j  =  v_j / w_j * (-log(1 - v_j) / v_j)  <=  -log(1 - b).

    The winner is at least as good as j, hence its `v / w`, too, is at most `-log(1 - b)`. Neither is it worse than the
    likeliest token, for which `e / w` is at most `-log(2**-53) < 37`. This is computed in float32 with both bounds
    widened by 6e-5, twenty times what rounding can amount to: a score that can still win is above -41, so its float32
    neighbour is off by 2e-6 at most, its exponential by 3e-6 of itself.
    """
    weight = scores.float().clamp_(min=-80.0).exp_()  # e**-80 cannot win either, and is no denormal, which are slow
    race = token_gaps.float().div_(weight)
    least = race.amin(-1, keepdim=True).mul_(GAP_UNIT * _SLACK).clamp_(max=1.0)
    bound = least.neg_().log1p_().mul_(-_SLACK).clamp_(max=40.0).div_(GAP_UNIT)
    return (race <= bound).view(-1).nonzero().view(-1)
