"""A mixture of experts as one kernel: the sum of its experts, and bits that depend on a row alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from grouped_weights import KINDS, groups_of
from torch import Tensor

from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.packed_weight import PackedWeight

ACTIVATIONS = ("silu", "gelu_tanh", "clamped")
STORED = ("bfloat16", "float32", "int8", "grouped")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float32)


def _experts(kernels: Kernels, kind: str, count: int, dim: int, inner: int) -> tuple[list[PackedWeight], ...]:
    """Weights of experts, every other one with a bias; those in groups are each stored in another way."""

    def weight(columns: int, depth: int, seed: int) -> PackedWeight:
        bias = _random(columns, seed=seed) if seed % 2 else None
        if kind == "grouped":
            bits, group, of = (4, 5, 6, 8)[seed % 4], (32, 16, 64, 128)[seed % 4], KINDS[seed % len(KINDS)]
            return kernels.pack_groups(groups_of(bits, group, of, columns, depth), bias)
        numbers = _random(columns, depth, seed=seed) * depth**-0.5
        numbers = numbers.bfloat16().float() if kind == "bfloat16" and seed % 3 else numbers  # of both kinds in one
        return kernels.pack(numbers, bias, "int8" if kind == "int8" else "exact")

    return [weight(2 * inner, dim, i) for i in range(count)], [weight(dim, inner, i + 5) for i in range(count)]


def _choices(rows: int, experts: int, choices: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows * 100 + choices)
    chosen = torch.stack([torch.randperm(experts, generator=draw)[:choices] for _ in range(rows)])
    return chosen, torch.rand(rows, choices, generator=draw, dtype=torch.float32)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("rows", [1, 2, 19, 80])
def test_it_is_the_sum_of_its_experts_in_the_order_of_the_choices(
    kernels: Kernels, kind: str, rows: int, activation: str
) -> None:
    gate_up, down = _experts(kernels, kind, 7, 72, 40)
    mixture = kernels.experts(gate_up, down, activation)
    x = _random(rows, 72) * 4
    chosen, weights = _choices(rows, 7, 3)
    expected = torch.zeros(rows, 72, dtype=torch.float32)
    for row in range(rows):
        for choice, weight in zip(chosen[row].tolist(), weights[row], strict=True):
            both = kernels.group([gate_up[choice]])(x[row : row + 1])[0]
            gate, up = both[:, :40].contiguous(), both[:, 40:]
            up = up.clamp(-7, 7) + 1 if activation == "clamped" else up
            y = kernels.group([down[choice]])(kernels.activate(gate, activation) * up)[0][0]
            expected[row] = (y.double() * weight.double() + expected[row].double()).float()  # as one fma, but for ties
    found = set()
    for threads in (1, 2, 3, 5):
        with _threads(threads):
            found.add(bytes(mixture(x, chosen, weights).numpy().data))
    assert len(found) == 1, "who computes which piece does not matter"
    out = mixture(x, chosen, weights)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert (out == expected).float().mean() > 0.99


@pytest.mark.parametrize("kind", STORED)
def test_a_row_has_the_same_bits_whatever_is_computed_beside_it(kernels: Kernels, kind: str) -> None:
    """1 to 70 rows, any number of choices, in any order, with neighbours that all choose one expert or never that."""
    experts, dim, inner = 6, 40, 24
    mixture = kernels.experts(*_experts(kernels, kind, experts, dim, inner), "clamped")
    for choices in range(1, experts + 1):
        x = _random(70, dim, seed=choices)
        chosen, weights = _choices(70, experts, choices)
        whole = mixture(x, chosen, weights)
        for rows in range(1, 71):
            part = slice(70 - rows, 70)
            assert torch.equal(mixture(x[part], chosen[part], weights[part]), whole[part]), (choices, rows)
        order = torch.randperm(70, generator=torch.Generator().manual_seed(choices))
        assert torch.equal(mixture(x[order], chosen[order], weights[order]), whole[order])
        crowd = chosen.clone()
        crowd[1:] = chosen[0]  # one expert has all rows, another none
        assert torch.equal(mixture(x, crowd, weights)[0], whole[0])


@pytest.mark.parametrize("kind", STORED)
def test_it_has_the_same_bits_with_every_instruction_set(kernels: Kernels, other_kernels: Kernels, kind: str) -> None:
    x, chosen, weights = _random(130, 72) * 4, torch.arange(260, dtype=torch.int64).view(130, 2) % 7, _random(130, 2)
    for activation in ACTIVATIONS:
        one, other = (k.experts(*_experts(k, kind, 7, 72, 40), activation) for k in (kernels, other_kernels))
        assert torch.equal(one(x, chosen, weights), other(x, chosen, weights)), activation


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -1e30])
@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_that_is_not_finite_hurts_nobody(kernels: Kernels, kind: str, value: float, activation: str) -> None:
    mixture = kernels.experts(*_experts(kernels, kind, 3, 72, 40), activation)
    x = _random(14, 72)
    chosen, weights = _choices(14, 3, 2)
    clean, sick = mixture(x, chosen, weights), x.clone()
    sick[6, 3] = value
    out = mixture(sick, chosen, weights)
    others = torch.arange(14) != 6
    assert torch.equal(out[others], clean[others])
    if value != value:
        assert out[6].isnan().any(), "and what is no number is not hidden"


def test_a_clamped_gate_is_cut_at_seven_and_keeps_what_is_no_number(kernels: Kernels) -> None:
    """By experts whose gate and up are their biases, and whose down passes them on."""
    down = kernels.pack(torch.ones(4, 1, dtype=torch.float32), None)
    x, first = torch.ones(1, 4, dtype=torch.float32), torch.zeros(1, 1, dtype=torch.int64)
    infinite, none = float("inf"), float("nan")
    for gate in (-infinite, -1e30, -200.0, -7.5, -0.0, 6.9999, 7.0, 7.0001, 3e38, infinite, none):
        for up in (-infinite, -3e38, -7.5, -7.0, -1.0, 0.0, 6.5, 7.0, 1e4, infinite, none):
            both = torch.tensor([gate, up], dtype=torch.float32)
            gate_up = kernels.pack(torch.zeros(2, 4, dtype=torch.float32), both)
            out = kernels.experts([gate_up], [down], "clamped")(x, first, x[:, :1])
            cut = both[0].double().clamp(max=7)
            right = (both[1].double().clamp(-7, 7) + 1) * cut * torch.sigmoid(cut * 1.702)
            if gate == -infinite:  # in torch -inf times 0
                assert (out.isnan() | (out == 0)).all()
                continue
            torch.testing.assert_close(
                out.double(), right.expand(1, 4), rtol=3e-6, atol=1e-30, equal_nan=True, msg=f"{gate}, {up}"
            )


def test_a_choice_that_is_no_expert_adds_nothing(kernels: Kernels) -> None:
    mixture = kernels.experts(*_experts(kernels, "float32", 4, 32, 16), "gelu_tanh")
    x, weights = _random(3, 32), torch.rand(3, 2, dtype=torch.float32)
    out = mixture(x, torch.tensor([[1, 4], [-1, 2], [9, 99]]), weights)
    assert torch.equal(out[0], mixture(x[:1], torch.tensor([[1]]), weights[:1, :1])[0])
    assert torch.equal(out[1], mixture(x[1:2], torch.tensor([[2]]), weights[1:2, 1:])[0])
    assert torch.equal(out[2], torch.zeros(32, dtype=torch.float32))
    nothing = torch.tensor([[-(2**63), 2**63 - 1]] * 3)
    assert not mixture(x, nothing, weights).any()


def test_no_rows_and_no_choices_are_no_sums(kernels: Kernels) -> None:
    mixture = kernels.experts(*_experts(kernels, "int8", 4, 32, 16), "silu")
    empty = torch.zeros(0, 2, dtype=torch.int64)
    assert mixture(_random(0, 32), empty, empty.float()).shape == (0, 32)
    assert not mixture(_random(5, 32), empty.view(0).expand(5, 0), torch.zeros(5, 0, dtype=torch.float32)).any()


def test_an_expert_that_is_chosen_twice_counts_twice(kernels: Kernels) -> None:
    mixture = kernels.experts(*_experts(kernels, "float32", 4, 32, 16), "silu")
    x = _random(9, 32)
    half = torch.full((9, 2), 0.5, dtype=torch.float32)
    twice = mixture(x, torch.full((9, 2), 3, dtype=torch.int64), half)
    torch.testing.assert_close(twice, mixture(x, torch.full((9, 1), 3, dtype=torch.int64), half[:, :1] * 2))


def test_experts_that_do_not_fit_are_refused(kernels: Kernels) -> None:
    gate_up, down = _experts(kernels, "float32", 4, 32, 16)
    with pytest.raises(ValueError, match="no experts that there is a kernel for"):
        kernels.experts(gate_up[1:], [*down[:-1], gate_up[0]], "silu")
    with pytest.raises(ValueError, match="3 rows with choices for 2"):
        kernels.experts(gate_up, down, "silu")(_random(3, 32), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
