"""The sampler sends once and reads once: what a GPU's host has to wait for, counted on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.sampling import contenders as contenders_file, drawing
from engine.sampling.contenders import contenders
from engine.sampling.rng import gaps, gumbel, token_steps
from engine.sampling.sampler import Sampled, Sampler
from engine.sampling.transfer import HostCopy, Readback, Upload
from engine.scheduling.sequence import Sequence
from engine.types.sampling_params import SamplingParams
from tests.packed_masks import packed
from tests.sync_counter import SyncCounter

INF = float("inf")
WIDTH = 3_000
RAW, PROCESSED = {"logprobs": True, "top_logprobs": 3}, {"logprobs": True, "logprobs_mode": "processed"}


def params(**given: Any) -> SamplingParams:
    return SamplingParams(**given)


def row(p: SamplingParams, seed: int = 0, *, records: bool = False, follow: tuple[int, ...] | None = None) -> Any:
    made = Sequence(
        request_id="r", choice_index=0, prompt_token_ids=(1, 4), params=p, seed=seed, records=records, follow=follow
    )
    made.append(9)
    return _Row(made)


class _Row:
    """A row as the scheduler's `Draw` makes it of a sequence."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.expected = None if sequence.follow is None else sequence.follow[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sequence, name)


def peaked(rows: int, width: int = WIDTH) -> Tensor:
    """Rows of which a few tokens have nearly all of the mass."""
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(3))
    logits[:, 50:60] += 14.0
    return logits


def sampler_of(width: int = WIDTH, *, as_on_device: bool = True) -> Sampler:
    """A sampler that takes the ways of a GPU's."""
    made = Sampler(width, (7, width - 1), (2,))
    if as_on_device:
        made._columns = replace(made._columns, head=64, sorts_all=True, chunk=2)
    return made


GREEDY, PLAIN = params(temperature=0.0), params(temperature=0.8)
MIXTURES: dict[str, list[Any]] = {
    "greedy": [row(GREEDY)] * 3,
    "drawn": [row(PLAIN, seed) for seed in range(5)],
    "min_p": [row(params(min_p=0.1), seed) for seed in range(3)],
    "top_k": [row(params(top_k=20), 1), row(params(top_k=300), 2)],
    "top_p": [row(params(top_p=0.9), seed) for seed in range(3)],
    "top_k beside top_p": [row(params(top_p=0.9, top_k=k, min_p=0.01), k) for k in (0, 5, 0, 9)],
    "edits": [
        row(params(logit_bias={4: 1.0}, min_tokens=9)),
        row(params(repetition_penalty=1.2)),
        row(params(frequency_penalty=1.0, presence_penalty=0.5)),
    ],
    "raw logprobs": [row(params(**RAW), 1), row(params(temperature=0.0, **RAW)), row(params(top_k=9, **RAW), 3)],
    "processed logprobs": [row(params(**PROCESSED), 1), row(params(temperature=0.0, **PROCESSED), 2)],
    "margins": [row(params(margins=True), 1), row(params(temperature=0.0, margins=True)), row(PLAIN)],
    "records": [row(PLAIN, 1, records=True), row(GREEDY, records=True), row(PLAIN)],
    "checks of the same token": [row(GREEDY, follow=(55,)), row(params(top_k=1), follow=(55,))],
    "a check of another token, at temperature 0": [row(GREEDY, follow=(8,))],
    "everything": [
        row(params(top_p=0.9, margins=True, **PROCESSED, top_logprobs=2), 1, records=True),
        row(params(temperature=0.0, margins=True, **RAW), 2, records=True),
        row(params(repetition_penalty=1.1, margins=True, **RAW), 3),
        row(params(top_k=9, margins=True, **PROCESSED), 4),
    ],
}


@pytest.mark.parametrize("masked", [False, True], ids=["free", "masked"])
@pytest.mark.parametrize("name", MIXTURES)
def test_one_transfer_each_way(name: str, masked: bool) -> None:
    """Whatever the rows are and whoever sits beside whom."""
    rows, logits, sampler = MIXTURES[name], peaked(6), sampler_of()
    if name.startswith("a check of") or name.startswith("checks"):
        logits[:, 55] += 9.0
    sources = [(2 * i + 1) % 6 for i in range(len(rows))]
    allowed = packed(np.ones((len(rows), WIDTH), dtype=np.bool_)) if masked else None
    sampler.sample(logits, rows, sources)  # prompts are sent when they are seen first
    with SyncCounter() as seen:
        found = sampler.sample(logits, rows, sources, allowed)
    assert all(isinstance(one, Sampled) for one in found)
    assert len(seen.reads) == 1, seen.reads
    assert len(seen.uploads) == 1, seen.uploads
    assert found == sampler_of(as_on_device=False).sample(logits[sources], rows, None, allowed)


