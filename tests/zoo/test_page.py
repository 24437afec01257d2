"""The committed page of results: complete, and without a wrong answer in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from zoo.examine import Finding
from zoo.page import page
from zoo.tiny import NAMES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "architectures.md"


def test_nothing_is_served_wrong() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for said in ("crashed", "**loaded and wrong**", "**law claimed, not found**"):
        assert f"\n| {said} | 0 | 0 | 0 |\n" in text, f"{said}: run `make zoo` and look"


def test_it_has_every_architecture() -> None:
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in text:
        pytest.skip(f"the page was made with another transformers than {transformers.__version__}")
    rows = re.findall(r"^\| (\S+) \| \S* \| (?:packed|fallback|refused|not built) \| ", text, re.MULTILINE)
    assert sorted(rows) == sorted(NAMES)


def test_a_wrong_one_is_counted_and_named() -> None:
    wrong = Finding("llama", status="served", runner="packed", claimed=True, tried=True, wrong=["short: 3 of 12"])
    unlawful = Finding("gpt2", status="served", runner="packed", claimed=True, tried=True, differ=["long crowd"])
    refused = Finding("bert", status="refused", reason="BertLMHeadModel cannot be served:\na | b.")
    text = page([wrong, unlawful, refused])
    assert "\n| **loaded and wrong** | 1 | 0 | 0 |\n" in text
    assert "\n| **law claimed, not found** | 1 | 0 | 0 |\n" in text
    assert "| llama |  | packed | short: 3 of 12 | yes |  |" in text
    assert "| gpt2 |  | packed | yes | **claimed, but** long crowd |  |" in text
    assert r"| bert |  | refused |  |  | BertLMHeadModel cannot be served: a \| b. |" in text
