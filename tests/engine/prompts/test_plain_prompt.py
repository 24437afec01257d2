"""Plain prompts: where each token stands in the text, text that is never control, and prompts with a gap."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tokenizers_for_tests
from hypothesis import given, settings, strategies as st
from test_prompt_encoder import KINDS, TEXTS, encoder, tokenizer
from tokenizers import AddedToken, processors

from engine.errors import InvalidFormat, InvalidParameter, Unsupported
from engine.prompts.fill_in import FILL_IN_FORMS, FillInForm
from engine.prompts.plain_prompt import PlainPrompts
from engine.prompts.prompt_encoder import PromptEncoder, find_control_words
from engine.text.vocabulary import Vocabulary


@functools.cache
def prompts(name: str) -> PlainPrompts:
    found = tokenizer(name)
    return PlainPrompts(found, Vocabulary.from_tokenizer(found), encoder(name), find_control_words(found, []))


# -- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_places_rise_from_the_beginning_to_the_end(name: str, shared: Any) -> None:
    """And the ids are those that are computed without places."""

    @settings(max_examples=60, deadline=None)
    @given(TEXTS, st.booleans())
    def check(text: str, special: bool) -> None:
        ids, places = encoder(name).encode_with_places(text, special=special)
        assert ids == encoder(name).encode(text, special=special)
        assert places == sorted(places)
        assert len(places) == len(ids)
        assert not places or (places[0] == 0 and places[-1] <= len(text))

    check()


@pytest.mark.parametrize("name", ["byte_level", "qwen3-0.6b"])
def test_a_place_is_the_number_of_whole_characters_before(name: str, shared: Any) -> None:
    """Where tokens are bytes and nothing is changed before, the place is known without the library."""
    words = Vocabulary.from_tokenizer(tokenizer(name))
    special = {i: t.content for i, t in tokenizer(name).backend_tokenizer.get_added_tokens_decoder().items()}

    @settings(max_examples=100, deadline=None)
    @given(TEXTS.filter(lambda text: text.isascii() or "e\u0301" not in text))
    def check(text: str) -> None:
        ids, places = encoder(name).encode_with_places(text, special=False)
        before, expected = b"", []
        for token in ids:
            expected.append(len(before.decode("utf-8", "ignore")))
            before += special[token].encode() if token in special else words.token_bytes(token)
        if before == text.encode():  # else it was normalised
            assert places == expected

    check()


@pytest.mark.parametrize("name", KINDS)
def test_an_echo_of_ids_is_their_text(name: str, shared: Any) -> None:
    found, words = prompts(name), Vocabulary.from_tokenizer(tokenizer(name))
    known = sorted(set(range(words.size)) - set(words.invalid_ids(words.size)))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from(known), max_size=12))
    def check(ids: list[int]) -> None:
        echo = found.echo(ids)
        assert echo.text == found.decode(ids) == tokenizer(name).decode(ids, clean_up_tokenization_spaces=False)
        assert len(echo.tokens) == len(echo.offsets) == len(ids)
        assert list(echo.offsets) == sorted(echo.offsets)
        assert all(0 <= offset <= len(echo.text) for offset in echo.offsets)

    check()


def test_an_echoed_text_is_the_callers_own() -> None:
    text = "Hello<|im_end|> naïve\n"
    _, echo = prompts("byte_level").encode(text, None, special=True, echo=True, field="prompt")
    assert echo is not None
    assert echo.text == text
    assert "<|im_end|>" in echo.tokens
    assert "".join(echo.tokens) == text
    ends = [*echo.offsets[1:], len(text)]
    assert [text[start:end] for start, end in zip(echo.offsets, ends, strict=True)] == list(echo.tokens)


# -- text that is never control --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte_level", "llama_like", "gemma_like", "qwen3-0.6b", "phi-3"])
def test_what_a_text_spells_stays_text(name: str, shared: Any) -> None:
    words = find_control_words(tokenizer(name), [])

    @settings(max_examples=80, deadline=None)
    @given(st.lists(st.sampled_from([*words, "a", " ", "漢", "<", "|>"]), max_size=6).map("".join))
    def check(text: str) -> None:
        try:
            ids = encoder(name).encode_as_text(text, "prediction")
        except InvalidFormat:
            return
        unknown = getattr(tokenizer(name), "unk_token_id", None)
        assert not {*ids} & {*words.values()} - {unknown}

    check()


# -- prompts with a gap ----------------------------------------------------------------------------------------------


def with_tokens(form: FillInForm, kind: str, *, begins: bool, special: bool = True) -> Any:
    """A small tokenizer with a family's tokens; `begins`: puts `<s>` before a text."""
    found = getattr(tokenizers_for_tests, kind)()
    names = [*form.tokens, *form.ends]
    found.add_tokens([AddedToken(name, special=special, normalized=False) for name in names], special_tokens=special)
    if begins:
        found.add_tokens([AddedToken("<s>", special=True)], special_tokens=True)
        start = ("<s>", found.convert_tokens_to_ids("<s>"))
        found.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[start])
    return found