def test_a_row_that_fails_costs_its_neighbours_nothing() -> None:
    logits = peaked(4)
    logits[1, 5], logits[2] = INF, -INF
    with SyncCounter() as seen:
        first, broken, empty, last = sampler_of().sample(logits, [row(params(**RAW), i) for i in range(4)])
    assert isinstance(first, Sampled)
    assert isinstance(last, Sampled)
    assert not isinstance(broken, Sampled)
    assert not isinstance(empty, Sampled)
    assert len(seen.reads) == 1, seen.reads


SECOND: dict[str, list[Any]] = {
    "flat": [row(params(top_p=0.9), 1), row(params(top_p=0.95, **PROCESSED, margins=True), 2, records=True)],
    "another token than expected": [row(PLAIN, 1, follow=(8,)), row(params(top_p=0.5, top_k=3), 2, follow=(9,))],
}


@pytest.mark.parametrize("name", SECOND)
def test_rare_rows_take_a_second_one(name: str) -> None:
    rows = [*SECOND[name], row(GREEDY, 5), row(params(top_k=3), 6)]
    logits = torch.zeros(4, WIDTH) if name == "flat" else peaked(4)
    sampler = sampler_of()
    with SyncCounter() as seen:
        found = sampler.sample(logits, rows)
    assert len(seen.reads) == 2, seen.reads
    assert len(seen.uploads) <= 2, seen.uploads
    assert found == sampler_of(as_on_device=False).sample(logits, rows)


def test_a_description_of_a_prompt_is_one_transfer() -> None:
    sampler, logits = sampler_of(), peaked(5)
    with SyncCounter() as seen:
        found = sampler.describe(logits, [0, 2, 3, 4, 1], [5, 6, 7, 8, 9], [0, 3, 0, 1, 0])
    assert len(found) == 5
    assert len(seen.reads) == 1, seen.reads
    assert len(seen.uploads) == 1, seen.uploads


