"""The random bits are a published pure function; these numbers must never change."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from engine.sampling.rng import GAP_UNIT, gap_of, gaps, gumbel, hash_token, stream_key, token_steps

EXTREMES = (0, 1, -1, 2, 42, 2**31, 2**32, -(2**63), 2**63 - 1)


def reference(seed: int, choice: int, position: int, token_id: int) -> int:
    """The formula of the module's docstring again, in plain integers, sharing nothing with the module."""

    def mix(z: int) -> int:
        z %= 1 << 64
        z ^= z >> 30
        z = z * 0xBF58476D1CE4E5B9 % (1 << 64)
        z ^= z >> 27
        z = z * 0x94D049BB133111EB % (1 << 64)
        return z ^ z >> 31

    golden = 0x9E3779B97F4A7C15
    key = mix(mix(mix(seed + golden) + (choice + 1) * golden) + (position + 1) * golden)
    return mix(key + (token_id + 1) * golden)


def row(seed: int, choice: int, position: int, count: int) -> torch.Tensor:
    key = torch.tensor([[stream_key(seed, choice, position)]])
    return gaps(key, token_steps(count))[0]


def uniforms(seed: int, choice: int, position: int, count: int) -> torch.Tensor:
    return 1.0 - row(seed, choice, position, count).double() * GAP_UNIT


@pytest.mark.parametrize(
    ("seed", "choice", "position", "token_id", "bits"),
    [
        (0, 0, 0, 0, 0x2130748AAAC80268),
        (0, 0, 0, 1, 0x0CC78FB979CE5090),
        (0, 0, 1, 0, 0x97693BFC00425025),
        (0, 1, 0, 0, 0x68AC638DA2EDDA0C),
        (1, 0, 0, 0, 0xE28195DDD9EE4956),
        (-1, 0, 0, 0, 0x00FC86D80B488E96),
        (42, 3, 100, 151935, 0x94668F4DE1A9D288),
        (9223372036854775807, 0, 0, 7, 0xFA18967392056AAF),
        (-9223372036854775808, 15, 4095, 50256, 0x3D8DA2E867384B24),
    ],
)
def test_golden_bits(seed: int, choice: int, position: int, token_id: int, bits: int) -> None:
    """A reply that was reproducible yesterday is reproducible in ten years."""
    assert reference(seed, choice, position, token_id) == bits
    assert hash_token(stream_key(seed, choice, position), token_id) == bits


def test_stream_is_splitmix64() -> None:
    """The published test vector of SplitMix64 started at 1234567 (Rosetta Code, from the reference C)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [hash_token(1234567, i) for i in range(4)] == expected


@pytest.mark.parametrize(
    ("gap", "value"),
    [
        (1, 36.7368005696771),
        (3, 35.63818828100899),
        (1048577, 22.873856004746127),
        (2251799813685249, 1.2458993237072378),
        (4503599627370497, 0.366512920581664),
        (9007199253692415, -3.129994599192071),
        (9007199254740991, -3.6037789929704576),
    ],
)
def test_golden_gumbel(gap: int, value: float) -> None:
    """Bits are promised everywhere; a logarithm's last digit only where the C library rounds it alike: hence 1 ulp."""
    assert gumbel(gap) == pytest.approx(value, rel=4e-16, abs=4e-16)


def test_gumbel_never_leaves_the_finite() -> None:
    assert gumbel(1) == pytest.approx(53 * math.log(2))  # u nearest to 1
    assert gumbel(2**53 - 1) == pytest.approx(-math.log(53 * math.log(2)))  # u nearest to 0
    assert gap_of(0) == 1
    assert gap_of(2**64 - 1) == 2**53 - 1
    assert 0.0 < 1.0 - (2**53 - 1) * GAP_UNIT < 1.0 - 1 * GAP_UNIT < 1.0


@pytest.mark.parametrize("seed", EXTREMES)
@pytest.mark.parametrize("choice", [0, 1, 127])
def test_vectors_equal_the_plain_integers(seed: int, choice: int) -> None:
    """int64 tensors wrap and shift arithmetically; the result must still be that of unsigned 64-bit numbers."""
    positions = (0, 1, 4095, 2**31)
    keys = torch.tensor([[stream_key(seed, choice, p)] for p in positions])
    table = gaps(keys, token_steps(100))
    assert table.tolist() == [[gap_of(reference(seed, choice, p, i)) for i in range(100)] for p in positions]
    picked = torch.tensor([[7, 3, 99], [0, 0, 1], [5, 6, 7], [98, 2, 50]])
    assert torch.equal(gaps(keys, token_steps(100)[picked]), table.gather(1, picked))


def test_bits_ignore_threads_and_width() -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results += [row(5, 0, 9, 151_936), row(5, 0, 9, 151_937)[:-1]]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def chi_square(values: torch.Tensor, bins: int = 256) -> float:
    """Chi-square of uniformity as a standard score (Wilson-Hilferty)."""
    counts = torch.bincount((values * bins).long(), minlength=bins).double()
    expected = values.numel() / bins
    statistic = float(((counts - expected) ** 2 / expected).sum())
    k = bins - 1
    return ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


def along(axis: str, count: int = 20_000) -> torch.Tensor:
    """Uniforms of one token while one coordinate runs."""
    points: dict[str, Callable[[int], tuple[int, int, int]]] = {
        "seed": lambda i: (i - count // 2, 0, 3),  # negative seeds too
        "choice": lambda i: (11, i, 3),
        "position": lambda i: (11, 0, i),
    }
    keys = torch.tensor([[stream_key(*points[axis](i))] for i in range(count)])
    return 1.0 - gaps(keys, token_steps(18)[17:])[:, 0].double() * GAP_UNIT


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_uniform_and_uncorrelated_along_each_axis(axis: str) -> None:
    values = along(axis)
    assert abs(chi_square(values)) < 4
    for lag in (1, 2, 7):
        pairs = torch.stack([values[:-lag], values[lag:]])
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4 / math.sqrt(values.numel())


@pytest.mark.parametrize("seed", EXTREMES)
def test_uniform_over_ids(seed: int) -> None:
    values = uniforms(seed, 0, 0, 150_000)
    assert abs(chi_square(values)) < 4
    assert abs(chi_square(1e4 * values % 1)) < 4  # the lower bits too
    assert abs(float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1])) < 4 / math.sqrt(150_000)


@pytest.mark.parametrize(
    "other",
    [(6, 0, 3), (5, 1, 3), (5, 0, 4), (4, 0, 3), (-5, 0, 3), (5 + 2**32, 0, 3), (5 - 2**63, 0, 3), (3, 0, 5)],
    ids=str,
)
def test_neighbouring_draws_are_unrelated(other: tuple[int, int, int]) -> None:
    """Neither correlated nor shifted copies of each other, not even (seed + 1, position - 1)."""
    one, two = row(5, 0, 3, 50_000), row(*other, 50_000)
    assert not torch.isin(one, two).any()
    mean = torch.corrcoef(torch.stack([one.double(), two.double()]))[0, 1]
    assert abs(float(mean)) < 4 / math.sqrt(50_000)


def test_every_bit_of_every_input_turns_half_of_the_output() -> None:
    """Avalanche: no bit of a seed is lost, so no two int64 seeds are one."""
    for bit in range(64):
        turned = [
            (hash_token(stream_key(s, 0, 0), 9) ^ hash_token(stream_key(s ^ (1 << bit), 0, 0), 9)).bit_count()
            for s in range(0, 200)
        ]
        assert 30 < sum(turned) / len(turned) < 34