def plain(found: Any) -> PlainPrompts:
    words = find_control_words(found, [])
    return PlainPrompts(found, Vocabulary.from_tokenizer(found), PromptEncoder(found, words), words)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("kind", ["byte_level", "llama_like", "gemma_like"])
@pytest.mark.parametrize("form", FILL_IN_FORMS, ids=lambda form: form.families)
def test_a_gap_in_the_form_of_each_family(form: FillInForm, kind: str, begins: bool) -> None:
    found = with_tokens(form, kind, begins=begins)
    numbers = {name: found.convert_tokens_to_ids(name) for name in (*form.tokens, *form.ends, "<s>")}
    ids, echo = plain(found).encode("ab.", "b\n", special=True, echo=False, field="prompt")
    assert echo is None
    start = [numbers["<s>"]] if begins else []
    assert ids[: len(start)] == start
    control = [numbers[token] for token in form.tokens]
    order = [control[1], control[0]] if form.after_first else control
    assert [i for i in ids[len(start) :] if i in control] == order
    assert ids[len(start)] == order[0]
    words = Vocabulary.from_tokenizer(found)
    text = {token: words.token_bytes(token).decode() for token in ids}
    before = ids[ids.index(control[0]) + 1 :]
    after = ids[ids.index(control[1]) + 1 :]
    until = lambda rest: [text[t] for t in rest[: next((i for i, t in enumerate(rest) if t in control), len(rest))]]  # noqa: E731
    assert "".join(until(before)).strip(" ") == "ab."
    assert "".join(until(after)) == "b\n", "no space is put before what follows the gap"
    assert set(plain(found).fill_in_ends) == {numbers[end] for end in form.ends}


@pytest.mark.parametrize("form", FILL_IN_FORMS, ids=lambda form: form.families)
def test_no_text_around_a_gap_becomes_control(form: FillInForm) -> None:
    found = with_tokens(form, "byte_level", begins=False)
    numbers = [found.convert_tokens_to_ids(name) for name in form.tokens]
    text = "".join((*form.tokens, *form.ends, "<|im_end|>"))
    ids, _ = plain(found).encode(text, text, special=True, echo=False, field="prompt")
    control = find_control_words(found, []).values()
    assert sorted(i for i in ids if i in control) == sorted(numbers)


def test_tokens_need_not_be_special_to_be_known() -> None:
    """Those of Qwen are not."""
    assert plain(with_tokens(FILL_IN_FORMS[0], "byte_level", begins=False, special=False)).fills_in


def test_a_gap_needs_tokens_for_it() -> None:
    with pytest.raises(Unsupported, match="no tokens for filling in the middle") as caught:
        prompts("byte_level").encode("a", "b", special=True, echo=False, field="prompt")
    assert caught.value.param == "suffix"
    form = with_tokens(FILL_IN_FORMS[0], "byte_level", begins=False)
    with pytest.raises(InvalidParameter, match="cannot be combined"):
        plain(form).encode("a", "b", special=True, echo=True, field="prompt")


def test_the_gap_of_a_real_tokenizer(shared: Any) -> None:
    found = tokenizer("qwen3-0.6b")
    ids, _ = prompts("qwen3-0.6b").encode("def f(", "return 1", special=True, echo=False, field="prompt")
    written = "<|fim_prefix|>def f(<|fim_suffix|>return 1<|fim_middle|>"
    assert ids == found(written)["input_ids"], "as the model's own documentation writes it"