@pytest.mark.parametrize("few", [1, 2, 3])
def test_draws_do_not_depend_on_how_many_contenders_are_looked_at(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a few are not enough, the row is drawn again with more: the same token and numbers."""
    rows = [
        row(params(**more, margins=True, **RAW), seed, records=True)
        for seed in range(40)
        for more in ({}, {"top_k": 9}, {"top_p": 0.8}, {"temperature": 2.0}, {"min_p": 0.5})
    ]
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(2)) / 4
    usual = sampler_of(200).sample(logits, rows, [0] * len(rows))
    again: list[int] = []
    made = drawing.Batch

    def batch(rows: Any, names: Any, *arguments: Any, **more: Any) -> Any:
        again.extend(names if more.get("again") else ())
        return made(rows, names, *arguments, **more)

    monkeypatch.setattr(drawing, "CONTENDERS", few)
    monkeypatch.setattr(drawing, "Batch", batch)
    assert sampler_of(200).sample(logits, rows, [0] * len(rows)) == usual
    assert len(again) > 2, "no row needed more"


@pytest.mark.parametrize("width", [1, 5, 8, 9, 600, 8_193, 20_000])
@pytest.mark.parametrize("count", [1, 8])
def test_contenders_hold_the_winner_or_say_that_they_may_not(width: int, count: int) -> None:
    """With ties, forbidden tokens and rows that are shorter than the list."""
    generator = torch.Generator().manual_seed(width)
    scores = (torch.randn(40, width, generator=generator, dtype=torch.float64) * 2).round()
    scores[::3, torch.randperm(width, generator=generator)[: width // 2]] = -INF
    scores -= scores.amax(-1, keepdim=True)
    keys = torch.randint(-(2**62), 2**62, (40, 1), generator=generator)
    token_gaps = gaps(keys, token_steps(width))
    found = contenders(scores, token_gaps, count)
    assert found.columns.shape == (40, min(count, width))
    for i in range(40):
        perturbed = [s + gumbel(g) for s, g in zip(scores[i].tolist(), token_gaps[i].tolist(), strict=True)]
        winner = perturbed.index(max(perturbed))
        listed = [c for c, s in zip(found.columns[i].tolist(), found.scores[i].tolist(), strict=True) if s > -INF]
        assert listed == found.columns[i].tolist()[: len(listed)]  # the others stand behind
        if found.complete[i]:
            assert winner in listed
            assert found.columns[i, found.likely[i]] == winner
    assert bool(found.complete.all()) == (count == 8 or width == 1)


@pytest.mark.parametrize("count", [1, 7, 8])
def test_the_smallest_are_found_by_blocks(count: int) -> None:
    """Also in the tail behind the last whole block, and where infinities are all there is."""
    width = contenders_file._FEW_COLUMNS + 700
    race = torch.rand(6, width, generator=torch.Generator().manual_seed(1))
    race[1, -5:] = -1.0
    race[2] = INF
    race[3, 4] = 0.0
    race[4] = 0.25
    least, columns = contenders_file._smallest(race, count, width)
    assert torch.equal(least, race.sort(-1).values[:, :count])
    assert torch.equal(race.gather(1, columns), least)
    assert all(len(set(one)) == count for one in columns.tolist())


def test_the_device_decides_the_same_token() -> None:
    """It may differ where two perturbed scores are within one unit in the last place, which is not seen here."""
    rows = [row(p, seed) for seed in range(50) for p in (PLAIN, GREEDY, params(top_k=4), params(top_p=0.9))]
    started = sampler_of().start(peaked(1), rows, [0] * len(rows))
    with SyncCounter() as seen:
        tokens = started.device_tokens()
    assert not seen.reads
    results = started.finish()
    assert tokens.tolist() == [one.token_id for one in results if isinstance(one, Sampled)]


def test_transfers_are_exact() -> None:
    """Integers of 64 bits and floats keep every bit on the way there, and whole numbers below 2**53 on the way back."""
    upload = Upload("cpu")
    ints, floats = upload.ints([-(2**63), 2**63 - 1]), upload.floats([0.1, -INF, -0.0])
    words, empty = upload.words(np.array([-1, 5, 2**31 - 1], dtype=np.int32).tobytes()), upload.ints([])
    upload.send()
    assert ints.tensor.tolist() == [-(2**63), 2**63 - 1]
    assert str(floats.tensor.tolist()) == "[0.1, -inf, -0.0]"
    assert words.tensor.tolist() == [-1, 5, 2**31 - 1]
    assert len(empty) == len(empty.tensor) == 0
    readback, got = Readback(), []
    readback.add(
        lambda *tables: got.append(tables), torch.tensor([[2**53 - 1, 1]]), torch.tensor([[0.5]]), torch.zeros(1, 0)
    )
    readback.add(lambda table: got.append(table), torch.tensor([[True], [False]]))
    readback.fetch()
    assert got == [([[2.0**53 - 1, 1.0]], [[0.5]], [[]]), [[1.0], [0.0]]]
    assert HostCopy(torch.tensor([True, False])).read() == [True, False]


@pytest.mark.parametrize(
    ("read", "count"),
    [
        (lambda t: t.sum().item(), 1),
        (lambda t: t.tolist(), 1),
        (lambda t: bool(t[0] > 0), 1),
        (lambda t: t[t > 0], 1),
        (lambda t: t.nonzero(), 1),
        (lambda t: float(t[0]) + int(t[1]), 2),
        (lambda t: t.masked_fill(t > 0, 1.0).amax(), 0),
        (lambda t: t[torch.zeros(2, dtype=torch.int64)], 0),
        (lambda t: torch.equal(t, t), 1),
    ],
)
def test_the_counter_sees_what_waits(read: Any, count: int) -> None:
    numbers = torch.ones(3)
    for mode in (torch.inference_mode(True), torch.inference_mode(False)):
        with mode, SyncCounter() as seen:
            read(numbers)
        assert len(seen.reads) == count, seen.reads


@contextmanager
def nothing_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXTURES)
def test_a_gpu_waits_for_nothing_but_the_readback(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows, sampler = MIXTURES[name], Sampler(WIDTH, (7, WIDTH - 1), (2,), "cuda")
    logits, sources = peaked(6).cuda(), [(2 * i + 1) % 6 for i in range(len(rows))]
    allowed = packed(np.ones((len(rows), WIDTH), dtype=np.bool_))
    expected = sampler.sample(logits, rows, sources, allowed)
    with nothing_waits():
        started = sampler.start(logits, rows, sources, allowed)
        started.device_tokens()
    assert started.finish() == expected
