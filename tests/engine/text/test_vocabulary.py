"""Text: a choice's text is what the tokenizer decodes, cut at its first stop string, however it is streamed."""

from __future__ import annotations

import codecs
import functools
import itertools
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers_for_tests import PROBED, SAMPLE, TABLED, gemma_like
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.errors import LoadError
from engine.replies.reply_stream import TextDelta, TextStream
from engine.text.stop_strings import StopMatcher, StopStrings
from engine.text.vocabulary import Detokenizer, Vocabulary

CHECKPOINTS = Path(__file__).parents[3].parent / "shared" / "checkpoints"
REAL = ("qwen3-0.6b", "phi-3")
TEXTS = [
    "",
    " leading space",
    "   three of them",
    "\n\nlines\r\n\ttabs",
    "plain ASCII, with (punctuation)... and 12345 numbers",
    "漢字かな交じり文、中文字符。한국어",
    "🤷🏽‍♀️ 👨‍👩‍👧‍👦 🏴󠁧󠁢󠁳󠁣󠁴󠁿 é e\u0301 ﷽",
    "a\ufffdb \ufffd\ufffd",
    "العربية עברית हिन्दी 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    SAMPLE,
]


@functools.cache
def load(name: str) -> tuple[Any, Vocabulary]:
    if name in REAL:
        if not (CHECKPOINTS / name).is_dir():
            pytest.skip(f"../shared/checkpoints/{name} is absent")
        tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    else:
        tokenizer = (TABLED | PROBED)[name]()
    return tokenizer, Vocabulary.from_tokenizer(tokenizer)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(vocabulary: Vocabulary, ids: list[int]) -> tuple[list[str], list[bytes]]:
    detokenizer = Detokenizer(vocabulary)
    pushed = [detokenizer.push(i) for i in ids]
    return [*(text for text, _ in pushed), detokenizer.flush()], [data for _, data in pushed]


def replaced(data: bytes, byte_fallback: bool) -> str:
    if not byte_fallback:
        return data.decode(errors="replace")
    return re.sub("[\udc80-\udcff]", "\ufffd", data.decode(errors="surrogateescape"))


def mixed_run(vocabulary: Vocabulary, tokenizer: Any, ids: list[int]) -> bool:
    """Whether a run of byte-fallback tokens holds both a valid character and an invalid byte: the known difference."""
    tokens = tokenizer.convert_ids_to_tokens([i for i in ids if vocabulary.is_text(i)])
    for is_byte, run in itertools.groupby(tokens, lambda token: bool(re.fullmatch("<0x..>", token))):
        if is_byte:
            text = b"".join(bytes.fromhex(token[3:5]) for token in run).decode(errors="surrogateescape")
            if len({"\udc80" <= char <= "\udcff" for char in text}) == 2:
                return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TABLED, *REAL])
def test_real_text_round_trips(name: str) -> None:
    """Deltas join to `decode`, bytes join to the same text, no delta shows a half character."""
    tokenizer, vocabulary = load(name)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        deltas, data = stream(vocabulary, ids)
        assert "".join(deltas) == decode(tokenizer, ids)
        assert b"".join(data).decode() == decode(tokenizer, ids)
        assert "".join(deltas).count("\ufffd") == decode(tokenizer, ids).count("\ufffd")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TABLED, *PROBED, *REAL])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_decode_as_the_tokenizer_decodes_them(name: str, data: st.DataObject) -> None:
    """Cut characters, special tokens and holes included; bytes are always those of the text."""
    tokenizer, vocabulary = load(name)
    # The lower ids, where the single bytes are, more often than chance would have it.
    token = st.one_of(st.integers(0, vocabulary.size - 1), st.integers(0, min(vocabulary.size, 262) - 1))
    ids = data.draw(st.lists(token, max_size=24))
    deltas, added = stream(vocabulary, ids)
    text = "".join(deltas)
    assert text == replaced(b"".join(added), vocabulary.byte_fallback)
    if not (vocabulary.byte_fallback and mixed_run(vocabulary, tokenizer, ids)):
        assert text == decode(tokenizer, ids)
    assert not re.search("[\ud800-\udfff]", text)


