"""Products with whole numbers in groups: the stated chain bit for bit, whatever is computed beside it."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from grouped_weights import KINDS, groups_of, product
from hypothesis import given, settings, strategies as st
from torch import Tensor

from engine.compute.cpu.kernels import Kernels
from engine.compute.whole.groups import Groups

BITS, GROUPS = (4, 5, 6, 8), (16, 32, 64, 128)
_IDS = [" ".join(map(str, kind)) for kind in KINDS]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float32)


def _inputs(rows: int, depth: int) -> Tensor:
    return (
        _random(rows, depth) * torch.tensor([1.0, 1e-3, 100.0, 0.0], dtype=torch.float32)[torch.arange(rows) % 4, None]
    )


def _computed(kernels: Kernels, groups: Groups, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return kernels.group([kernels.pack_groups(groups, bias)])(x)[0]


@pytest.mark.parametrize("kind", KINDS, ids=_IDS)
def test_a_number_is_the_chain_that_the_file_states(kernels: Kernels, kind: Any) -> None:
    """Exact sums of 32 products (16 where groups have 16), scaled and added in order, and the minima; then the bias."""
    draw = random.Random(str(kind))
    for bits, group, depth in itertools.product(BITS, GROUPS, (5, 96, 257, 530, 1024)):
        columns, rows = draw.randrange(1, 80), draw.randrange(1, 10)
        groups, x = groups_of(bits, group, kind, columns, depth), _inputs(rows, depth)
        bias = draw.choice([None, _random(columns)])
        wanted = product(groups, x, bias)
        assert torch.equal(_computed(kernels, groups, x, bias), wanted), (bits, group, depth, columns, rows)


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_sums_do_not_overflow(kernels: Kernels, bits: int) -> None:
    """Sums of products are added in 16 bits as long as they fit: here they are as large as can be, of either sign."""
    groups = groups_of(bits, 32, ("float32", 0, None), 40, 512)
    groups.numbers.fill_(2**bits - 1)
    groups.scales.fill_(1.0)
    x = (
        torch.full((7, 512), 127.0, dtype=torch.float32)
        * torch.tensor([1, -1, 1, -1, 1, -1, 1], dtype=torch.float32)[:, None]
    )
    assert torch.equal(_computed(kernels, groups, x), x.sum(1, keepdim=True).expand(-1, 40) * (2**bits - 1))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from(GROUPS),
    kind=st.sampled_from(KINDS),
    depth=st.integers(1, 600),
    columns=st.integers(1, 150),
    rows=st.integers(1, 20),
    data=st.data(),
)
def test_a_row_depends_on_itself_alone(
    kernels: Kernels, bits: int, group: int, kind: Any, depth: int, columns: int, rows: int, data: st.DataObject
) -> None:
    """Not on the rows beside it, on the number of threads, or on what else is multiplied with the same input."""
    packed = kernels.pack_groups(groups_of(bits, group, kind, columns, depth), _random(columns))
    x = _inputs(rows, depth)
    whole = kernels.group([packed])(x)[0]
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    other_bits, other_group, other_kind = (data.draw(st.sampled_from(of)) for of in (BITS, GROUPS, KINDS))
    other = kernels.pack_groups(groups_of(other_bits, other_group, other_kind, columns + 3, depth), None)
    threads = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 5)))
    try:
        first, second = kernels.group([other, packed])(x[start:stop])
        assert torch.equal(second, whole[start:stop])
        assert torch.equal(kernels.group([packed])(x)[0], whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, kernels.group([other])(x)[0][start:stop])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_and_spares_the_other_rows(kernels: Kernels, bits: int, bad: float) -> None:
    """A request whose numbers overflow must fail; the one beside it must not notice."""
    x, groups = _random(4, 200), groups_of(bits, 32, ("float16", 0, "float16"), 30, 200)
    clean = _computed(kernels, groups, x)
    x[2, 150] = bad
    out = _computed(kernels, groups, x)
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


def test_zeros_and_the_smallest_numbers(kernels: Kernels) -> None:
    groups = groups_of(4, 32, ("float16", 0, "float16"), 9, 130)
    assert torch.equal(_computed(kernels, groups, torch.zeros(2, 130, dtype=torch.float32)), torch.zeros(2, 9))
    tiny = torch.full((1, 130), 1e-45, dtype=torch.float32)
    assert _computed(kernels, groups, tiny).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_products_have_the_same_bits_with_every_instruction_set(other_kernels: Kernels, bits: int) -> None:
    """Tiles, panels and how sums are made differ from one to the other; the numbers must not."""
    draw = random.Random(bits)
    for group, kind in itertools.product(GROUPS, KINDS):
        columns, depth = draw.randrange(1, 150), draw.randrange(1, 700)
        rows = draw.choice((draw.randrange(1, 14), draw.randrange(32, 70)))  # and what a matrix unit is used for
        groups, x, bias = groups_of(bits, group, kind, columns, depth), _inputs(rows, depth), _random(columns)
        assert torch.equal(_computed(other_kernels, groups, x, bias), product(groups, x, bias)), (group, kind)
        packed = other_kernels.pack_groups(groups, None)
        assert torch.equal(other_kernels.widen(packed), groups.widened()), (group, kind)


# -- packing and widening --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=_IDS)
def test_a_widened_weight_is_the_very_one_that_was_packed(kernels: Kernels, kind: Any) -> None:
    for bits, group, (columns, depth) in itertools.product(BITS, GROUPS, ((1, 1), (40, 130), (33, 512), (70, 600))):
        groups = groups_of(bits, group, kind, columns, depth)
        packed, wanted = kernels.pack_groups(groups, None), groups.widened()
        assert torch.equal(kernels.widen(packed), wanted), (bits, group, columns, depth)
        chosen = torch.tensor([columns - 1, 0, columns // 2, 0], dtype=torch.int64)
        assert torch.equal(kernels.widen(packed, chosen), wanted[chosen])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_other_kinds_are_widened_too(kernels: Kernels, kind: str) -> None:
    weight = _random(45, 261)
    weight = weight.bfloat16().float() if kind == "bfloat16" else weight
    packed = kernels.pack(weight, _random(45), "int8" if kind == "int8" else "exact")
    assert packed.kind == kind
    wide = kernels.widen(packed)
    if kind == "int8":
        assert (wide - weight).abs().max() <= weight.abs().max() / 254 * 1.001
    else:
        assert torch.equal(wide, weight)
    chosen = torch.tensor([[44, 3], [3, 0]], dtype=torch.int64).flatten()
    assert torch.equal(kernels.widen(packed, chosen), wide[chosen])


@pytest.mark.parametrize("columns", [[-1], [0, 45]])
def test_a_column_that_is_not_there_is_an_error(kernels: Kernels, columns: list[int]) -> None:
    with pytest.raises(IndexError, match="of 45"):
        kernels.widen(kernels.pack(_random(45, 8), None), torch.tensor(columns, dtype=torch.int64))


@pytest.mark.parametrize(
    ("bits", "group", "kind", "wanted"),
    [
        (4, 32, KINDS[1], 4.5),
        (4, 32, KINDS[2], 5.0),
        (4, 32, KINDS[5], 4.625),
        (6, 16, KINDS[6], 6.5625),
        (8, 32, KINDS[0], 8.5),
    ],
)
def test_a_weight_takes_no_more_memory_than_its_file(
    kernels: Kernels, bits: int, group: int, kind: Any, wanted: float
) -> None:
    """Bits a number: those of GGUF's Q4_0, Q4_1, Q4_K (4.5), Q6_K and Q8_0, and at most three per cent more."""
    packed = kernels.pack_groups(groups_of(bits, group, kind, 256, 1024), None)
    assert packed.data.numel() * 8 / (256 * 1024) <= wanted * 1.001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "numbers of 7 bits in groups of 32"),
        ({"group": 48}, "groups of 48"),
        ({"bits": 4}, "more than the 4 bits"),
        ({"zeros": 256}, "a zero of 256"),
        ({"supers": torch.ones(20, 1, dtype=torch.float16)}, r"scales \[20, 4\] torch.float16"),
        ({"scales": torch.ones(20, 3, dtype=torch.float16)}, r"scales \[20, 3\]"),
        ({"minima": torch.ones(20, 4, dtype=torch.float64)}, r"minima \[20, 4\] torch.float64"),
        ({"minimum_supers": torch.ones(20, 1, dtype=torch.float32)}, "minimum_supers without minima"),
        (
            {"per": 3, "minima": torch.ones(20, 4, dtype=torch.uint8), "minimum_supers": torch.ones(20, 2)},
            "super-groups of 3",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_the_kernels_would_misread_is_an_error(kernels: Kernels, change: dict[str, Any], message: str) -> None:
    groups = groups_of(8, 32, ("float16", 0, None), 20, 128)
    groups.numbers.fill_(255)
    fields = {name: getattr(groups, name) for name in Groups.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        kernels.pack_groups(Groups(**{**fields, **change}), None)


def test_weights_of_one_product_take_one_kind_of_input(kernels: Kernels) -> None:
    grouped = kernels.pack_groups(groups_of(4, 32, KINDS[0], 20, 64), None)
    exact, narrow = kernels.pack(_random(20, 64), None), kernels.pack(_random(9, 64).bfloat16(), None)
    with pytest.raises(ValueError, match="one kind of input"):
        kernels.group([grouped, exact])
    x = _random(5, 64)
    both = kernels.group([exact, narrow])(x)  # float32 and bfloat16 do
    assert torch.equal(both[0], kernels.group([exact])(x)[0])
    assert torch.equal(both[1], kernels.group([narrow])(x)[0])
