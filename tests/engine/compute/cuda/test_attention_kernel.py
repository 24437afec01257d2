"""A row's attention has the same bits whatever is computed with it, and those are right to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes with a CUDA build of torch, or with the development tools")

import interpreter

from engine.compute.attention_mask import ALL_BEFORE, KeyRange
from engine.compute.backend import AttentionSettings, PackedChunk
from engine.compute.cuda.kernels import attention
from engine.compute.cuda.operations import AttentionWork, Partials
from engine.compute.cuda.steps import tables as step_tables
from engine.compute.cuda.steps.tables import AttentionKind, Limits, StepTables
from engine.compute.kv_cache import LayerShape
from engine.scheduling.block_pool import BLOCK_SIZE

interpreter.install()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TILE, SPLIT = 16, 32
"""A quarter and less of what is served with: 52 keys are four tiles in two splits."""
LENGTHS = (52, 7, 36)
NO_ITEM, NO_MERGE = (0, 1, 0, 0, 0, 0, -1, 0), (0, 0, 0, 0)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ERROR = {FP32: 2e-6, FP16: 2e-3, BF16: 1.6e-2}
"""Largest error of a result: a weighted mean of normally distributed values, rounded to the dtype."""


@dataclass(frozen=True)
class Case:
    """A kind of layer: `group` query heads share a key head of `dim` numbers, the rest as in its settings."""

    group: int
    dim: int
    dtype: torch.dtype
    seen: KeyRange = ALL_BEFORE
    softcap: float | None = None
    sinks: bool = False
    value_dim: int | None = None
    kv_heads: int = 1

    def __str__(self) -> str:
        more = f" softcap {self.softcap}" * bool(self.softcap) + " sinks" * self.sinks
        dims = f"{self.dim}" if self.value_dim is None else f"{self.dim}/{self.value_dim}"
        return f"{self.group}x{dims} {str(self.dtype)[6:]} {self.seen.describe()}{more}"


@dataclass(frozen=True)
class Part:
    """A chunk: the tokens `start … start + count - 1` of a sequence."""

    sequence: int
    start: int
    count: int


class World:
    """Sequences in one cache, whose blocks lie in any order; unwritten slots hold `stale`."""

    def __init__(self, case: Case, lengths: Sequence[int] = LENGTHS, stale: float = 3.0) -> None:
        self.case, self.lengths = case, lengths
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE)

        value_dim = case.value_dim or case.dim
        heads, blocks = case.kv_heads * case.group, sum(-(-length // BLOCK_SIZE) for length in lengths)
        self.shape = LayerShape(case.kv_heads, case.dim, value_dim, case.dtype, DEVICE, case.seen)
        sinks = (normal(heads) * 4).to(case.dtype) if case.sinks else None
        self.settings = AttentionSettings(heads, case.dim**-0.5, case.softcap, sinks)
        order = torch.randperm(blocks, generator=generator).tolist()
        self.keys = torch.full((case.kv_heads, blocks * BLOCK_SIZE, case.dim), stale, dtype=case.dtype, device=DEVICE)
        self.values = torch.full(
            (case.kv_heads, blocks * BLOCK_SIZE, value_dim), stale, dtype=case.dtype, device=DEVICE
        )
        self.tables: list[tuple[int, ...]] = []
        self.queries: list[Tensor] = []
        for length in lengths:
            table = tuple(order.pop() for _ in range(-(-length // BLOCK_SIZE)))
            slots = [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)]
            self.keys[:, slots] = normal(case.kv_heads, length, case.dim).to(case.dtype)
            self.values[:, slots] = normal(case.kv_heads, length, value_dim).to(case.dtype)
            self.queries.append(normal(heads, length, case.dim).to(case.dtype))
            self.tables.append(table)

    def run(self, *parts: Part, programs: int = 5, tile: int = TILE, split: int = SPLIT) -> list[Tensor]:
        """Attend in one step, in this order; the result's rows part by part: `[count, heads, value_dim]`."""
        chunks: list[PackedChunk] = []
        rows = 0
        for part in parts:
            blocks = self.tables[part.sequence][: -(-(part.start + part.count) // BLOCK_SIZE)]
            chunks.append(PackedChunk(rows, part.count, part.start, blocks))
            rows += part.count
        work, partials = self._tables(chunks, rows)
        # As a model makes it: positions outermost, then heads.
        queries = [self.queries[p.sequence][:, p.start : p.start + p.count] for p in parts]
        query = torch.cat(queries, 1).transpose(0, 1).contiguous().transpose(0, 1)
        out = attention.attend(
            query,
            self.keys,
            self.values,
            work,
            partials,
            self.shape,
            self.settings,
            programs=programs,
            tile=tile,
            split=split,
        )
        return list(out.split([part.count for part in parts]))

    def _tables(self, chunks: Sequence[PackedChunk], rows: int) -> tuple[AttentionWork, Partials]:
        """The step's tables, each with a line behind those that count that would make row 0 zeros."""
        group, seen = self.case.group, self.case.seen
        kind = AttentionKind(group, seen.window, seen.chunk)
        tile_rows = max(attention.NARROW, group), max(attention.WIDE, group)
        tables = StepTables.of(chunks, [kind], Limits(rows, len(chunks), max(self.lengths), tile_rows))
        (of_kind,) = tables.kinds

        def table(numbers: Sequence[int], more: Sequence[int]) -> Tensor:
            return torch.tensor([*numbers, *more], dtype=torch.int32, device=DEVICE).view(-1, len(more))

        work = AttentionWork(
            table(of_kind.narrow, NO_ITEM),
            table(of_kind.wide, NO_ITEM),
            table(of_kind.merges, NO_MERGE),
            torch.tensor(of_kind.counts, dtype=torch.int32, device=DEVICE),
            torch.tensor(tables.blocks, dtype=torch.int32, device=DEVICE),
        )
        slots, heads = of_kind.partials + 1, self.settings.heads
        unwritten = (torch.full(size, torch.nan, device=DEVICE) for size in ((slots, heads),) * 2)
        return work, Partials(torch.full((slots, heads, self.shape.value_dim), torch.nan, device=DEVICE), *unwritten)

    def expected(self, sequence: int) -> Tensor:
        """The attention of a whole sequence in float64: `[length, heads, value_dim]`."""
        slots = [t * BLOCK_SIZE + i for t in self.tables[sequence] for i in range(BLOCK_SIZE)]
        slots = slots[: self.lengths[sequence]]
        keys, values = (c[:, slots].double().repeat_interleave(self.case.group, 0) for c in (self.keys, self.values))
        scores = self.queries[sequence].double() @ keys.transpose(1, 2) * self.settings.scale
        if self.case.softcap:
            scores = self.case.softcap * torch.tanh(scores / self.case.softcap)
        at = torch.arange(len(slots), device=DEVICE)
        hidden = (at[None] > at[:, None]) | (at[None] < self.case.seen.first(at)[:, None])
        scores = scores.masked_fill(hidden, float("-inf"))
        if self.settings.sinks is not None:
            sinks = self.settings.sinks.double()[:, None, None].expand(-1, len(slots), 1)
            scores = torch.cat([scores, sinks], -1)
        return (scores.softmax(-1)[..., : len(slots)] @ values).transpose(0, 1)


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_tables, "SPLIT", SPLIT)


WINDOW, CHUNK, BOTH = KeyRange(window=18), KeyRange(chunk=20), KeyRange(window=30, chunk=36)
# Every group, dim, dtype, key range and score function in a case at least; in the sweep, most pairs of them in one.
QUICK = (
    Case(1, 64, FP32),
    Case(2, 80, BF16, WINDOW, kv_heads=2),
    Case(3, 96, FP16, CHUNK),
    Case(4, 64, BF16, softcap=5.0, sinks=True),
)
SLOW = (
    Case(7, 64, FP16, WINDOW, sinks=True),
    Case(1, 256, FP16, WINDOW, softcap=5.0),
    Case(2, 128, FP32, CHUNK, sinks=True),
    Case(4, 80, FP16, BOTH, kv_heads=2),
    Case(8, 128, FP16),
    Case(2, 96, BF16, value_dim=64),
)
SWEEP = (
    Case(3, 128, BF16, sinks=True),
    Case(4, 256, FP32, WINDOW),
    Case(7, 96, FP32, softcap=5.0),
    Case(8, 256, BF16, CHUNK, softcap=5.0),
    Case(8, 80, FP32, BOTH, sinks=True),
    Case(7, 256, BF16, value_dim=128),
)
CASES = [pytest.param(case, id=str(case)) for case in QUICK]
CASES += [pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in SLOW]
CASES += [pytest.param(case, id=str(case), marks=pytest.mark.sweep) for case in SWEEP]


@pytest.mark.parametrize("case", CASES)
def test_a_row_has_the_same_bits_in_every_step(case: Case) -> None:
    world = World(case)
    whole = [world.run(Part(s, 0, length))[0] for s, length in enumerate(LENGTHS)]
    for sequence, result in enumerate(whole):
        assert (result.double() - world.expected(sequence)).abs().max() < ERROR[case.dtype]

    def same(*parts: Part, programs: int = 5) -> bool:
        results = world.run(*parts, programs=programs)
        pairs = zip(parts, results, strict=True)
        return all(torch.equal(out, whole[p.sequence][p.start : p.start + p.count]) for p, out in pairs)

    first, second, third = LENGTHS
    assert same(Part(2, 0, third), Part(0, 0, first), Part(1, 0, second)), "packed in another order"
    assert same(*(Part(0, start, min(17, first - start)) for start in range(0, first, 17))), "chunks of 17"
    assert same(*(Part(0, position, 1) for position in (15, 16, 31, 32, 51))), "decode rows, merged"
    assert same(Part(0, 29, 5)), "a draft: rows of one chunk, each an item"
    assert same(Part(1, 6, 1), Part(0, 51, 1), Part(2, 20, 14), Part(0, 33, 1)), "a mixed step"
    assert same(Part(0, 40, 12), Part(2, 35, 1), programs=1), "another grid"


@pytest.mark.slow
@pytest.mark.parametrize("group", [20, 70])
def test_a_group_larger_than_a_tile_is_computed_in_parts(group: int) -> None:
    """Of 20 heads, 16 fit a narrow tile; of 70, 64 a wide one."""
    world = World(Case(group, 16, FP32, WINDOW, sinks=True), (36,))
    (whole,) = world.run(Part(0, 16, 20))
    assert torch.equal(world.run(Part(0, 35, 1))[0], whole[-1:])
    assert (whole.double() - world.expected(0)[16:]).abs().max() < ERROR[FP32]


def test_another_split_has_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above could not see an order of sums that depends on the step."""
    world = World(Case(2, 64, BF16))
    (one,) = world.run(Part(0, 0, 52))
    monkeypatch.setattr(step_tables, "SPLIT", 2 * SPLIT)
    (other,) = world.run(Part(0, 0, 52), split=2 * SPLIT)
    assert not torch.equal(one, other)
    assert torch.equal(one[:SPLIT], other[:SPLIT]), "rows of one split know no other"
    monkeypatch.setattr(step_tables, "SPLIT", SPLIT)
    (other,) = world.run(Part(0, 0, 52), tile=2 * TILE)
    assert not torch.equal(one, other)


def test_what_was_in_the_cache_before_changes_nothing() -> None:
    parts = Part(0, 0, 52), Part(1, 6, 1), Part(2, 9, 20)
    case = Case(2, 64, FP16, WINDOW)
    for one, other in zip(World(case).run(*parts), World(case, stale=-60000.0).run(*parts), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_row_of_no_finite_query_leaves_its_neighbours_alone() -> None:
    case = Case(4, 64, BF16)
    world, broken = World(case), World(case)
    broken.queries[0][:, 30] = torch.nan
    (whole,), (result,) = world.run(Part(0, 0, 52)), broken.run(Part(0, 0, 52))
    assert torch.equal(result[:30], whole[:30])
    assert torch.equal(result[31:], whole[31:])
    assert result[30].isnan().all()


def test_the_tiles_that_are_served_with() -> None:
    """Tiles of 64 keys and splits of 256: two splits, the narrow items and the wide ones."""
    case = Case(4, 64, BF16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_tables, "SPLIT", attention.SPLIT)
        world = World(case, (300,))
        served = {"tile": attention.TILE, "split": attention.SPLIT}
        (wide,) = world.run(Part(0, 260, 40), **served)
        (narrow,) = world.run(Part(0, 299, 1), **served)
        assert torch.equal(narrow, wide[-1:])
        assert (wide.double() - world.expected(0)[260:]).abs().max() < ERROR[BF16]
