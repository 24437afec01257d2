"""Edits and filters against their formulas, and the kept set's independence of how it was found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from engine.sampling.edits import Edits
from engine.sampling.logits import (
    Filter,
    Filters,
    Kept,
    keep_all,
    keep_first,
    keep_mass,
    largest,
    log_mass,
    masses,
    order_keys,
    scaled,
)
from engine.sampling.transfer import Upload

INF = math.inf

# Few distinct values make ties; both zeros, a denormal, and what a model may ban.
logit = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 10.0, -30.0, 1e-40, -INF, 88.0]),
    st.floats(-60, 60, width=32),
)
cut = st.builds(
    Filter,
    temperature=st.sampled_from([1e-300, 0.01, 0.5, 0.7, 1.0, 1.3, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 3, 7, 50]),
    top_p=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 1e-9, 0.05, 0.5, 1.0]),
)


@pytest.fixture
def threads() -> Iterator[tuple[int, int]]:
    before = torch.get_num_threads()
    yield 1, 2
    torch.set_num_threads(before)


def row_of(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def peaks_of(logits: Tensor) -> Tensor:
    return logits.amax(-1, keepdim=True).double()


def in_order(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def reference_kept(values: list[float], c: Filter) -> set[int]:
    """The filters as the documentation words them, in exact fractions, one row at a time."""
    peak = max(values)
    order = [i for i in in_order(values) if values[i] > -INF][: c.top_k or None]
    weights = {i: Fraction(math.exp((values[i] - peak) / c.temperature)) for i in order}
    target = Fraction(c.top_p) * sum(weights.values())
    kept, mass = [], Fraction(0)
    for i in order:
        if c.top_p < 1.0 and kept:
            # Where rounding could decide, nothing is promised; exact ties are (0.3 of ten equals is three of them).
            gap = (mass - target) / weights[order[0]]
            assume(not 1e-15 < abs(gap) < 1e-7)
            if gap >= -1e-15:
                break
        kept.append(i)
        mass += weights[i]
    return {i for i in kept if c.min_p == 0.0 or (values[i] - peak) / c.temperature >= math.log(c.min_p)}


def filters_of(cuts: list[Filter]) -> Filters:
    return Filters(cuts, torch.tensor(Filters.numbers(cuts), dtype=torch.float64).view(-1, 4))


def kept_sets(kept: Kept) -> list[set[int]]:
    found = []
    for j, scores in enumerate(kept.scores):
        columns = (scores > -INF).nonzero().flatten()
        found.append(set((columns if kept.ids is None else kept.ids[j][columns]).tolist()))
    return found


def first_sets(logits: Tensor, cuts: list[Filter], head: int) -> list[set[int]]:
    """What `keep_first` keeps, and `keep_mass` in rows that it does not settle."""
    kept = keep_first(logits, peaks_of(logits), filters_of(cuts), head)
    found = kept_sets(kept)
    flat = [] if kept.settled is None else (~kept.settled[:, 0]).nonzero().flatten().tolist()
    if flat:
        searched = keep_mass(logits[flat], peaks_of(logits[flat]), filters_of([cuts[i] for i in flat]))
        for i, kept_set in zip(flat, kept_sets(searched), strict=True):
            found[i] = kept_set
    return found


@settings(deadline=None)
@given(st.lists(st.one_of(logit, st.floats(width=32, allow_nan=False)), min_size=1, max_size=60), st.data())
def test_order_is_total(values: list[float], data: st.DataObject) -> None:
    """Downward by logit, ties by lowest id, -0.0 a tie of 0.0; a partial selection is the start of the full one."""
    logits = row_of(values)
    count = data.draw(st.integers(1, len(values)))
    assert largest(order_keys(logits), count).tolist() == [in_order(logits[0].tolist())[:count]]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.lists(logit, min_size=70, max_size=70), cut), min_size=1, max_size=4))
def test_kept_sets_equal_the_definition(batch: list[tuple[list[float], Filter]]) -> None:
    """Whether a few tokens were brought into order, or all, or the mass was searched: the kept set is the formula's."""
    before = torch.tensor([v for v, _ in batch], dtype=torch.float32)
    for sorts in (False, True):
        part = [(v, c) for v, c in zip(before.tolist(), [c for _, c in batch], strict=True) if c.sorts == sorts]
        part = [(v, c) for v, c in part if max(v) > -INF]
        if not part:
            continue
        expected = [reference_kept(v, c) for v, c in part]
        assert all(expected)
        logits = torch.tensor([v for v, _ in part])
        cuts = [c for _, c in part]
        for head in (1, 3, 64, 70) if sorts else ():
            assert first_sets(logits, cuts, head) == expected
        if not sorts:
            assert kept_sets(keep_all(logits, peaks_of(logits), filters_of(cuts))) == expected
        assert logits.tolist() == [v for v, _ in part]


