"""Prompts become the tokens that transformers' call makes of them, and a bound on their number is never too high."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers_for_tests
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from engine.errors import InvalidFormat
from engine.prompts.prompt_encoder import PromptEncoder, find_control_words

SHAPES = ["qwen3-0.6b", "phi-3"]
SMALL = [*tokenizers_for_tests.TABLED, *tokenizers_for_tests.PROBED]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["the ", "a", " ", "\n", "\t", "漢", "é", "e\u0301", "<|im_end|>", "▁", "0", "==", "\u2003", "🤷🏽‍♀️", "-"]
        ),
        st.text(max_size=6),
    ).map(lambda piece: piece * 3),
    max_size=12,
).map("".join)


@functools.cache
def tokenizer(name: str) -> Any:
    """A real one by its shape, a small one by its kind; `+forms` normalises, `+stripping` has greedy special tokens."""
    base, _, change = name.partition("+")
    if base in SHAPES:
        found = AutoTokenizer.from_pretrained(Path(__file__).parents[3].parent / "shared" / "checkpoints" / base)
    else:
        found = getattr(tokenizers_for_tests, base)()
    if change == "forms":
        found.backend_tokenizer.normalizer = normalizers.NFC()
    if change == "stripping":
        found.add_tokens([AddedToken("<|im_end|>", rstrip=True, lstrip=True, special=True)], special_tokens=True)
    return found


@functools.cache
def encoder(name: str) -> PromptEncoder:
    return PromptEncoder(tokenizer(name), find_control_words(tokenizer(name), []))


KINDS = [*SHAPES, *SMALL, "qwen3-0.6b+forms", "byte_level+forms", "byte_level+stripping", "phi-3+stripping"]


@pytest.mark.parametrize("name", KINDS)
def test_as_transformers_encodes(name: str, shared: Any) -> None:
    """With and without what a tokenizer adds around a text."""

    @settings(max_examples=60, deadline=None)
    @given(TEXTS, st.booleans())
    def holds(text: str, special: bool) -> None:
        ids = tokenizer(name)(text, add_special_tokens=special)["input_ids"]
        assert encoder(name).encode(text, special=special) == ids
        assert encoder(name).encode_apart(text, [], "\ufdd2") == encoder(name).encode_apart(
            text + "\ufdd2", [], "\ufdd2"
        )
        least = encoder(name).at_least(text)
        assert least is None or least <= len(tokenizer(name)(text, add_special_tokens=False)["input_ids"])

    holds()


@pytest.mark.parametrize(
    ("name", "text", "share"),
    [
        ("qwen3-0.6b", "The quick brown fox jumps over the lazy dog. ", 0.8),
        ("qwen3-0.6b", "def f(x):\n    return [x, 1.5]\n", 0.4),
        ("qwen3-0.6b", " ", 0.9),
        ("qwen3-0.6b", "漢字かな交じり文", 0.1),
        ("phi-3", "The quick brown fox jumps over the lazy dog. ", 0.6),
        ("phi-3", "\n", 0.3),
    ],
)
def test_the_bound_is_near(name: str, text: str, share: float, shared: Any) -> None:
    """So that a text that is much too long is not read first."""
    text *= 2000
    assert encoder(name).at_least(text) >= share * len(encoder(name).encode(text, special=False))  # type: ignore[operator]


@pytest.mark.parametrize("name", ["word_piece", "no_decoder", "metaspace_always"])
def test_no_bound_where_one_token_stands_for_any_text(name: str) -> None:
    """A word that is not known is one token, however long it is."""
    assert encoder(name).at_least("x" * 10_000) is None
    assert len(encoder(name).encode("x" * 90, special=False)) == 1


def test_threads_do_not_disturb_each_other(shared: Any) -> None:
    """transformers' own call fails so: it sets a switch of the tokenizer that another thread is reading."""
    texts = [f"text number {i} with <|im_end|> " * (i % 7 + 1) for i in range(200)]
    alone = [encoder("qwen3-0.6b").encode(text, special=False) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: encoder("qwen3-0.6b").encode(text, special=False), texts)) == alone


def test_the_words_of_a_tokenizer_that_lists_them() -> None:
    """`chat_control_tokens` of transformers says which added tokens are control, beside the special ones."""
    listed = tokenizers_for_tests.byte_level()
    assert "<tool_call>" not in find_control_words(listed, [])
    assert "<tool_call>" in find_control_words(listed, ["{{ '<tool_call>' }}"])
    listed.chat_control_tokens = ["<tool_call>"]
    assert set(find_control_words(listed, [])) == {"<|im_end|>", "<tool_call>"}


def test_a_tokenizer_that_panics_refuses_the_text() -> None:
    """Its expressions give up after a number of steps, with a panic, which is no `Exception`."""
    found = tokenizers_for_tests.byte_level()
    found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+c"), "isolated")
    hangs = PromptEncoder(found, find_control_words(found, []))
    assert hangs.encode("aac", special=False)
    with pytest.raises(InvalidFormat, match="retry-limit"):
        hangs.encode("a" * 2000 + "b", special=False)
    assert hangs.encode("aac", special=False)
