"""The same version gives the same results. A test that fails here says what was changed, and what to do about it."""

from __future__ import annotations

import math
from typing import Any

import golden_vectors
import pytest

from engine.compute.cpu.kernels import Kernels

CHANGED = (
    "{name}: {case} gives another result than version {version} gave, so replies that were recorded with it cannot be "
    "replayed. If that is meant, raise {constant} in engine/types/versions.py and write new vectors: "
    "python -m tests.engine.golden_vectors {name}"
)
LIBM = 2e-9
"""Log-probabilities pass through `exp` and `log` of torch and of the C library, which may round the last bit otherwise
on another platform. Masses are whole quanta of 2**-42, and the largest vocabulary here has 6,000 tokens, so such a bit
moves a log-probability by less than 2e-9. Tokens are compared exactly: no draw of the vectors is as near as that."""
ROUNDED = 2.0**-22
"""Of a number that is rounded to float32: such a bit may move it to the next one."""


def _compare(name: str, found: list[dict[str, Any]], near: dict[str, dict[str, float]] | None = None) -> None:
    """`near`: by key of a case, how near a number must be, as `math.isclose` takes it; else equal."""
    version, expected = golden_vectors.read(name)
    now = golden_vectors.VECTORS[name][0]
    assert now == version, f"{name} is of version {now}: python -m tests.engine.golden_vectors {name}"
    assert [case["case"] for case in found] == [case["case"] for case in expected]
    for one, other in zip(found, expected, strict=True):
        message = CHANGED.format(name=name, case=one["case"], version=version, constant=f"{name.upper()}_VERSION")
        assert one.keys() == other.keys(), message
        assert all(_same(one[key], other[key], (near or {}).get(key)) for key in one), message


def _same(one: Any, other: Any, near: dict[str, float] | None) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_same(a, b, near) for a, b in zip(one, other, strict=True))
    if near is not None and isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, **near)
    return bool(one == other)


@pytest.mark.parametrize("name", ["prompt_format", "reply_format"])
def test_texts_and_tokens_are_those_of_the_version(name: str) -> None:
    _compare(name, golden_vectors.as_read(golden_vectors.VECTORS[name][1]()))


def test_draws_are_those_of_the_version() -> None:
    double = {"rel_tol": 0.0, "abs_tol": LIBM}
    near = {"logprob": double, "top": double, "margin": double, "score": {"rel_tol": ROUNDED}}
    _compare("sampler", golden_vectors.as_read(golden_vectors.sampler()), near)


def test_no_draw_hangs_on_a_last_bit() -> None:
    """So its token is the same on every platform."""
    _, cases = golden_vectors.read("sampler")
    assert min(case["margin"] for case in cases if case["margin"] is not None) > 1e-3


def test_kernels_have_the_bits_of_the_version(kernels: Kernels) -> None:
    _compare("cpu_kernels", golden_vectors.as_read(golden_vectors.cpu_kernels(kernels)))


def test_small_products_are_exact(kernels: Kernels) -> None:
    """The first vector's numbers are sums of sixty-fourths far below 2**24: no rounding, whatever the order."""
    case = next(golden_vectors.cpu_kernels(kernels))
    x = golden_vectors.numbers(3, 48, seed=1, least=-9, most=9)
    weight = golden_vectors.numbers(40, 48, seed=2, least=-9, most=9)
    bias = golden_vectors.numbers(40, seed=3, least=-9, most=9)
    exact = ((x @ weight.T) + 64 * bias).double() / 64
    assert case["bits"] == golden_vectors.bits(exact.float())


def test_vectors_cannot_be_replaced_under_the_same_version(monkeypatch: pytest.MonkeyPatch) -> None:
    version, _ = golden_vectors.VECTORS["sampler"]
    changed = {**golden_vectors.VECTORS, "sampler": (version, lambda: iter([{"case": [], "token": 1}]))}
    monkeypatch.setattr(golden_vectors, "VECTORS", changed)
    before = (golden_vectors.FOLDER / "sampler.json").read_bytes()
    with pytest.raises(SystemExit, match="raise it first"):
        golden_vectors.write("sampler")
    assert (golden_vectors.FOLDER / "sampler.json").read_bytes() == before
