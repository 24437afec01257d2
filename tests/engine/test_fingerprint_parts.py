"""Parts of a fingerprint: their digest can be recomputed by anybody, and differences are told one by one."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import rfc8785

from engine import fingerprint_of, part_differences
from engine.types.fingerprint_parts import digest_of, flat

LONG = "sha256:" + "ab" * 32


def test_the_digest_is_that_of_canonical_json() -> None:
    """Spelled out, because a receipt's reader may have nothing but the parts."""
    parts = {"b": 1, "a": "é", "c": None, "d": True, "e": 0.5}
    text = '{"a":"é","b":1,"c":null,"d":true,"e":0.5}'
    assert rfc8785.dumps(parts) == text.encode()
    assert fingerprint_of(parts, "vb-") == "vb-" + hashlib.sha256(text.encode()).hexdigest()[:16]
    assert fingerprint_of(dict(reversed(parts.items())), "vb-") == fingerprint_of(parts, "vb-")


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({}, {}, []),
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1.0}, {"a": 1}, []),  # one number in JSON
        ({"a": 1}, {"a": True}, ["a 1 → true"]),
        ({"transformers": "5.23.0"}, {"transformers": "5.24.0"}, ["transformers 5.23.0 → 5.24.0"]),
        ({"gguf": "0.19.0"}, {}, ["only in the first: gguf 0.19.0"]),
        ({}, {"threads": None}, ["only in the second: threads null"]),
        ({"b": None, "a": 1}, {"b": 4, "a": 2}, ["a 1 → 2", "b null → 4"]),
        ({"mkl": ""}, {"mkl": "AVX2"}, ['mkl "" → AVX2']),
        ({"weights": LONG}, {"weights": None}, ["weights sha256:abababababab… → null"]),
        ({"cpu": "x" * 500}, {"cpu": "y"}, [f"cpu {'x' * 80}… → y"]),
    ],
)
def test_differences_are_sentences(first: dict[str, Any], second: dict[str, Any], told: list[str]) -> None:
    assert part_differences(first, second) == told
    assert bool(told) == (fingerprint_of(first, "") != fingerprint_of(second, ""))


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (2**53, str(2**53)),
        (-(2**63), str(-(2**63))),
        (2**53 - 1, 2**53 - 1),
        (True, True),
        (("a", "é"), '["a", "é"]'),
        (((3, 1.5),), "[[3, 1.5]]"),
        (None, None),
    ],
)
def test_any_default_becomes_a_part(value: Any, part: Any) -> None:
    assert flat(value) == part
    assert type(flat(value)) is type(part)
    fingerprint_of({"a": flat(value)}, "")


def test_a_digest_tells_texts_apart() -> None:
    values: list[Any] = ["", "null", "a", "\ud800", b"\xff", [], ["a"], {"a": math.inf}, {"a": math.nan}]
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of(None) is None
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
