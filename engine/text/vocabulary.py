"""Converts token ids to text: the exact bytes of every id, and complete characters. Knows no model, no torch, no clock.

    Vocabulary     what each id is: its bytes, whether it is special, whether it exists. One per model.
    Detokenizer    turns the ids of one choice into complete characters.

The text of a choice is `tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`, with one
deliberate difference, described at `Detokenizer`. It is derived from the decoder in the model's tokenizer.json (format:
the `tokenizers` library, https://github.com/huggingface/tokenizers), never from a model's name.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from engine.errors import LoadError

__all__ = ["Detokenizer", "Vocabulary"]

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_ESCAPED: Final = re.compile("[\udc80-\udcff]")  # what the error handler "surrogateescape" makes of invalid bytes
_BYTE_TOKEN: Final = re.compile("<0x([0-9A-Fa-f]{2})>")
_CHECKED_IDS: Final = 256


def _byte_level_table() -> dict[int, int]:
    """Map the code points by which GPT-2 spells bytes to those bytes (`bytes_to_unicode` of its encoder.py).

    Code points below 256 that spell no byte map to one that Latin-1 cannot encode, so that translating a token and
    encoding it as Latin-1 succeeds exactly when the whole token is spelled in this alphabet.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = dict.fromkeys(range(256), 0xFFFF)
    table.update({byte: byte for byte in printable})
    table.update({256 + position: byte for position, byte in enumerate(others)})
    return table


BYTE_LEVEL: Final = _byte_level_table()


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a decoder turns one token into bytes, if it treats each token alike.

    `dropped`: the character that Metaspace removes from the first token. `stripped`: the byte that Strip removes from
    the beginning of the text.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    dropped: str = ""
    stripped: bytes = b""

    def spell(self, token: str, first: bool = False) -> bytes:
        """Return the bytes that a token adds to a text. `first`: at its beginning."""
        if self.byte_level:
            try:
                return token.translate(BYTE_LEVEL).encode("latin-1")
            except UnicodeEncodeError:
                return token.encode()  # an added token, written as it is
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            data = bytes.fromhex(match[1])
        else:
            if first and self.dropped:
                token = token.replace(self.dropped, "")
            for old, new in self.replacements:
                token = token.replace(old, new)
            data = token.encode()
        return data.removeprefix(self.stripped) if first else data


def _plan(decoder: Mapping[str, Any] | None) -> _Plan | None:
    """Read the decoder of a tokenizer.json; None if one of its steps does not treat each token alike."""
    plan = _Plan()
    fused = False
    for step in _steps(decoder):
        match step:
            case {"type": "Fuse"}:
                fused = True
            case {"type": "ByteLevel"} if plan == _Plan():
                plan = replace(plan, byte_level=True)
            case {"type": "ByteFallback"} if not fused and not plan.byte_level:
                plan = replace(plan, byte_fallback=True)
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused and not plan.byte_level:
                plan = replace(plan, replacements=(*plan.replacements, (old, new)))
            case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme} if not fused and plan == _Plan():
                plan = replace(plan, replacements=((mark, " "),), dropped="" if scheme == "never" else mark)
            case {"type": "Strip", "content": content, "start": 1, "stop": 0} if fused and content.isascii():
                plan = replace(plan, stripped=content.encode())
            case _:
                return None
    return plan


def _steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        yield {"type": "none"}  # tokens joined by spaces: not alike, the first has none
    elif decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


_Speller = Callable[[int, int | None], bytes]
"""A function of a text id and the text id before it (None: at the beginning): the bytes that the first adds."""


def _planned(plan: _Plan, tokens: Sequence[str | None]) -> _Speller:
    """Make a speller that looks bytes up in a table."""
    table = [plan.spell(token or "") for token in tokens]

    def spell(token_id: int, previous: int | None) -> bytes:
        return table[token_id] if previous is not None else plan.spell(tokens[token_id] or "", first=True)

    return spell


def _probed(decode: Callable[[list[int]], str]) -> _Speller:
    """Make a speller that asks the tokenizer, for decoders that join words (WordPiece, BPE with a word suffix, none).

    The bytes of an id depend on the id before it, so pairs are decoded. Such decoders work on complete characters; with
    any other, a character split over tokens would become U+FFFD.
    """

    @functools.lru_cache(maxsize=1 << 16)
    def spell(token_id: int, previous: int | None) -> bytes:
        if previous is not None:
            before, both = decode([previous]), decode([previous, token_id])
            if both.startswith(before):
                return both[len(before) :].encode()
        return decode([token_id]).encode()

    return spell


