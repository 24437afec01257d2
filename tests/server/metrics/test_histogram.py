"""Histograms and throughputs against slow ones, over any numbers."""

from __future__ import annotations

from hypothesis import given, strategies as st

from server.metrics.histogram import WINDOW, Histogram, Throughput

NUMBERS = st.floats(0, 1e6, allow_nan=False)


@given(bounds=st.sets(NUMBERS, min_size=1, max_size=6), values=st.lists(NUMBERS, max_size=30))
def test_a_bucket_has_all_that_is_at_most_its_bound(bounds: set[float], values: list[float]) -> None:
    found = Histogram(sorted(bounds))
    for value in [*values, *bounds]:  # those that are equal to a bound, too
        found.observe(value)
    everything = [*values, *bounds]
    slow = [sum(value <= bound for value in everything) for bound in sorted(bounds)]
    assert found.cumulative() == [*slow, len(everything)]
    assert found.count == len(everything)


@given(events=st.lists(st.tuples(st.floats(0, 3), st.integers(0, 100)), max_size=40), later=st.floats(0, 9))
def test_a_throughput_is_the_mean_of_the_last_whole_seconds(events: list[tuple[float, int]], later: float) -> None:
    rate, now, seen = Throughput(), 1000.5, []
    for pause, tokens in events:
        now += pause
        rate.add(now, tokens)
        seen.append((int(now), tokens))
    now += later
    slow = sum(tokens for second, tokens in seen if int(now) - WINDOW <= second < int(now))
    assert rate.per_second(now) == slow / WINDOW
