"""`Batch`: rows that are drawn together, put in groups, with their numbers in one upload. Computes no logits."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from engine.sampling.answers import SamplingRow
from engine.sampling.logits import Filter, Filters
from engine.sampling.rng import stream_key
from engine.sampling.transfer import Upload

__all__ = ["GREEDY", "PLAIN", "WHOLE", "Batch", "Picked", "TokenColumns", "key_of"]

GREEDY: Final = 0
PLAIN: Final = 1
"""The group of rows in which nothing is sorted."""
WHOLE: Final = 2
"""The group of rows whose mass the first tokens did not reach."""
_FIRST: Final = 3
"""The first of the groups that sort some tokens."""
_FEW: Final = 64


@dataclass(frozen=True, slots=True)
class TokenColumns:
    """The columns of a model's logits among which tokens are chosen, and how many are looked at together.

    Attributes:
        width: columns from here on are no tokens.
        holes: int64, columns below `width` that are no tokens.
        steps: int64 `[width]`: see `engine.sampling.rng.token_steps`.
        chunk: rows whose temporary tensors are kept at a time.
        head: how many tokens are sorted at first where a filter sorts; None: what is cheapest.
        sorts_all: whether a flat row's tokens are all sorted, because searching them would read from the device.
    """

    width: int
    holes: Tensor
    steps: Tensor
    chunk: int
    head: int | None
    sorts_all: bool

    def filter(self, row: SamplingRow) -> Filter:
        """Return the filters of a row. Those of a row that is not drawn from mean nothing."""
        p = row.params
        if p.temperature == 0.0:
            return Filter()
        return Filter(p.temperature, p.top_k if p.top_k < self.width else 0, p.top_p, p.min_p)


class Picked:
    """Some rows of a tensor, as numbers here and as an index on the device.

    Args:
        names: which results these are.
        places: which rows of the tensor each needs.
    """

    def __init__(self, names: list[int], places: list[int], upload: Upload) -> None:
        self.names = names
        self.places = places
        self._index = upload.ints(places)
        self._start = 0

    def __bool__(self) -> bool:
        return bool(self.names)

    def part(self, start: int, end: int) -> Picked:
        """Return those from number `start` to `end`."""
        found = Picked.__new__(Picked)
        found.names, found.places = self.names[start:end], self.places[start:end]
        found._index, found._start = self._index, self._start + start
        return found

    def between(self, first: int, last: int) -> Picked:
        """Return those whose places are in `first … last - 1`; the places ascend."""
        return self.part(bisect_left(self.places, first), bisect_left(self.places, last))

    def parts(self, size: int) -> Iterator[Picked]:
        return (self.part(i, i + size) for i in range(0, len(self.names), size))

    @property
    def index(self) -> Tensor:
        """The places, int64 `[n]`."""
        return self._index.tensor[self._start : self._start + len(self.places)]

    def of(self, tensor: Tensor, offset: int = 0) -> Tensor:
        """Return these rows of a tensor whose first row has the place `offset`: a view if they are consecutive, so do
        not write to them.
        """
        first, count = self.places[0], len(self.places)
        if self.places == list(range(first, first + count)):
            return tensor[first - offset : first - offset + count]
        return tensor.index_select(0, self.index - offset if offset else self.index)


_NONE: Final = Picked([], [], Upload("cpu"))


class Batch:
    """Rows that are drawn together. Rows of one group stand side by side, so that each group is one slice.

    Args:
        rows: every row of the call.
        names: which of them are in this batch.
        sources: for each of `rows`, which row of the logits it draws from.
        upload: gets the batch's numbers.
        again: whether this is a second attempt, at rows that a first one did not settle.

    Attributes:
        names, rows, sources: of the batch, in its order.
        margins, processed: rows whose margins, or processed log-probabilities, are wanted.
        measured: rows of whose tokens the raw log-probability is wanted, for the reply, a record or a check;
            `measured_sources`: the same, with places in the logits.
        listed_sources: rows whose likeliest tokens by the raw logits are wanted, with places in the logits.
        compares: whether any row has an expected token.
    """

    def __init__(
        self,
        rows: Sequence[SamplingRow],
        names: Sequence[int],
        sources: Sequence[int],
        columns: TokenColumns,
        upload: Upload,
        *,
        again: bool = False,
    ) -> None:
        filters = {i: columns.filter(rows[i]) for i in names}
        ways = {i: _way(rows[i], filters[i], again) for i in names}
        # Within a group, rows without top_k stand side by side, too.
        self.names = sorted(names, key=lambda i: (ways[i], not filters[i].top_k))
        self.rows = [rows[i] for i in self.names]
        self.sources = [sources[i] for i in self.names]
        self._ways = [ways[i] for i in self.names]
        self._chunk = columns.chunk
        self._filters = [filters[i] for i in self.names]
        self._table = upload.floats(Filters.numbers(self._filters))
        self._keys = upload.ints([key_of(row) if way else 0 for row, way in zip(self.rows, self._ways, strict=True)])
        self._order = upload.ints(self.names)
        self._source_index = upload.ints(self.sources)
        self._pick_rows(upload)

    def _pick_rows(self, upload: Upload) -> None:
        """Find the rows of which more is wanted than a token."""
        margins, processed, measured, listed = [], [], [], []
        for i, row in enumerate(self.rows):
            p = row.params
            raw = p.logprobs and p.logprobs_mode == "raw"
            if p.margins:
                margins.append(i)
            if p.logprobs and not raw:
                processed.append(i)
            if raw or row.records or row.expected is not None:
                measured.append(i)
            if raw and p.top_logprobs:
                listed.append(i)
        self.margins = self._picked(upload, margins)
        self.processed = self._picked(upload, processed)
        self.measured = self._picked(upload, measured)
        self.measured_sources = self._picked(upload, measured, self.sources)
        self.listed_sources = self._picked(upload, listed, self.sources)
        self.compares = any(self.rows[i].expected is not None for i in measured)
        self._expected = upload.ints([self.rows[i].expected or 0 for i in measured])

    def _picked(self, upload: Upload, rows: list[int], places: list[int] | None = None) -> Picked:
        if not rows:
            return _NONE
        return Picked([self.names[i] for i in rows], [places[i] for i in rows] if places else rows, upload)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def order(self) -> Tensor:
        """The names, int64 `[n]` on the device."""
        return self._order.tensor

    @property
    def source_index(self) -> Tensor:
        """The sources, int64 `[n]` on the device."""
        return self._source_index.tensor

    @property
    def keys(self) -> Tensor:
        """Where each row's random stream starts, int64 `[n, 1]`; means nothing for rows that are not drawn from."""
        return self._keys.tensor.unsqueeze(1)

    @property
    def filters(self) -> Filters:
        return Filters(self._filters, self._table.tensor.view(-1, 4))

    @property
    def expected(self) -> Tensor:
        """The expected token of each measured row, 0 where there is none: int64 `[measured, 1]`."""
        return self._expected.tensor.unsqueeze(1)

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """Split the batch into small parts of one group each, so that temporary tensors stay small.

        Returns:
            The first row of each, the row behind its last, and its group.
        """
        start, count = 0, len(self.rows)
        while start < count:
            way = self._ways[start]
            after = bisect_right(self._ways, way)
            for i in range(start, after, self._chunk):
                yield i, min(i + self._chunk, after), way
            start = after


def key_of(row: SamplingRow) -> int:
    """Return where the random stream of a row's draw starts."""
    return stream_key(row.seed, row.choice_index, row.position)


def _way(row: SamplingRow, cut: Filter, again: bool) -> int:
    """Return the group that a row is computed with: by how many of its tokens are sorted.

    So a row that wants 100,000 tokens sorted does not slow down those that want 50.
    """
    if row.params.temperature == 0.0:
        return GREEDY
    if not cut.sorts:
        return PLAIN
    if again and not cut.top_k:
        return WHOLE
    return _FIRST + (max(_FEW, cut.top_k) - 1).bit_length()
