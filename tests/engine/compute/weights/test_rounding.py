"""Weights rounded to whole numbers in groups: near, safe at the edges, and the same bits on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.packed_weight import Pieces
from engine.compute.linear import quasi_random
from engine.compute.whole import rounding
from engine.compute.whole.groups import Groups
from engine.errors import LoadError


def random(rows: int, depth: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, depth, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def digest(groups: Groups) -> str:
    whole = hashlib.sha256()
    for name in ("numbers", "scales", "supers", "minima", "minimum_supers"):
        part = getattr(groups, name)
        if part is not None:
            whole.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


@pytest.mark.parametrize("depth", [16, 32, 40, 256, 300])
def test_a_number_is_off_by_little(depth: int) -> None:
    """Also where the last group, or the last eight of them, are not full."""
    weight = random(7, depth)
    four, six = rounding.four_bits(weight), rounding.six_bits(weight)
    assert four.numbers.shape == six.numbers.shape == weight.shape
    assert int(four.numbers.max()) <= 15
    assert int(six.numbers.min()) >= 1
    assert int(six.numbers.max()) <= 63
    groups = -(-depth // 32)
    assert four.scales.shape == four.minima.shape == six.scales.shape == (7, groups)  # type: ignore[union-attr]
    assert float((four.widened() - weight).pow(2).mean() / weight.pow(2).mean()) < 0.008
    assert float((six.widened() - weight).abs().max()) < float(weight.abs().max()) / 55


def test_fitting_comes_nearer_than_the_range_alone() -> None:
    """Fifteen equal steps from the smallest to the largest number are off by more."""
    weight = random(16, 1024, seed=3)
    x = weight.view(16, -1, 32)
    low, high = x.amin(dim=2, keepdim=True), x.amax(dim=2, keepdim=True)
    step = (high - low) / 15
    plain = (((x - low) / step).round() * step + low - x).pow(2).mean()
    assert float((rounding.four_bits(weight).widened() - weight).pow(2).mean()) < 0.9 * float(plain)


def test_rows_do_not_depend_on_each_other() -> None:
    weight = random(40, 96)
    for round_ in (rounding.four_bits, rounding.six_bits):
        whole = round_(weight).widened()
        assert torch.equal(round_(weight[11:12]).widened(), whole[11:12])


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 1e-20, 1e20, 3e38, -3e38])
def test_zeros_and_extreme_numbers_are_safe(largest: float) -> None:
    row = torch.zeros(1, 64, dtype=torch.float32)
    row[0, 5] = largest
    for round_ in (rounding.four_bits, rounding.six_bits):
        wide = round_(row).widened()
        assert wide.isfinite().all()
        assert torch.allclose(wide, row, rtol=0, atol=abs(largest) / 50 + 1e-28)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(broken: float) -> None:
    row = torch.zeros(1, 64, dtype=torch.float32)
    row[0, 5] = broken
    for round_ in (rounding.four_bits, rounding.six_bits):
        with pytest.raises(LoadError, match="finite"):
            round_(row)


def test_the_same_weight_is_rounded_to_the_same_bits_everywhere() -> None:
    """Golden: other digests are another model. Raise `CPU_KERNELS_VERSION` if that is meant."""
    weight = quasi_random(33, 300) * quasi_random(33, 1) * 3
    assert digest(rounding.four_bits(weight)) == "34523ff1ed953a7d"
    assert digest(rounding.six_bits(weight)) == "c8a0cf7d6c57f168"


# -- the kernel that does the same -------------------------------------------------------------------------------------

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as they come": lambda w: w,
    "of few values": lambda w: (w * 2).round(),
    "all alike": lambda w: torch.full_like(w, -2.5),
    "none below zero": lambda w: w.abs(),
    "none above zero": lambda w: -w.abs(),
    "zeros of both signs": lambda w: torch.where(w > 0, 0.0, -0.0),
    "mostly zeros": lambda w: w * (w > 1.5),
    "in bfloat16": lambda w: w.to(torch.bfloat16),
    "of very different sizes": lambda w: torch.exp(8 * w) * w.sign(),
    "very small": lambda w: w * 1e-29,
    "denormal": lambda w: w * 1e-42,
    "very large": lambda w: w * 5e37,
    "as large as can be": lambda w: w.sign() * 3.4e38,
}


def by_kernel(kernels: Kernels, weight: Tensor, bits: int, pieces: Pieces | None = None) -> Groups:
    rows, depth = weight.shape
    return kernels.round(lambda start, end: weight[start:end], pieces or [(0, rows)], rows, depth, bits)


def same(one: Groups, two: Groups) -> bool:
    names = ("numbers", "scales", "supers", "minima", "minimum_supers")
    parts = [(getattr(one, name), getattr(two, name)) for name in names]
    return (one.bits, one.group, one.zeros, one.per) == (two.bits, two.group, two.zeros, two.per) and all(
        (a is None and b is None) or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in parts
    )


@pytest.mark.parametrize("depth", [1, 16, 32, 40, 255, 256, 300, 1024])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_kernel_has_the_bits_of_torch(kernels: Kernels, kind: str, depth: int) -> None:
    weight = WEIGHTS[kind](random(9, depth, seed=depth))
    assert same(by_kernel(kernels, weight, 4), rounding.four_bits(weight))
    assert same(by_kernel(kernels, weight, 6), rounding.six_bits(weight))


def test_pieces_and_threads_change_no_bit(kernels: Kernels) -> None:
    weight, threads = random(200, 96), torch.get_num_threads()
    try:
        for bits in (4, 6):
            whole = by_kernel(kernels, weight, bits)
            for number in (1, 3):
                torch.set_num_threads(number)
                assert same(by_kernel(kernels, weight, bits, [(0, 64), (64, 128), (128, 200)]), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (4, 299)])
def test_the_kernel_refuses_what_is_no_number(kernels: Kernels, broken: float, place: tuple[int, int]) -> None:
    weight = random(5, 300)
    weight[place] = broken
    for bits in (4, 6):
        with pytest.raises(LoadError, match="finite"):
            by_kernel(kernels, weight, bits)


def test_every_instruction_set_rounds_to_the_same_bits(other_kernels: Kernels) -> None:
    weight = quasi_random(33, 300) * quasi_random(33, 1) * 3
    assert same(by_kernel(other_kernels, weight, 4), rounding.four_bits(weight))
    assert same(by_kernel(other_kernels, weight, 6), rounding.six_bits(weight))