@pytest.mark.parametrize(
    ("values", "cut", "kept"),
    [
        ([1.0, 3.0, 2.0], Filter(top_k=2), {1, 2}),
        ([2.0, 2.0, 2.0, 2.0], Filter(top_k=2), {0, 1}),
        ([2.0, 2.0, 2.0, 2.0], Filter(top_p=0.5), {0, 1}),
        ([2.0, 2.0, 2.0, 2.0], Filter(top_p=0.51), {0, 1, 2}),
        ([0.0] * 10, Filter(top_p=0.1), {0}),
        ([0.0] * 10, Filter(top_p=0.3), {0, 1, 2}),
        ([0.0, 5.0, 5.0], Filter(top_p=0.0), {1}),
        # One of two equals is not half of everything if there is anything else, however little.
        ([88.0, 88.0, 59.0], Filter(top_p=0.5), {0, 1}),
        ([88.0, 88.0, 48.0], Filter(top_p=0.5), {0}),
        ([0.0, -200.0, -300.0], Filter(top_p=1.0, top_k=3), {0, 1, 2}),
        ([0.0, -200.0, -300.0], Filter(top_p=1.0 - 2**-53), {0}),
        ([0.0, -INF, -1.0], Filter(top_k=3), {0, 2}),
        ([0.0, math.log(0.5), math.log(0.25)], Filter(min_p=0.4), {0, 1}),
        ([1.0, 1.0, 0.999], Filter(min_p=1.0), {0, 1}),
        # top_p acts on what top_k left: 4/7 of the rest is enough for 0.55, though it is but 4/8 of all.
        ([math.log(4), math.log(3), math.log(1)], Filter(top_k=2, top_p=0.55), {0}),
        ([math.log(4), math.log(3), math.log(1)], Filter(top_p=0.55), {0, 1}),
    ],
    ids=str,
)
def test_filters_on_scripted_logits(values: list[float], cut: Filter, kept: set[int]) -> None:
    logits = row_of(values)
    if cut.sorts:
        for head in (1, 2, 64):
            assert first_sets(logits, [cut], head) == [kept]
    else:
        assert kept_sets(keep_all(logits, peaks_of(logits), filters_of([cut]))) == [kept]


def test_filters_on_a_real_width() -> None:
    """150,000 logits, with and without many ties (as bfloat16 makes them), sharp and flat: all ways agree."""
    noise = torch.randn(1, 151_936, generator=torch.Generator().manual_seed(3)) * 2
    rows = torch.cat([noise, noise.bfloat16().float(), noise * 4, torch.zeros_like(noise)])
    for top_p, temperature in ((0.3, 1.0), (0.95, 1.0), (0.9, 0.3), (0.999, 2.0)):
        cuts = [Filter(temperature, top_p=top_p)] * len(rows)
        search, full = (first_sets(rows, cuts, head) for head in (1, rows.shape[1]))
        assert search == full
        assert len(full[3]) == math.ceil(top_p * 151_936)


def test_edits_follow_their_formulas() -> None:
    """Bias, then repetition over prompt and output, then frequency and presence over the output, then the bans."""
    start = torch.tensor([[1.0, -1.0, 0.5, 2.0, 4.0, -3.0], [1.0, -1.0, 0.5, 2.0, 4.0, -3.0]])
    edits = Edits(6)
    assert not edits
    edits.ban(0, (5, 77))
    edits.penalties(0, {0: 2, 3: 1, 9: 1}, 0.5, 0.25)
    edits.repetition(0, torch.tensor([0, 1, 3]), [3, 0, 8], 2.0)
    edits.bias(0, ((0, 3.0), (2, -100.0), (4, 100.0), (600, 1.0)))
    assert edits
    upload = Upload("cpu")
    edits.pack(upload)
    upload.send()
    edits.apply(start)
    assert start.tolist() == [
        [(1.0 + 3.0) / 2 - (0.5 * 2 + 0.25), -1.0 * 2, -INF, 2.0 / 2 - 0.75, 104.0, -INF],
        [1.0, -1.0, 0.5, 2.0, 4.0, -3.0],
    ]


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_mass_is_one_number_however_it_is_summed(rows: int, threads: tuple[int, int]) -> None:
    """The law rests on this: not the neighbours, the number of threads or the order decide a bit of a logprob."""
    logits = torch.randn(rows, 151_936, generator=torch.Generator().manual_seed(1)) * 5
    found = set()
    for count in threads:
        torch.set_num_threads(count)
        scores = scaled(logits, peaks_of(logits), 0.7)
        found.add(tuple(masses(scores).sum(-1).tolist()))
        found.add(tuple(int(masses(scores[i : i + 1]).sum()) for i in range(rows)))
        found.add(tuple(int(masses(scores[i].flip(0)).sum()) for i in range(rows)))
    assert len(found) == 1
    exact = torch.logsumexp(scores, -1)
    for total, expected in zip(found.pop(), exact.tolist(), strict=True):
        assert log_mass(total) == pytest.approx(expected, abs=5e-8)


def test_exp_ignores_where_an_element_stands(threads: tuple[int, int]) -> None:
    """The only rounded function that masses pass through: a vector loop's tail, or the seam between two threads, must
    not compute another last digit."""
    values = -torch.rand(40_001, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 30
    alone = torch.cat([values[i : i + 1].exp() for i in range(500)])
    for count in threads:
        torch.set_num_threads(count)
        for offset in range(9):
            assert torch.equal(values[offset:].exp()[: 500 - offset], alone[offset:])
            assert torch.equal(values[offset : offset + 13].exp(), alone[offset : offset + 13])
