"""Whatever a tokenizer makes of a text, the spelling of a text that is forced has exactly its bytes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st
from tokenizers_for_tests import PROBED, SAMPLE, TABLED, WRITERS
from transformers import AutoTokenizer

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.token_table import TokenTable
from engine.loading.text_side import plain_encoder
from engine.text.spelling import Speller
from engine.text.vocabulary import Detokenizer, Vocabulary

CHECKPOINTS = Path(__file__).parents[3].parent / "shared" / "checkpoints"
REAL = ("qwen3-0.6b", "phi-3")
WITH_HOLES = {"unigram_with_holes", "word_piece_chat"}
PIECES = [
    " ", "  ", "\n", "\t", "yes", " yes", "maybe", "Maybe", "e\u0301", "É", "ﬁ", "Ⅷ", "▁", "漢", "🤷🏽", "\ufdd0", "\0",
    "</s>", "<s>", "<unk>", "<0x41>", "##ing", '{"name": "left"', '"name"', " }", "}", "<tool_call>", "naïve 漢 token",
    "a", "\u00a0", "\u200d", "\ufffd", "İ",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=8).map("".join)


@functools.cache
def made(name: str) -> tuple[Any, GrammarCompiler, TokenTable]:
    if name in REAL:
        if not (CHECKPOINTS / name).is_dir():
            pytest.skip(f"../shared/checkpoints/{name} is absent")
        tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    else:
        tokenizer = WRITERS[name]()
    size = len(tokenizer) + 3
    compiler = GrammarCompiler(Vocabulary.from_tokenizer(tokenizer), size, [2], plain_encoder(tokenizer))
    compiler.warm()
    return tokenizer, compiler, compiler._own_table


@functools.cache
def of_the_trial(name: str) -> GrammarCompiler:
    """The compiler of the process in which grammars are tried: it has no tokenizer."""
    return made(name)[1].fresh()


@functools.cache
def _texts(name: str) -> frozenset[bytes]:
    table = made(name)[2]
    special = set(table.special)
    return frozenset(token for i, token in enumerate(table.tokens) if i not in special)


def cuts(data: bytes, name: str) -> bool:
    """Whether some tokens have these bytes: how far one can get, byte by byte."""
    tokens = _texts(name)
    reached = [True, *[False] * len(data)]
    for end in range(1, len(data) + 1):
        reached[end] = any(reached[start] and data[start:end] in tokens for start in range(max(0, end - 64), end))
    return reached[-1]


@pytest.mark.parametrize("trial", [False, True], ids=["tokenizer", "table alone"])
@pytest.mark.parametrize("name", [*WRITERS, *REAL])
@settings(deadline=None, max_examples=60)
@given(text=TEXTS)
@example(text=SAMPLE)
@example(text=" yes")
@example(text="yes yes  yes")
@example(text="\ufdd0 \ufdd1")
def test_a_spelling_has_the_bytes_of_its_text(name: str, trial: bool, text: str) -> None:
    _, compiler, table = made(name)
    speller = (of_the_trial(name) if trial else compiler)._speller
    ids = speller.spell(text)
    assert (ids is not None) == speller.can_spell(text.encode()) == cuts(text.encode(), name)
    if ids is not None:
        assert b"".join(table.tokens[i] for i in ids) == text.encode()
        assert not set(ids) & set(table.special)
        assert speller.spell(text) == ids
    else:
        assert name in WITH_HOLES


@settings(deadline=None, max_examples=60)
@given(text=TEXTS)
def test_what_a_tokenizer_spells_to_the_byte_stays_as_it_spells_it(text: str) -> None:
    for name in ("byte_level_chat", "no_dummy_prefix"):
        tokenizer, compiler, table = made(name)
        ids = plain_encoder(tokenizer)(text)
        if b"".join(table.tokens[i] for i in ids) == text.encode():
            assert compiler._speller.spell(text) == ids
        else:
            assert "▁" in text, "nothing else is read as another text"


@pytest.mark.parametrize(
    ("name", "text", "tokens"),
    [
        ("dummy_prefix", "yes", ["yes"]),
        ("dummy_prefix", " yes", ["▁yes"]),
        ("dummy_prefix_once", '{"name": "left"', ['{"name', '":▁"left', '"']),
        ("phi-3", '{"name": "', ['{"', "name", '":', '▁"']),
        ("phi-3", " yes", ["▁yes"]),
        ("unigram", " Oslo", ["▁Oslo"]),
        ("unigram", "Oslo", ["Oslo"]),
        ("word_piece_chat", " yes", ["yes"]),
        ("word_piece_chat", "left", ["##left"]),
    ],
)
def test_it_is_the_spelling_of_the_middle_of_a_text(name: str, text: str, tokens: list[str]) -> None:
    tokenizer, compiler, _ = made(name)
    assert tokenizer.convert_ids_to_tokens(compiler._speller.spell(text)) == tokens


def test_control_words_of_a_delimiter_stand_by_their_ids() -> None:
    """As in the end of thoughts, which is forced when they are too long."""
    tokenizer, compiler, _ = made("dummy_prefix")
    ids = compiler.spell("yes</s>yes")
    assert ids is not None
    assert tokenizer.convert_ids_to_tokens(ids) == ["yes", "</s>", "yes"]
    assert compiler.spell("</s>") == [2]
    assert made("unigram_with_holes")[1].spell("漢</s>") is None


def test_a_tokenizer_that_gives_up_is_not_needed() -> None:
    tokens = [b"a", b"b", b"ab", b"bc", b"\xff</s>"]

    def fails(text: str) -> list[int]:
        raise ValueError(text)

    for encode in (fails, lambda text: [99], lambda text: [4], None):
        speller = Speller(tokens, encode, lambda text: [2])
        assert speller.spell("ab") == [2]
        assert speller.spell("abc") == [0, 3], "the longest token leads into a dead end"
        assert speller.spell("c") is None
        assert speller.spell("") == []


@pytest.mark.parametrize("name", TABLED | PROBED)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_text_that_is_held_to_a_form_is_its_tokens_bytes(name: str, data: st.DataObject) -> None:
    """Each token adds what a grammar reads of it, wherever it stands; at the beginning of a text only if it is told."""
    vocabulary = Vocabulary.from_tokenizer((TABLED | PROBED)[name]())
    ids = data.draw(st.lists(st.integers(0, vocabulary.size - 1), max_size=8))
    form = Detokenizer(vocabulary, vocabulary.middle, alike=True)
    assert [(form.token_bytes(i), form.push(i)[1]) for i in ids] == [(vocabulary.token_bytes(i),) * 2 for i in ids]
    free = Detokenizer(vocabulary, alike=True)
    text = [i for i in ids if vocabulary.is_text(i)]
    assert [free.push(i)[1] for i in text[:1]] == [vocabulary.contribution(i, None) for i in text[:1]]
    assert [free.push(i)[1] for i in text[1:]] == [vocabulary.token_bytes(i) for i in text[1:]]


def test_as_much_is_remembered_as_there_is_room_for() -> None:
    calls: list[str] = []

    def encode(text: str) -> list[int]:
        calls.append(text)
        return list(text.encode())

    speller = Speller([bytes([i]) for i in range(256)], encode, lambda text: [])
    texts = [letter * 5000 for letter in "abcdefghi"]
    for text in [*texts[:8], texts[0], texts[8], texts[0], texts[1]]:
        assert speller.spell(text) == list(text.encode())
    assert [text[0] for text in calls] == [*"abcdefghi", "b"], "the one that was used last stays"
    spelled = speller.spell(texts[0])
    assert spelled is not None
    spelled.clear()
    assert speller.spell(texts[0]) == list(texts[0].encode()), "nobody else's list"
