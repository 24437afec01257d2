"""`Drawing`: one call of the sampler, started on the device; its answers are made when they are read back.

start:   peaks, contenders, masses, lists ──► one `Readback`      nothing waits
finish:  fetch ──► decide each draw ──► rows that are not settled: a second `Round`, over all that may be drawn
                                   └──► rows with another token than the expected one: how close was it?
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from engine.errors import VerbatimError
from engine.sampling.answers import Answers, Sampled, SamplingRow
from engine.sampling.batch import GREEDY, PLAIN, WHOLE, Batch, Picked, TokenColumns, key_of
from engine.sampling.contenders import contenders
from engine.sampling.logits import (
    Kept,
    keep_all,
    keep_first,
    keep_mass,
    largest,
    masses,
    order_keys,
    scaled,
    sum_masses,
)
from engine.sampling.measures import best_two, closeness, near_best
from engine.sampling.rng import gaps
from engine.sampling.transfer import Readback, Rows, Upload

__all__ = ["Drawing"]

CONTENDERS: Final = 8
"""Tokens of a row among which the winner nearly always is."""
_MORE: Final = 64
"""How many times as many each attempt after the second one looks at."""


class Drawing:
    """The draws of one call. Everything that needs no decision of the host's is queued when it is made.

    Args:
        rows: of the call; sources: for each, its row of `logits`.
        batch: all rows, in the order of `work`; its upload has been sent.
        logits: float32 `[logit rows, vocab_size]`, untouched.
        work: float32 `[rows, width]`, edited, in the batch's order.
    """

    def __init__(
        self,
        rows: Sequence[SamplingRow],
        sources: Sequence[int],
        columns: TokenColumns,
        batch: Batch,
        logits: Tensor,
        work: Tensor,
    ) -> None:
        self._columns, self._batch, self._logits, self._work = columns, batch, logits, work
        self._answers = Answers(rows, sources, columns.width)
        self._sources = sources
        self.device_told: list[int] = []
        raw_peaks, peaks = logits.amax(-1, keepdim=True), work.amax(-1, keepdim=True)  # NaN wins a maximum
        self._peaks = peaks.double()
        readback = Readback()
        readback.add(partial(self._answers.add_peaks, batch.names), raw_peaks, peaks)
        self._first = Round(columns, batch, logits, work, self._peaks, self._answers, readback, CONTENDERS)
        self._describe_raw(raw_peaks.double(), readback)
        self._readback = readback

    @torch.inference_mode()
    def device_tokens(self) -> Tensor:
        """Return the tokens as the device decides, int64 `[rows]` in the call's order, and start reading the answers.

        They differ from those of `finish` only where two perturbed scores are within one unit in the last place, since
        the host's logarithm may round otherwise; and in rows that are not settled at once, or cannot be answered.
        What is queued from now on does not delay `finish`, which then also fills in `device_told`.
        """
        likely = torch.cat(self._first.likely).view(-1)
        tokens = torch.empty_like(likely).scatter_(0, self._batch.order, likely)
        self._readback.add(self._note_device_tokens, tokens.unsqueeze(0))
        self._readback.send()
        return tokens

    def _note_device_tokens(self, rows: Rows) -> None:
        self.device_told = [int(token) for token in rows[0]]

    @torch.inference_mode()
    def finish(self) -> list[Sampled | VerbatimError]:
        """Wait for the device and return one result a row, in the call's order."""
        self._readback.fetch()
        self._draw_again()
        self._compare()
        return self._answers.results()

    def _describe_raw(self, raw_peaks: Tensor, readback: Readback) -> None:
        """Ask for what raw log-probabilities are made of, besides the winner."""
        answers, columns = self._answers, self._columns
        for part in self._batch.measured_sources.parts(columns.chunk):
            total = sum_masses(part.of(self._logits), part.of(raw_peaks))
            readback.add(partial(answers.add_masses, part.names), total)
        for part in self._batch.listed_sources.parts(columns.chunk):
            tokens = part.of(self._logits)[:, : columns.width]
            if columns.holes.numel():
                tokens = tokens.index_fill(1, columns.holes, -torch.inf)
            ids = largest(order_keys(tokens), _most_listed(answers, part, columns.width))
            readback.add(partial(answers.add_raw_list, part.names), tokens.gather(1, ids), ids)

    def _draw_again(self) -> None:
        """Draw rows whose winner was not certain. Rare, but for flat rows with top_p.

        Those need all tokens that may be drawn, and no more contenders: many are slow to find. So the second attempt
        has as many as the first, and only what it does not settle, which is hardly ever seen, gets more.
        """
        answers, count = self._answers, CONTENDERS
        while answers.unsettled:
            upload, readback = Upload(self._logits.device), Readback()
            batch = Batch(answers.rows, answers.unsettled, self._sources, self._columns, upload, again=True)
            picked = Picked(batch.names, [self._batch.names.index(name) for name in batch.names], upload)
            upload.send()
            answers.unsettled = []
            work, peaks = picked.of(self._work), picked.of(self._peaks)
            Round(self._columns, batch, self._logits, work, peaks, answers, readback, count)
            readback.fetch()
            count *= _MORE

    def _compare(self) -> None:
        """Find out how close expected tokens were that were not drawn. Rare: most checks find the same token."""
        readback, answers, columns = Readback(), self._answers, self._columns
        for name, own in answers.pairs_to_compare():
            row = answers.rows[name]
            assert row.expected is not None
            key = torch.full((1, 1), key_of(row), dtype=torch.int64, device=self._logits.device)
            found = closeness(
                self._work[self._batch.names.index(name)],
                columns.filter(row),
                gaps(key, columns.steps)[0],
                row.expected,
                own,
            )
            readback.add(partial(answers.add_closeness, name, own), found)
        readback.fetch()