class Vocabulary:
    """What each token id is. Built once per model, in well under a second for 150,000 ids; immutable.

    Attributes:
        size: one more than the tokenizer's highest id. A model's own vocabulary may be larger (padding rows).
        special_ids: ids that `skip_special_tokens` leaves out of a text (`special: true` in tokenizer.json).
        byte_fallback: whether each invalid byte becomes a U+FFFD of its own (SentencePiece's byte fallback), or each
            maximal invalid subsequence does (byte-level BPE, Unicode's recommendation).
        middle: an id after which any other one is in the middle of a text; None if there is no text.
    """

    def __init__(
        self, tokens: Sequence[str | None], special_ids: Iterable[int], speller: _Speller, *, byte_fallback: bool
    ):
        self.size = len(tokens)
        self.special_ids = frozenset(special_ids)
        self.byte_fallback = byte_fallback
        self._tokens = tokens
        self._speller = speller
        self._text_ids = frozenset(i for i, token in enumerate(tokens) if token is not None) - self.special_ids
        # Any word, as the context of a token whose bytes are asked for without one. At least two letters: a
        # byte-fallback token of one letter would form a run with its neighbour (see `Detokenizer`).
        words = (i for i in range(self.size) if self.is_text(i) and len(w := speller(i, None)) > 1 and w.isalpha())
        self._anchor = next(words, None)
        self.middle = self._anchor if self._anchor is not None else min(self._text_ids, default=None)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """Read a transformers tokenizer.

        Raises:
            LoadError: it is not backed by the `tokenizers` library and a tokenizer.json.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise LoadError(
                f"{type(tokenizer).__name__} is not backed by a tokenizer.json; only such tokenizers serve."
            )
        vocab: dict[str, int] = backend.get_vocab(with_added_tokens=False)
        added: dict[int, Any] = backend.get_added_tokens_decoder()
        tokens: list[str | None] = [None] * (max([*vocab.values(), *added], default=-1) + 1)
        for token, token_id in vocab.items():
            tokens[token_id] = token
        for token_id, entry in added.items():
            tokens[token_id] = entry.content
        special = {entry.content for entry in added.values() if entry.special}
        special_ids = frozenset(i for i, token in enumerate(tokens) if token in special)

        def decode(ids: list[int]) -> str:
            text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            return text

        plan = _plan(json.loads(backend.decoder.__getstate__()) if backend.decoder else None)
        if plan is not None:
            vocabulary = cls(tokens, special_ids, _planned(plan, tokens), byte_fallback=plan.byte_fallback)
            if vocabulary._agrees_with(decode):
                return vocabulary
        return cls(tokens, special_ids, _probed(decode), byte_fallback=False)

    def _agrees_with(self, decode: Callable[[list[int]], str]) -> bool:
        """Compare a sample of ids with the tokenizer's decoding, at the beginning of a text and after a word."""
        contexts = [[]] if self._anchor is None else [[], [self._anchor]]
        for token_id in range(0, self.size, max(1, self.size // _CHECKED_IDS)):
            for context in contexts:
                ids = [*context, token_id]
                stream = Detokenizer(self)
                if "".join([*(stream.push(i)[0] for i in ids), stream.flush()]) != decode(ids):
                    return False
        return True

    def is_text(self, token_id: int) -> bool:
        """Return whether an id stands for text: it has a token, which is not special."""
        return token_id in self._text_ids

    def invalid_ids(self, model_vocab_size: int) -> list[int]:
        """Return the ids below `model_vocab_size` without a token, ascending: gaps, and padding at the end."""
        holes = [i for i, token in enumerate(self._tokens[:model_vocab_size]) if token is None]
        return [*holes, *range(self.size, model_vocab_size)]

    def contribution(self, token_id: int, previous: int | None) -> bytes:
        """Return the bytes that an id adds to a text whose last text token is `previous` (None: at its beginning).

        Empty for special ids and for ids without a token.
        """
        return self._speller(token_id, previous) if token_id in self._text_ids else b""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of an id in the middle of a text, leading space included."""
        return self.contribution(token_id, self.middle)

    def token_text(self, token_id: int, data: bytes | None = None) -> str:
        r"""Return how logprobs write a token: its text, or `bytes:\xe2\x80` if it is no complete text by itself.

        That notation is the OpenAI API's. A special token is written as its name (`<|im_end|>`), although it adds no
        bytes. `data`: its bytes at its place, if they are known (`TextStream.token_bytes`).
        """
        if token_id in self.special_ids:
            return self._tokens[token_id] or ""
        if data is None:
            data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Detokenizer:
    """Turns the token ids of one choice into complete characters.

    Bytes that begin a character wait for the rest of it. Bytes that cannot become a character are written as U+FFFD, as
    many as `tokenizer.decode` writes. One difference is deliberate: in a run of byte-fallback tokens that contains an
    invalid byte, the library turns the valid characters of the run into U+FFFD too, even those before that byte. A
    stream has sent them by then and cannot take them back, so they stay, streamed or not.
    """

    __slots__ = ("_alike", "_pending", "_previous", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, previous: int | None = None, *, alike: bool = False) -> None:
        """Begin a text.

        Args:
            previous: the token of text before the first one; None at the beginning of a text.
            alike: whether a token adds the same bytes after any other one (`Vocabulary.token_bytes`), which are those
                that a grammar reads. Tokenizers that join words may decode it otherwise after some tokens.
        """
        self._vocabulary = vocabulary
        self._previous = previous
        self._alike = alike
        self._pending = b""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a candidate would add at this place."""
        if self._alike and self._previous is not None:
            return self._vocabulary.token_bytes(token_id)
        return self._vocabulary.contribution(token_id, self._previous)

    def push(self, token_id: int) -> tuple[str, bytes]:
        """Take one id; return the characters that it completes and the bytes that it adds."""
        data = self.token_bytes(token_id)
        if self._vocabulary.is_text(token_id):
            self._previous = token_id
        return (self._decode(data, final=False) if data else ""), data

    @property
    def whole(self) -> bool:
        """Whether the text ends with a complete character."""
        return not self._pending

    def flush(self) -> str:
        """End the text; return an incomplete character as U+FFFD."""
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, final: bool) -> str:
        data = self._pending + data
        if not self._vocabulary.byte_fallback:
            text, used = codecs.utf_8_decode(data, "replace", final)
        else:
            text, used = codecs.utf_8_decode(data, "surrogateescape", final)
            if not text.isascii():
                text = _ESCAPED.sub(_REPLACEMENT, text)
        self._pending = data[used:]
        return text
