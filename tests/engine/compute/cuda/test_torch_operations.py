"""The operations in torch are right, and compute each row as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.compute.attention_mask import KeyRange
from engine.compute.backend import AttentionSettings, PackedChunk
from engine.compute.cuda import reference
from engine.compute.cuda.operations import AttentionWork, LinearWeight, NormKind, Operations, Partials
from engine.compute.cuda.reference import TorchOperations
from engine.compute.cuda.steps import tables as step_tables
from engine.compute.cuda.steps.tables import AttentionKind, Limits, StepTables
from engine.compute.cuda.weights import widened
from engine.compute.kv_cache import LayerShape
from engine.scheduling.block_pool import BLOCK_SIZE

OPERATIONS: Operations = TorchOperations()
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = list(TOLERANCE)
CPU = torch.device("cpu")


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


# -- attention --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    dtype: torch.dtype
    heads: int
    kv_heads: int
    dims: tuple[int, int]
    seen: KeyRange = KeyRange()
    softcap: float | None = None
    sinks: bool = False


CASES = {
    "plain": Case(torch.float32, 4, 2, (16, 16)),
    "bfloat16, three heads a key head": Case(torch.bfloat16, 6, 2, (16, 16)),
    "values of another size": Case(torch.float32, 2, 2, (24, 8)),
    "float16, a window": Case(torch.float16, 4, 1, (16, 16), KeyRange(window=50)),
    "a window over splits, sinks": Case(torch.bfloat16, 7, 1, (16, 16), KeyRange(window=300), sinks=True),
    "chunks": Case(torch.float32, 2, 1, (16, 16), KeyRange(chunk=270)),
    "capped scores": Case(torch.float32, 4, 2, (16, 16), softcap=2.0),
    "capped scores, sinks": Case(torch.float32, 4, 2, (16, 16), softcap=2.0, sinks=True),
    "more heads than a narrow tile has rows": Case(torch.float32, 20, 1, (8, 8), sinks=True),
}
LENGTHS = (600, 33, 290)
Part = tuple[int, int, int]
"""Sequence, first position, rows."""


@dataclass
class World:
    """Sequences whose keys and values lie in a cache, in blocks that are scattered over it."""

    case: Case
    keys: Tensor
    values: Tensor
    sequences: list[tuple[Tensor, Tensor, Tensor, tuple[int, ...]]]

    @classmethod
    def of(cls, case: Case) -> World:
        number = sum(-(-length // BLOCK_SIZE) for length in LENGTHS) + 3
        free = torch.randperm(number, generator=torch.Generator().manual_seed(1)).tolist()
        keys, values = (_random(case.kv_heads, number * BLOCK_SIZE, dim, dtype=case.dtype) for dim in case.dims)
        sequences = []
        for seed, length in enumerate(LENGTHS):
            table = tuple(free.pop() for _ in range(-(-length // BLOCK_SIZE)))
            query = _random(case.heads, length, case.dims[0], seed=seed, dtype=case.dtype)
            key, value = (_random(case.kv_heads, length, dim, seed=9 + seed, dtype=case.dtype) for dim in case.dims)
            chunk = PackedChunk(0, length, 0, table)
            keys[:, chunk.slots()], values[:, chunk.slots()] = key, value
            sequences.append((query, key, value, table))
        return cls(case, keys, values, sequences)

    @property
    def settings(self) -> AttentionSettings:
        sinks = _random(self.case.heads, seed=5) if self.case.sinks else None
        return AttentionSettings(self.case.heads, self.case.dims[0] ** -0.5, self.case.softcap, sinks)

    def attend(self, parts: Sequence[Part], limits: Limits | None = None) -> list[Tensor]:
        """Compute parts of sequences in one step, in this order: `[rows, heads, value_dim]` of each."""
        case, chunks, row = self.case, [], 0
        for sequence, start, count in parts:
            chunks.append(PackedChunk(row, count, start, self.sequences[sequence][3][: -(-(start + count) // 16)]))
            row += count
        limits = limits or Limits(rows=2000, sequences=64, length=1024, tile_rows=OPERATIONS.tile_rows)
        kind = AttentionKind(case.heads // case.kv_heads, case.seen.window, case.seen.chunk)
        step = StepTables.of(chunks, [kind], limits)
        query = torch.cat([self.sequences[s][0][:, a : a + n] for s, a, n in parts], dim=1)
        shape = LayerShape(case.kv_heads, *case.dims, case.dtype, CPU, case.seen)
        work, partials = _on_device(step, limits.partials(kind), case)
        out = OPERATIONS.attend(query, self.keys, self.values, work, partials, shape, self.settings)
        assert out.dtype == case.dtype
        return list(out.split([count for _, _, count in parts]))

    def right(self, sequence: int) -> Tensor:
        """The result in float64: `[rows, heads, value_dim]`."""
        query, key, value, _ = (
            part.double() if isinstance(part, Tensor) else part for part in self.sequences[sequence]
        )
        groups = self.case.heads // self.case.kv_heads
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
        scores = torch.einsum("hnd,hld->hnl", query, key) * self.settings.scale
        if self.case.softcap:
            scores = self.case.softcap * torch.tanh(scores / self.case.softcap)
        at = torch.arange(key.shape[1])
        hidden = (at[None] > at[:, None]) | (at[None] < self.case.seen.first(at)[:, None])
        scores = scores.masked_fill(hidden, -math.inf)
        if self.settings.sinks is not None:
            sinks = self.settings.sinks.double()[:, None, None].expand(-1, len(at), 1)
            scores = torch.cat([scores, sinks], -1)
        return torch.einsum("hnl,hld->nhd", scores.softmax(-1)[..., : len(at)], value)


def _on_device(step: StepTables, slots: int, case: Case) -> tuple[AttentionWork, Partials]:
    """The tables at the start of larger ones, whose other rows must not be read, and partials that hold NaN."""
    (tables,) = step.kinds

    def table(flat: Sequence[int], width: int) -> Tensor:
        rows = torch.tensor(list(flat), dtype=torch.int32).view(-1, width)
        return torch.cat([rows, torch.full((5, width), 1 << 30, dtype=torch.int32)])

    work = AttentionWork(
        table(tables.narrow, step_tables.ITEM),
        table(tables.wide, step_tables.ITEM),
        table(tables.merges, step_tables.MERGE),
        torch.tensor(tables.counts, dtype=torch.int32),
        table(step.blocks, 1).flatten(),
    )
    unset = torch.full((slots, case.heads), math.nan)
    return work, Partials(unset[..., None].repeat(1, 1, case.dims[1]), unset.clone(), unset.clone())


@pytest.fixture(scope="module", params=CASES)
def world(request: pytest.FixtureRequest) -> World:
    return World.of(CASES[request.param])


@pytest.fixture(scope="module")
def alone(world: World) -> list[Tensor]:
    """Each sequence in one step of its own."""
    return [world.attend([(sequence, 0, length)])[0] for sequence, length in enumerate(LENGTHS)]


def test_attention_is_right(world: World, alone: list[Tensor]) -> None:
    for sequence, out in enumerate(alone):
        assert (out.double() - world.right(sequence)).abs().max() < TOLERANCE[world.case.dtype]


@pytest.mark.parametrize(
    "parts",
    [
        [(2, 0, 290), (0, 0, 600), (1, 0, 33)],
        [(0, start, min(17, 600 - start)) for start in range(0, 600, 17)],
        [(0, position, 1) for position in range(5, 600, 11)],
        [(0, 250, 9), (2, 281, 9), (0, 590, 5), (1, 0, 2)],
        [(1, 32, 1), (0, 599, 1), (2, 40, 250), (0, 64, 1), (1, 20, 3)],
    ],
    ids=["packed in another order", "chunks of 17", "decodes", "drafts", "a mixed step"],
)
def test_a_row_has_the_bits_it_has_alone(world: World, alone: list[Tensor], parts: list[Part]) -> None:
    """Whether it is computed by a wide item or by one item a split, and whatever is computed beside it."""
    for (sequence, start, count), out in zip(parts, world.attend(parts), strict=True):
        assert torch.equal(out, alone[sequence][start : start + count]), (sequence, start)


def test_a_draft_in_one_item_has_the_bits_of_single_rows(
    world: World, alone: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no room for its partial results."""
    limits = Limits(rows=9, sequences=1, length=600, tile_rows=OPERATIONS.tile_rows)
    split = world.attend([(0, 591, 9)], limits)[0]
    monkeypatch.setattr(step_tables, "ROOMY", 1)
    for out in (split, world.attend([(0, 591, 9)], limits)[0]):
        assert torch.equal(out, alone[0][591:])


