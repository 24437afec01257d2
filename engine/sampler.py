"""Chooses the next token of every row: logits in, token ids and log-probabilities out.

Knows nothing of text, of stopping or of the model. Holds no randomness: a draw is the Gumbel-max trick with the
stateless bits of `engine.rng`, so it depends on the row's logits, parameters, seed, choice and position alone.

    token = argmax over kept ids i of  (logit_i - largest) / T + gumbel(seed, choice, position, i)    lowest id on ties

(float64; the shift by the largest logit is shared by all tokens and changes no draw.) The Gumbel value is computed for
a handful of tokens only, those that can still win: see `_contenders`.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor

from engine.errors import InvalidParameter, NumericalFault, VerbatimError
from engine.logits import (
    MAX_VOCABULARY,
    Cut,
    Edits,
    Kept,
    keep_all,
    keep_first,
    largest,
    log_mass,
    masses,
    order_keys,
    scaled,
)
from engine.rng import GAP_UNIT, gaps, gumbel, stream_key, token_steps
from engine.types import SamplingParams

__all__ = ["Sampled", "Sampler", "SamplingRow"]

_T = TypeVar("_T")

_CHUNK_CPU: Final = 2**18  # logits looked at together: the temporaries of one such chunk stay in the cache
_CHUNK_DEVICE: Final = 2**24
_SLACK: Final = 1.0 + 2.0**-14
_CACHED_PROMPTS: Final = 64


class SamplingRow(Protocol):
    """What is asked of one row. `engine.sequence.Sequence` is one."""

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


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token.

    Attributes:
        logprob: None unless `params.logprobs`. At most 0; finite.
        top: the `params.top_logprobs` likeliest (id, logprob), downward, equals by lowest id. Holds only ids that the
            tokenizer knows and whose probability is not zero, so it may be shorter than asked.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Samples batches for one model. Not for two threads at once.

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
        float64, from an integer sum of masses: the same bits in any batch (see `engine.logits`).

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
        sources = list(range(len(rows))) if logit_rows is None else list(logit_rows)
        work = self._edited(logits, rows, sources, allowed)
        raw_peaks, peaks = logits.amax(-1), work.amax(-1)  # NaN wins a maximum
        results = _faults(rows, sources, raw_peaks.tolist(), peaks.tolist())
        healthy = [i for i in range(len(rows)) if i not in results]
        answers = _Answers(rows, results)
        self._choose_greedily(answers, work, peaks, [i for i in healthy if rows[i].params.temperature == 0.0])
        self._choose_by_draw(answers, work, peaks, [i for i in healthy if rows[i].params.temperature > 0.0])
        self._describe_raw(answers, logits, raw_peaks, [(i, sources[i]) for i in healthy if _wants(rows[i], "raw")])
        return [results[i] for i in range(len(rows))]

    # Edits

    def _edited(
        self, logits: Tensor, rows: Sequence[SamplingRow], sources: list[int], allowed: Tensor | None
    ) -> Tensor:
        """The logits to choose from, `[rows, width]`: a view of the caller's if nothing is to be changed, else ours."""
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
        if untouched and sources == list(range(len(logits))):
            return tokens
        work = tokens.index_select(0, torch.tensor(sources, device=self.device))
        edits.apply(work)
        if self._holes.numel():
            work.index_fill_(1, self._holes, -math.inf)
        if allowed is not None:
            work.masked_fill_(~allowed[:, : self._width], -math.inf)
        return work

    def _prompt_ids(self, prompt: tuple[int, ...]) -> Tensor:
        """The distinct ids of a prompt; kept, for the prompt is the same in every step of a reply."""
        name = id(prompt)  # stays its own as long as the entry holds the tuple
        if name not in self._prompts:
            ids = sorted({i for i in prompt if i < self._width})
            self._prompts[name] = (prompt, torch.tensor(ids, dtype=torch.int64, device=self.device))
            if len(self._prompts) > _CACHED_PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(name)
        return self._prompts[name][1]

    # Choosing

    def _choose_greedily(self, answers: _Answers, work: Tensor, peaks: Tensor, rows: list[int]) -> None:
        for part in self._parts(rows):
            logits = _take(work, part)
            best = logits.argmax(-1, keepdim=True)  # the first of equals: the lowest id
            answers.choose(part, best.flatten().tolist())
            if wanted := [j for j, i in enumerate(part) if _wants(answers.rows[i], "processed")]:
                some = _take(logits, wanted)
                scores = scaled(some, _take(peaks, [part[j] for j in wanted]).double().unsqueeze(1))
                answers.describe([part[j] for j in wanted], scores, _take(best, wanted), None, some)

    def _choose_by_draw(self, answers: _Answers, work: Tensor, peaks: Tensor, rows: list[int]) -> None:
        groups: dict[int, list[int]] = {}
        cuts: dict[int, Cut] = {}
        for i in rows:
            p = answers.rows[i].params
            cuts[i] = Cut(p.temperature, p.top_k if p.top_k < self._width else 0, p.top_p, p.min_p)
            # Like with like: who asks for 100,000 tokens in order must not make others wait for theirs.
            span = (max(64, cuts[i].top_k) - 1).bit_length() if cuts[i].sorts else 0
            groups.setdefault(span, []).append(i)
        for span, members in groups.items():
            for part in self._parts(members):
                logits, tops = _take(work, part), _take(peaks, part).double().unsqueeze(1)
                some = [cuts[i] for i in part]
                for kept in keep_first(part, logits, tops, some) if span else [keep_all(part, logits, tops, some)]:
                    self._draw(answers, kept, work)

    def _draw(self, answers: _Answers, kept: Kept, work: Tensor) -> None:
        rows = [answers.rows[i] for i in kept.rows]
        keys = torch.tensor(
            [[stream_key(r.seed, r.choice_index, r.position)] for r in rows], dtype=torch.int64, device=self.device
        )
        columns = _race(kept, gaps(keys, self._steps if kept.ids is None else self._steps[kept.ids]))
        answers.choose(kept.rows, [token for _, token in columns])
        if wanted := [j for j, row in enumerate(rows) if _wants(row, "processed")]:
            chosen = torch.tensor([[columns[j][0]] for j in wanted], device=self.device)
            names = [kept.rows[j] for j in wanted]
            ids = None if kept.ids is None else _take(kept.ids, wanted)
            answers.describe(names, _take(kept.scores, wanted), chosen, ids, _take(work, names))

    def _describe_raw(self, answers: _Answers, logits: Tensor, peaks: Tensor, pairs: list[tuple[int, int]]) -> None:
        for part in self._parts(pairs):
            names, sources = [i for i, _ in part], [source for _, source in part]
            some = _take(logits, sources)
            scores = scaled(some, _take(peaks, sources).double().unsqueeze(1))
            tokens = some[:, : self._width]
            if self._holes.numel():
                tokens = tokens.index_fill(1, self._holes, -math.inf)
            chosen = torch.tensor([[answers.token(i)] for i in names], device=self.device)
            answers.describe(names, scores, chosen, None, tokens)

    def _parts(self, items: list[_T]) -> Iterator[list[_T]]:
        """A few rows at a time, so that what is made on the way stays small."""
        for start in range(0, len(items), self._chunk):
            yield items[start : start + self._chunk]


