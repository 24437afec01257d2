"""What a comparison is to reach: ratios to the peers that people run, and memory. Starts nothing.

A goal is a row of the report: our figure and the peer's, their ratio within each repetition, whether it was met.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.common import Summary, ratios, summary
from benchmarks.rivals import LLAMA, Contestant

ONE, EIGHT, PROMPT = "decode, 1 stream", "decode, 8 streams", "prompt"
_ROUNDED = ("int8", "int4")
_AGAINST = {"int4": ("Q4_0", "Q4_K_M"), "int8": ("Q8_0",)}
"""The kinds of GGUF that a user would take instead, of about as many bits."""
DECODE, SAME_FILE, PROMPTS, TOGETHER = 1.15, 1.1, 1.5, 2.0
"""At least so many times the peer: decoding at one stream, likewise the same file in both servers, prompts against
llama.cpp's best kind, eight streams against the best peer."""
PEAK, RESIDENT = 1.15, 1.15
"""At most so many times: the peak over what stays, and what stays over llama.cpp's for the same file."""


def best(case: str, among: Sequence[Contestant]) -> Contestant:
    """Return the fastest by the median of a case in which more is better."""
    return max(among, key=lambda one: summary(one.found[case])["median"])


def goals(everybody: Sequence[Contestant]) -> Iterator[dict[str, Any]]:
    """Yield the rows of all goals for which both sides took part, as keywords of `Report.add`."""
    ours = [one for one in everybody if one.ours]
    peers = [one for one in everybody if not one.ours]
    llama = [one for one in peers if one.name.startswith(LLAMA)]
    for one in ours:
        for other in llama:
            if one.file is None and other.kind in _AGAINST.get(one.kind, ()):
                yield _speed(ONE, one, other, DECODE)
            elif one.file is not None and one.file == other.file:
                yield _speed(ONE, one, other, SAME_FILE, ", the same file")
                yield _memory(one, other)
    rounded = [one for one in ours if one.file is None and one.kind in _ROUNDED]
    for one in rounded if llama else ():
        yield _speed(PROMPT, one, best(PROMPT, llama), PROMPTS, ", the best kind")
    for one in rounded if peers else ():
        if one.kind == "int4":
            yield _speed(EIGHT, one, best(EIGHT, peers), TOGETHER, ", the best peer")
    for one in ours:
        yield _peak(one)


def _speed(case: str, one: Contestant, other: Contestant, least: float, which: str = "") -> dict[str, Any]:
    ratio = ratios(one.found[case], other.found[case])
    return {
        "name": f"goal: {case}: {one.name}",
        "unit": "tokens/s",
        "values": {c.name: summary(c.found[case]) for c in (one, other)},
        "ratio": ratio,
        "ratio_of": f"× {other.name}{which}",
        "goal": f"≥ {least:g} ×",
        "met": ratio["median"] >= least,
    }


def _peak(one: Contestant) -> dict[str, Any]:
    return _most(
        f"goal: peak memory: {one.name}", {"peak": one.peak, "resident": one.resident}, PEAK, "× what stays resident"
    )


def _memory(one: Contestant, other: Contestant) -> dict[str, Any]:
    sizes = {one.name: one.resident, other.name: other.resident}
    return _most(f"goal: resident memory: {one.name}", sizes, RESIDENT, f"× {other.name}, the same file")


def _most(name: str, sizes: dict[str, int], most: float, of: str) -> dict[str, Any]:
    first, second = sizes.values()
    ratio: Summary = summary([first / second])
    return {
        "name": name,
        "unit": "GiB",
        "values": {label: summary([size / 2**30]) for label, size in sizes.items()},
        "ratio": ratio,
        "ratio_of": of,
        "goal": f"≤ {most:g} ×",
        "met": ratio["median"] <= most,
    }


def beside_the_best(case: str, less: bool, everybody: Sequence[Contestant]) -> str:
    """Say how each of our entries does beside the best peer in a case; empty without peers. `less`: less is better."""
    peers = [one for one in everybody if not one.ours]
    if not peers:
        return ""
    sign = -1 if less else 1
    top = max(peers, key=lambda one: sign * summary(one.found[case])["median"])
    shares = [f"{one.name} {ratios(one.found[case], top.found[case])['median']:.2f} ×" for one in everybody if one.ours]
    return f"beside the best peer, {top.name}: {', '.join(shares)}."