@pytest.mark.parametrize("name", ["byte_level", "gemma_like", "qwen3-0.6b", "phi-3"])
@settings(max_examples=200, deadline=None)
@given(raw=st.lists(st.sampled_from([*b"A\xe2\x80\x94\xf0\x9f\xa4\xb7\xc3\xa9\xed\xa0\xc0\xff\xf4\x90"]), max_size=12))
@example(raw=[0xED, 0xA0, 0x80])  # a surrogate, which UTF-8 does not have
@example(raw=[0xF0, 0x9F, 0x41])
def test_cut_characters(name: str, raw: list[int]) -> None:
    """Byte by byte: one U+FFFD per maximal invalid part (byte level) or per invalid byte (byte fallback)."""
    tokenizer, vocabulary = load(name)
    by_bytes = {vocabulary.token_bytes(i): i for i in range(512) if len(vocabulary.token_bytes(i)) == 1}
    ids = [by_bytes[bytes([byte])] for byte in raw]
    deltas, added = stream(vocabulary, ids)
    assert b"".join(added) == bytes(raw)
    assert "".join(deltas) == replaced(bytes(raw), vocabulary.byte_fallback)
    if not vocabulary.byte_fallback or not mixed_run(vocabulary, tokenizer, ids):
        assert "".join(deltas) == decode(tokenizer, ids)


def test_a_valid_character_in_a_broken_run_stays() -> None:
    """The deliberate difference: what a stream has shown, the whole answer shows too."""
    tokenizer, vocabulary = load("gemma_like")
    ids = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<0xE2>", "<0x80>", "hello"])
    assert decode(tokenizer, ids) == "\ufffd" * 4 + "hello"
    assert stream(vocabulary, ids)[0] == ["", "é", "", "", "\ufffd\ufffdhello", ""]


@pytest.mark.parametrize("name", [*TABLED, *PROBED, *REAL])
def test_every_id_alone_and_after_another(name: str) -> None:
    """The sample that `from_tokenizer` checks is not all of it: here the whole vocabulary, or every 37th id of it."""
    tokenizer, vocabulary = load(name)
    word = next(
        i for i in range(vocabulary.size) if decode(tokenizer, [i]).isalpha() and len(decode(tokenizer, [i])) > 1
    )
    for i in range(0, vocabulary.size, 37 if vocabulary.size > 5000 else 1):
        for ids in ([i], [word, i], [i, i]):
            if not mixed_run(vocabulary, tokenizer, ids):
                assert "".join(stream(vocabulary, ids)[0]) == decode(tokenizer, ids), ids


@pytest.mark.parametrize(
    ("name", "tokens", "deltas"),
    [
        ("llama_like", ["▁hello", "▁world"], ["hello", " world", ""]),
        ("llama_like", ["▁", "▁world"], ["", " world", ""]),
        ("llama_like", ["▁▁▁", "hello"], ["  ", "hello", ""]),
        ("llama_like", ["<s>", "▁hello"], ["", "hello", ""]),  # a special token is not the first text token
        ("llama_like", ["<0x20>", "▁world"], ["", " world", ""]),
        ("llama_like", ["▁odd", "</s>"], ["odd", "</s>", ""]),  # added, but not special
        ("gemma_like", ["▁hello", "▁world"], [" hello", " world", ""]),
        ("metaspace_always", ["▁▁▁", "▁hello"], ["", " hello", ""]),
        ("metaspace_first", ["▁hello", "▁hello"], ["hello", " hello", ""]),
        ("metaspace_never", ["▁hello", "▁hello"], [" hello", " hello", ""]),
        ("metaspace_never", ["<0x41>"], ["<0x41>", ""]),
        ("word_piece", ["[CLS]", "hello", "##ing", "world", "."], ["", "hello", "ing", " world", ".", ""]),
        ("word_suffix", ["hel", "lo</w>", "world</w>"], ["hel", "lo", " world", ""]),
        ("no_decoder", ["hello", "wörld"], ["hello", " wörld", ""]),
    ],
)
def test_spaces(name: str, tokens: list[str], deltas: list[str]) -> None:
    """A token's bytes are what it adds where it stands: the space that a decoder strips belongs to nobody."""
    tokenizer, vocabulary = load(name)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    texts, added = stream(vocabulary, ids)
    assert texts == deltas
    assert "".join(deltas) == decode(tokenizer, ids)
    assert [data.decode() for data in added] == deltas[:-1]