class _Answers:
    """What is known so far about each row of one batch."""

    def __init__(self, rows: Sequence[SamplingRow], results: dict[int, Sampled | VerbatimError]) -> None:
        self.rows = rows
        self.results = results

    def choose(self, rows: list[int], tokens: list[int]) -> None:
        self.results.update((i, Sampled(token)) for i, token in zip(rows, tokens, strict=True))

    def token(self, row: int) -> int:
        result = self.results[row]
        assert isinstance(result, Sampled)
        return result.token_id

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
            self.results[i] = Sampled(self.token(i), values[0] - shift, listed)


def _wants(row: SamplingRow, mode: str) -> bool:
    return row.params.logprobs and row.params.logprobs_mode == mode


def _take(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a tensor, which must not be written to: a view if they stand together."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] : rows[0] + len(rows)]
    return tensor.index_select(0, torch.tensor(rows, device=tensor.device))


def _faults(
    rows: Sequence[SamplingRow], sources: list[int], raw_peaks: list[float], peaks: list[float]
) -> dict[int, Sampled | VerbatimError]:
    """The rows that cannot be answered, and why, from the largest logit of each before and after the edits."""
    found: dict[int, Sampled | VerbatimError] = {}
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


def _race(kept: Kept, token_gaps: Tensor) -> list[tuple[int, int]]:
    """The winner of each row: its column and its token id.

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
    for place, gap, score, *ids in torch.stack([c.double() for c in columns], dim=1).tolist():
        row, column = divmod(int(place), width)
        token = int(ids[0]) if ids else column
        best[row] = max(best[row], (score + gumbel(int(gap)), -token, column))
    return [(column, -token) for _, token, column in best]


def _contenders(scores: Tensor, token_gaps: Tensor) -> Tensor:
    """The few tokens among which the winner must be: flat indices, int64 `[about 2 a row]`.

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