class Round:
    """One attempt at choosing a token for each row of a batch: asks for all that the host needs to decide.

    Args:
        work: float32 `[n, width]`, edited, in the batch's order; peaks: float64 `[n, 1]`, the largest of each row.
        count: how many contenders a row may have.

    Attributes:
        likely: int64 `[., 1]` each, the tokens as the device decides, in the batch's order.
    """

    def __init__(
        self,
        columns: TokenColumns,
        batch: Batch,
        logits: Tensor,
        work: Tensor,
        peaks: Tensor,
        answers: Answers,
        readback: Readback,
        count: int,
    ) -> None:
        self._columns, self._batch, self._logits, self._work, self._peaks = columns, batch, logits, work, peaks
        self._answers, self._readback, self._count = answers, readback, min(count, columns.width)
        self.likely: list[Tensor] = []
        self._ids: list[Tensor] = []
        for start, end, way in batch.parts():
            if way == GREEDY:
                self._choose_largest(start, end)
            else:
                self._draw(start, end, self._keep(start, end, way))
        self._look_up()

    def _choose_largest(self, start: int, end: int) -> None:
        batch, answers, work = self._batch, self._answers, self._work
        best = work[start:end].argmax(-1, keepdim=True)  # the first of equals: the lowest id
        self.likely.append(best)
        self._ids.append(best.expand(-1, self._count))
        self._readback.add(partial(answers.add_largest, batch.names[start:end]), best)
        if wanted := batch.margins.between(start, end):
            self._readback.add(partial(answers.add_best, wanted.names), best_two(wanted.of(work)))
        if wanted := batch.processed.between(start, end):
            some, peaks = wanted.of(work), wanted.of(self._peaks)
            count = self._most(wanted)
            ids = largest(order_keys(some), count) if count else best.new_empty(len(some), 0)
            found = sum_masses(some, peaks), scaled(some.gather(1, ids), peaks), ids
            self._readback.add(partial(answers.add_processed, wanted.names), *found)

    def _keep(self, start: int, end: int, way: int) -> Kept:
        """Apply the filters to some rows of one group."""
        columns = self._columns
        logits, peaks = self._work[start:end], self._peaks[start:end]
        filters = self._batch.filters.part(start, end)
        if way == PLAIN:
            return keep_all(logits, peaks, filters)
        if way == WHOLE:
            whole = columns.sorts_all
            return keep_first(logits, peaks, filters, columns.width) if whole else keep_mass(logits, peaks, filters)
        return keep_first(logits, peaks, filters, columns.head)

    def _draw(self, start: int, end: int, kept: Kept) -> None:
        batch, answers, steps = self._batch, self._answers, self._columns.steps
        token_gaps = gaps(batch.keys[start:end], steps if kept.ids is None else steps[kept.ids])
        found = contenders(kept.scores, token_gaps, self._count)
        ids = found.columns if kept.ids is None else kept.ids.gather(1, found.columns)
        settled = found.complete if kept.settled is None else found.complete & kept.settled
        self.likely.append(ids.gather(1, found.likely))
        missing = self._count - ids.shape[-1]
        self._ids.append(torch.cat([ids, ids[:, :1].expand(-1, missing)], 1) if missing > 0 else ids)
        self._readback.add(
            partial(answers.add_contenders, batch.names[start:end]), ids, found.gaps, found.scores, settled
        )
        if wanted := batch.margins.between(start, end):
            some = Kept(wanted.of(kept.scores, start), None)
            self._readback.add(partial(answers.add_best, wanted.names), *near_best(some, wanted.of(token_gaps, start)))
        if wanted := batch.processed.between(start, end):
            self._describe_processed(wanted, kept, start)

    def _describe_processed(self, wanted: Picked, kept: Kept, start: int) -> None:
        """Ask for what processed log-probabilities of draws are made of, besides the winner's score."""
        count = self._most(wanted)
        scores = wanted.of(kept.scores, start)
        if kept.ids is not None:
            ids = wanted.of(kept.ids, start)[:, :count]
            listed = scores[:, :count]
        else:
            ids = largest(order_keys(wanted.of(self._work)), count)
            listed = scores.gather(1, ids)
        total = masses(scores).sum(-1, keepdim=True)
        self._readback.add(partial(self._answers.add_processed, wanted.names), total, listed, ids)

    def _look_up(self) -> None:
        """Ask for the logits of the tokens among which each winner is, and of expected tokens."""
        batch = self._batch
        if not batch.measured:
            return
        ids = batch.measured.of(torch.cat(self._ids))
        if batch.compares:
            ids = torch.cat([ids, batch.expected], 1)
        raw = self._logits[batch.measured_sources.index.unsqueeze(1), ids]
        edited = self._work[batch.measured.index.unsqueeze(1), ids.clamp(max=self._columns.width - 1)]
        self._readback.add(partial(self._answers.add_logits, batch.measured.names), raw, edited)

    def _most(self, wanted: Picked) -> int:
        return _most_listed(self._answers, wanted, self._columns.width)


def _most_listed(answers: Answers, wanted: Picked, width: int) -> int:
    """Return how many of the likeliest tokens some row wants."""
    return min(max(answers.rows[i].params.top_logprobs for i in wanted.names), width)