def test_parts_that_are_computed_side_by_side_do_not_matter(
    world: World, alone: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_ROOM", 1 << 18)
    assert torch.equal(world.attend([(0, 500, 100), (1, 0, 33)])[0], alone[0][500:])


def test_other_splits_have_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So these tests can see an order that changed."""
    world = World.of(CASES["plain"])
    before = world.attend([(0, 0, 600)])[0]
    monkeypatch.setattr(step_tables, "SPLIT", 128)
    monkeypatch.setattr(reference, "_TILES", 2)
    after = world.attend([(0, 0, 600)])[0]
    assert torch.equal(before[:128], after[:128])
    assert not torch.equal(before, after)
    assert (before - after).abs().max() < 2e-6


def test_an_item_of_any_tile_may_merge_its_splits_beside_items_of_one() -> None:
    """As the tables say: what is written, and what is left to be merged, is a matter of the item alone."""
    world = World.of(CASES["capped scores, sinks"])
    case, table = world.case, world.sequences[0][3]
    step = StepTables.of([PackedChunk(0, 1, 599, table)], [AttentionKind(2)], Limits(2, 1, 600, (16, 64)))
    work, partials = _on_device(step, 3, case)
    narrow = torch.cat([torch.tensor([[1, 1, 599, 0, 0, 3, -1, 0]], dtype=torch.int32), work.narrow])
    work = replace(work, narrow=narrow, counts=torch.tensor([4, 0, 1], dtype=torch.int32))
    query = world.sequences[0][0][:, [599, 599]]
    shape = LayerShape(case.kv_heads, *case.dims, case.dtype, CPU)
    split, whole = OPERATIONS.attend(query, world.keys, world.values, work, partials, shape, world.settings)
    assert torch.equal(split, whole)


def test_weights_are_rounded_to_the_dtype_of_the_values() -> None:
    """As the matrix unit takes them; the sum of the weights, too, is one of rounded weights."""
    keys, values = _random(1, BLOCK_SIZE, 8, dtype=torch.bfloat16), _random(1, BLOCK_SIZE, 4, dtype=torch.bfloat16)
    query, shape = _random(1, 1, 8), LayerShape(1, 8, 4, torch.bfloat16, CPU)
    step = StepTables.of([PackedChunk(0, 1, 15, (0,))], [AttentionKind(1)], Limits(1, 1, 16, (16, 64)))
    work, partials = _on_device(step, 0, Case(torch.bfloat16, 1, 1, (8, 4)))
    out = OPERATIONS.attend(query, keys, values, work, partials, shape, AttentionSettings(1, 1.0))
    scores = query[0, 0].double() @ keys[0].double().T
    weights = (scores - scores.max()).exp().bfloat16().double()
    assert (out[0, 0] - weights @ values[0].double() / weights.sum()).abs().max() < 1e-6


def test_rows_of_no_item_are_zeros() -> None:
    world = World.of(CASES["plain"])
    work, partials = _on_device(StepTables.of([], [AttentionKind(2)], Limits(8, 1, 64, (16, 64))), 1, world.case)
    shape = LayerShape(2, 16, 16, torch.float32, CPU)
    out = OPERATIONS.attend(_random(4, 3, 16), world.keys, world.values, work, partials, shape, world.settings)
    assert not out.any()


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_stored_as_zeros_and_noted(dtype: torch.dtype) -> None:
    """In all heads of the row; rows behind the last are not written, whatever they hold."""
    key, value = _random(2, 6, 16, dtype=dtype), _random(2, 6, 8, dtype=dtype)
    key[1, 1, 5], value[0, 3, 2], key[0, 5, 0] = math.nan, -math.inf, math.nan
    keys, values = torch.full((2, 64, 16), 7.0, dtype=dtype), torch.full((2, 64, 8), 7.0, dtype=dtype)
    slots = torch.tensor([5, 9, 33, 40, 63, 0])
    finite = torch.tensor([0, 1, 1, 1, 1, 1], dtype=torch.int32)
    OPERATIONS.store(key, value, keys, values, slots, torch.tensor([5], dtype=torch.int32), finite)
    assert finite.tolist() == [0, 0, 1, 0, 1, 1]  # what was noted in an earlier layer stays
    for row in (0, 2, 4):
        assert torch.equal(keys[:, slots[row]], key[:, row])
        assert torch.equal(values[:, slots[row]], value[:, row])
    for row in (1, 3):
        assert not keys[:, slots[row]].any()
        assert not values[:, slots[row]].any()
    untouched = [slot for slot in range(64) if slot not in slots[:5]]
    assert bool((keys[:, untouched] == 7).all())
    assert bool((values[:, untouched] == 7).all())


def test_blocks_are_copied_in_order() -> None:
    """A later pair reads what an earlier one wrote, and pairs behind the last are not copied."""
    tensors = [_random(2, 5 * BLOCK_SIZE, 4), _random(2, 5 * BLOCK_SIZE, 3, dtype=torch.bfloat16)]
    before = [tensor.clone().unflatten(1, (5, BLOCK_SIZE)) for tensor in tensors]
    pairs = torch.tensor([[0, 1], [1, 2], [3, 0], [4, 3]], dtype=torch.int32)
    OPERATIONS.copy_blocks(tensors, pairs, torch.tensor([3], dtype=torch.int32))
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor.unflatten(1, (5, BLOCK_SIZE)), old[:, [3, 0, 0, 3, 4]])


# -- rows -------------------------------------------------------------------------------------------------------------


def _weight(kind: str, columns: int, depth: int, bias: bool) -> tuple[LinearWeight, Tensor]:
    """A weight and what it stands for, `[out, in] float64`."""
    offset = _random(columns, seed=2) if bias else None
    generator = torch.Generator().manual_seed(depth)
    if kind == "int8":
        numbers = torch.randint(-127, 128, (columns, depth), generator=generator, dtype=torch.int8)
        scale = _random(columns).abs() / 100
        return LinearWeight(numbers, "int8", scale, offset), numbers.double() * scale[:, None].double()
    if kind.startswith("int4"):
        group, zeros = (
            (64, torch.arange(columns * depth // 64).view(columns, -1) % 16) if "zeros" in kind else (128, None)
        )
        numbers = torch.randint(0, 16, (columns, depth), generator=generator, dtype=torch.uint8)
        scale = _random(columns, depth // group).abs() / 5
        low, high = numbers.view(columns, -1, 2, group // 2).unbind(2)
        packed = LinearWeight(
            (low | high << 4).flatten(1), "int4", scale, offset, None if zeros is None else zeros.to(torch.uint8)
        )
        return packed, widened(packed).double()
    data = _random(columns, depth, dtype=getattr(torch, kind))
    return LinearWeight(data, "exact", None, offset), data.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "depth"), [("bfloat16", 96), ("float32", 1037), ("int8", 64), ("int4", 256), ("int4, zeros", 128)]
)
def test_a_linear_layer_is_right_and_its_rows_are_independent(
    kind: str, depth: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, numbers = _weight(kind, 51, depth, bias)
    x = _random(19, depth + 3, dtype=torch.bfloat16 if kind != "float32" else torch.float32)[:, 2:-1]
    whole = OPERATIONS.linear(x, weight, torch.float32)
    right = x.double() @ numbers.T + (weight.bias.double() if weight.bias is not None else 0)
    assert (whole - right).abs().max() < 2e-6 * right.abs().max()
    for rows in (slice(0, 1), slice(18, 19), slice(3, 6), slice(2, 19)):
        assert torch.equal(OPERATIONS.linear(x[rows], weight, torch.float32), whole[rows])
    assert torch.equal(OPERATIONS.linear(x, weight, torch.bfloat16), whole.bfloat16())
    monkeypatch.setattr(reference, "_ROOM", 7 * depth)
    assert torch.equal(OPERATIONS.linear(x, weight, torch.float32), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "theirs"), [("weight", LlamaRMSNorm), ("one plus weight", Gemma2RMSNorm)])
def test_norms_are_those_of_transformers(kind: NormKind, theirs: type, dtype: torch.dtype) -> None:
    """To the last bit or the one before it: transformers has a reciprocal square root, and torch's own sum."""
    norm = theirs(300, eps=1e-6).to(dtype)
    norm.weight.data = _random(300, seed=1, dtype=dtype)
    x = _random(40, 300, dtype=dtype) * 3
    out, right = OPERATIONS.rms_norm(x, norm.weight.data, 1e-6, kind), norm(x).detach()
    assert out.dtype == dtype
    assert (out != right).double().mean() < (0.5 if dtype == torch.float32 else 0.001)
    torch.testing.assert_close(out, right, rtol=2 * torch.finfo(dtype).eps, atol=0)
    for rows in (slice(0, 1), slice(7, 10)):
        assert torch.equal(OPERATIONS.rms_norm(x[rows], norm.weight.data, 1e-6, kind), out[rows])


def test_the_two_norms_round_at_other_places() -> None:
    x, weight = _random(9, 64, dtype=torch.bfloat16), _random(64, seed=1, dtype=torch.bfloat16)
    llama = OPERATIONS.rms_norm(x, weight, 1e-6, "weight")
    gemma = OPERATIONS.rms_norm(x, weight.float() - 1, 1e-6, "one plus weight")
    assert (llama != gemma).double().mean() > 0.05
    torch.testing.assert_close(llama, gemma, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_is_rounded_before_it_is_multiplied(dtype: torch.dtype) -> None:
    gate_up = _random(23, 2 * 77, dtype=dtype) * 4
    out = OPERATIONS.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    right = torch.nn.functional.silu(gate) * up
    assert (out != right).double().mean() < (0.5 if dtype == torch.float32 else 0.001)
    torch.testing.assert_close(out, right, rtol=2 * torch.finfo(dtype).eps, atol=0)
    for rows in (slice(0, 1), slice(5, 8)):
        assert torch.equal(OPERATIONS.silu_mul(gate_up[rows]), out[rows])