def test_added_and_special_tokens() -> None:
    """Special tokens add nothing and are written literally; others are text like any; ids past the end are invalid."""
    tokenizer, vocabulary = load("byte_level")
    special, call, odd, latin = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<tool_call>", "naïve 漢 token", "þÿ"])
    assert vocabulary.token_bytes(special) == b""
    assert vocabulary.token_text(special) == "<|im_end|>"
    assert vocabulary.token_bytes(call) == b"<tool_call>"
    assert vocabulary.token_bytes(odd) == "naïve 漢 token".encode()
    # An added token spelled in the byte alphabet is read in it, by the tokenizer as well: þ is the byte FE.
    assert vocabulary.token_bytes(latin) == b"\xfe\xff"
    assert decode(tokenizer, [latin]) == "\ufffd\ufffd"
    assert vocabulary.special_ids == {special}
    assert vocabulary.size == len(tokenizer)
    assert vocabulary.invalid_ids(vocabulary.size) == []
    assert vocabulary.invalid_ids(vocabulary.size + 3) == [vocabulary.size + i for i in range(3)]
    assert vocabulary.invalid_ids(5) == []


def test_holes_are_invalid() -> None:
    backend = Tokenizer(models.BPE(vocab={"hello": 0, "b": 3}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    vocabulary = Vocabulary.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert vocabulary.invalid_ids(6) == [1, 2, 4, 5]
    assert vocabulary.token_bytes(1) == vocabulary.token_bytes(99) == b""
    assert stream(vocabulary, [0, 1, 3, 99])[0] == ["hello", "", "b", "", ""]


def test_token_text() -> None:
    r"""Half a character is written as OpenAI does, `bytes:\xe2\x80`; a known place gives the bytes of that place."""
    _, vocabulary = load("byte_level")
    half = next(i for i in range(vocabulary.size) if vocabulary.token_bytes(i) == b"\xe2")
    assert vocabulary.token_text(half) == "bytes:\\xe2"
    tokenizer, vocabulary = load("llama_like")
    hello = tokenizer.convert_tokens_to_ids("▁hello")
    assert vocabulary.token_text(hello) == " hello"
    text = TextStream(vocabulary)
    assert vocabulary.token_text(hello, text.token_bytes(hello)) == "hello"
    text.push(hello)
    assert text.token_bytes(hello) == b" hello"


def test_padding_rows_of_a_real_checkpoint() -> None:
    """Qwen3's embedding has 267 rows that no token belongs to."""
    tokenizer, vocabulary = load("qwen3-0.6b")
    assert vocabulary.invalid_ids(151936) == list(range(len(tokenizer), 151936))


def test_a_large_vocabulary_is_read_quickly() -> None:
    tokenizer, _ = load("qwen3-0.6b")
    begin = time.thread_time()
    Vocabulary.from_tokenizer(tokenizer)
    assert time.thread_time() - begin < 2.0  # 0.3 s on an idle core; one decode call per id would take longer


def test_a_decoder_that_disagrees_with_its_tokenizer_is_not_believed() -> None:
    """A tokenizer class that overrides decoding is asked, not derived."""

    class Shouting(PreTrainedTokenizerFast):
        def decode(self, *args: Any, **kwargs: Any) -> str:
            return super().decode(*args, **kwargs).upper()

    tokenizer = Shouting(tokenizer_object=gemma_like().backend_tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["hello", "▁world"])
    assert "".join(stream(Vocabulary.from_tokenizer(tokenizer), ids)[0]) == "HELLO WORLD"


def test_a_tokenizer_without_a_backend_is_refused() -> None:
    with pytest.raises(LoadError, match=r"tokenizer\.json"):
        Vocabulary.from_tokenizer(object())


# Stop strings


def matched(chunks: list[str], stops: list[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(StopStrings(stops))
    deltas = []
    for chunk in chunks:
        text, stopped = matcher.push(chunk)
        deltas.append(text)
        if stopped:
            return deltas, True
    return [*deltas, matcher.release()], False


def cut(text: str, stops: list[str], begin: int = 0) -> int | None:
    """Where the first stop string begins."""
    places = [place for stop in stops if (place := text.find(stop, begin)) >= 0]
    return min(places, default=None)


@settings(max_examples=500)
@given(
    chunks=st.lists(st.text("abc", max_size=5), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
@example(chunks=["ab", "c"], stops=["abcd", "bc"])
@example(chunks=["abcd"], stops=["abcd", "bc"])
@example(chunks=["aab", "aac"], stops=["aabaac"])
@example(chunks=["xab", "ac"], stops=["abab", "bac"])
def test_matcher_law(chunks: list[str], stops: list[str]) -> None:
    """What comes out, at each push, is the text so far, less exactly the end that may begin a stop string."""
    deltas, stopped = matched(chunks, stops)
    text = ""
    for number, chunk in enumerate(chunks):
        text += chunk
        place = cut(text, stops)
        shown = "".join(deltas[: number + 1])
        if place is not None:
            assert (shown, stopped, len(deltas)) == (text[:place], True, number + 1)
            return
        begins = [k for k in range(len(text) + 1) if any(s.startswith(text[len(text) - k :]) for s in stops)]
        assert shown == text[: len(text) - max(begins, default=0)]
    assert (text, False) == ("".join(deltas), stopped)


@settings(max_examples=300)
@given(
    text=st.text("abc", max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
)
@example(text="xabcab", cuts=[], stops=["bca", "abc", "ab"])
@example(text="abc", cuts=[2], stops=["abc", "ab"])
def test_the_stop_string_that_was_found_is_told(text: str, cuts: list[int], stops: list[str]) -> None:
    """It begins where the text ends, and no other that begins there was complete before it."""
    matcher, shown = StopMatcher(StopStrings(stops)), ""
    places = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    for begin, end in itertools.pairwise(places):
        delta, stopped = matcher.push(text[begin:end])
        shown += delta
        if stopped:
            fitting = [stop for stop in stops if text.startswith(stop, len(shown))]
            assert matcher.found == min(fitting, key=len)
            return
    assert matcher.found is None


def offline(vocabulary: Vocabulary, ids: list[int], stops: list[str], min_tokens: int) -> tuple[str, int | None]:
    """The law of `TextStream`, from whole prefixes: text, and at how many ids a stop string was complete."""
    added = stream(vocabulary, ids)[1]
    begin = 0
    for number in range(len(ids) + 1):
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(added[:number]))
        if number <= min_tokens:
            begin = len(text)
        elif (place := cut(text, stops, begin)) is not None:
            return text[:place], number
    text = b"".join(added).decode(errors="replace")
    place = cut(text, stops, begin) if len(ids) > min_tokens else None
    return (text, None) if place is None else (text[:place], len(ids))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_text_stream_law(data: st.DataObject) -> None:
    """For any ids and any stop strings: joined deltas are the whole text, cut at the first stop string."""
    tokenizer, vocabulary = load("byte_level")
    sampled = st.lists(st.sampled_from(tokenizer.encode(SAMPLE)), max_size=12)
    ids = data.draw(st.one_of(st.lists(st.integers(0, vocabulary.size - 1), max_size=12), sampled))
    whole = decode(tokenizer, ids)
    assume(whole)
    piece = st.integers(0, len(whole) - 1).flatmap(lambda a: st.integers(1, 6).map(lambda n: whole[a : a + n]))
    stops = data.draw(st.lists(st.one_of(piece, piece.map(lambda p: p + "x")), max_size=3))
    min_tokens = data.draw(st.integers(0, 3))

    text, end = offline(vocabulary, ids, stops, min_tokens)
    running = TextStream(vocabulary, stops)
    out, added = "", b""
    for number, token in enumerate(ids):
        delta = running.push(token, match_stops=number >= min_tokens)
        out, added = out + delta.text, added + delta.bytes
        assert text.startswith(out)
        if delta.stopped:
            assert number + 1 == end
            break
    last = running.finish()
    assert out + last.text == text
    assert last.stopped == running.stopped == (end is not None)
    if not stops:
        assert text == whole == added.decode(errors="replace")


@pytest.mark.parametrize(
    ("pieces", "stops", "min_tokens", "text", "stopped"),
    [
        (["no", " st", "op", " here"], ["stop"], 0, "no ", True),
        (["no", " st", "ep", " here"], ["stop"], 0, "no step here", False),
        (["a", "##", "#"], ["###"], 0, "a", True),
        (["a", "##"], ["###"], 0, "a##", False),  # held back, released at the end
        (["stop", "stop"], ["stop"], 1, "stop", True),
        (["st", "op", "!"], ["stop"], 1, "stop!", False),  # begins before min_tokens: no match
        (["\U0001f937", "x"], ["\U0001f937x"], 0, "", True),
        (["a", "b\ufffd"], ["\ufffd"], 0, "ab", True),
    ],
)
def test_stop_strings(pieces: list[str], stops: list[str], min_tokens: int, text: str, stopped: bool) -> None:
    tokenizer, vocabulary = load("byte_level")
    running = TextStream(vocabulary, stops)
    out = ""
    for number, piece in enumerate(pieces):
        for token in tokenizer.encode(piece):
            if not running.stopped:
                out += running.push(token, match_stops=number >= min_tokens).text
    assert (out + running.finish().text, running.stopped) == (text, stopped)


def test_a_cut_character_at_the_end_can_complete_a_stop_string() -> None:
    """Streamed or not, the answer is cut at the same place, also when only the end makes the U+FFFD."""
    tokenizer, vocabulary = load("byte_level")
    ids = tokenizer.encode("ok 漢")[:-1]
    running = TextStream(vocabulary, ["k \ufffd"])
    deltas = [running.push(token) for token in ids]
    assert "".join(delta.text for delta in deltas) == "o"
    assert running.finish() == TextDelta("", True, b"")
    assert running.finish() == TextDelta("", True, b"")


def test_choices_share_stop_strings() -> None:
    _, vocabulary = load("byte_level")
    stops = StopStrings(["ab"])
    one, two = TextStream(vocabulary, stops), TextStream(vocabulary, stops)
    a, b = (next(i for i in range(vocabulary.size) if vocabulary.token_bytes(i) == char) for char in (b"a", b"b"))
    assert one.push(a) == TextDelta("", False, b"a")
    assert two.push(b) == TextDelta("b", False, b"b")
    assert one.push(b) == TextDelta("", True, b"b")


def test_many_long_stop_strings_cost_little() -> None:
    """A text that is forever about to match the longest allowed stop strings costs a step per character."""
    stops = StopStrings(["a" * 1023 + char for char in "bcdefghijklmnopq"])
    matcher = StopMatcher(stops)
    begin = time.thread_time()
    shown = sum(len(matcher.push("aaaa")[0]) for _ in range(2000))
    assert shown == 8000 - 1023
    assert time.thread_time() - begin < 1.0


def test_importing_costs_no_torch() -> None:
    """Layer 1 is pure logic: the modules must import where torch and transformers are absent."""
    modules = "engine.text.vocabulary, engine.templates.chat_template"
    code = f"import sys, {modules}; print({{'torch', 'transformers'}} & {{*sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
