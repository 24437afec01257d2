"""`PromptEncoder`: encodes prompt text into token ids, and bounds a text's length in tokens. Knows no model.

Uses the `tokenizers` library itself, not transformers' wrapper: that sets options of the shared tokenizer at each call,
which two threads must not do, and computes offsets and words of each token, which nobody reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, models

from engine.errors import InvalidFormat, panicked
from engine.text.vocabulary import BYTE_LEVEL

__all__ = ["PromptEncoder", "find_control_words"]

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters around the template's own control words, in a text that spells others."""

CHARACTERS_PER_TOKEN: Final = 64
"""Characters per token of context that are read at most, where a token may stand for any number of them."""

_CONTROL: Final = re.compile(r"[<\[{]?[|｜].*[|｜][>\]}]?|</?(s|bos|eos|pad|unk|mask)>", re.DOTALL)
_LONGEST: Final = 256  # characters of a control word
_SWITCH: Final = re.compile(r"/\w+")
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")
_PART: Final = 1 << 20  # bytes whose pairs are looked up at once
_PIECE: Final = 1 << 16  # characters that are normalised at once
_UNICODE_FORMS: Final = frozenset({"NFC", "NFD", "NFKC", "NFKD"})


def find_control_words(tokenizer: Any, sources: Iterable[str]) -> dict[str, int]:
    """Return the control words among a tokenizer's added tokens, with their ids.

    These are the special tokens, those written `<|…|>` or `</s>`, and those that occur in `sources`, the texts that
    write prompts. Others (white space, HTML tags) are text that happens to be one token, and so are switches that
    people write (`/nothink`). The list of a tokenizer that has one (`chat_control_tokens`) is used instead.
    """
    listed = getattr(tokenizer, "chat_control_tokens", None)
    text = "\0".join(sources)
    found: dict[str, int] = {}
    for token_id, token in tokenizer.backend_tokenizer.get_added_tokens_decoder().items():
        word = token.content
        if not 2 <= len(word) <= _LONGEST or word.isspace() or _SWITCH.fullmatch(word):
            continue
        written = word in listed if listed is not None else word in text or _CONTROL.fullmatch(word) is not None
        if token.special or written:
            found[word] = token_id
    return found


class PromptEncoder:
    """Encodes prompts with one tokenizer. Safe to use from several threads.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend.
        words: its control words (`find_control_words`).
    """

    def __init__(self, tokenizer: Any, words: Mapping[str, int]) -> None:
        backend = tokenizer.backend_tokenizer
        self._plain, self._apart = _Copy(backend), _Copy(backend, words)
        self._plain.backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
        unknown = getattr(tokenizer, "unk_token_id", None)  # what any text may become
        self._words = {word: token_id for word, token_id in words.items() if token_id != unknown}
        self._control = frozenset(self._words.values())
        self._least = _Least.of(backend)

    def at_least(self, text: str) -> int | None:
        """Return a lower bound on a text's tokens; None where a token may stand for any length of text."""
        return self._least.tokens(text) if self._least is not None else None

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Encode a text, with the tokens that the tokenizer adds around it if `special`.

        Raises:
            TypeError, UnicodeEncodeError: it is not valid Unicode.
            InvalidFormat: the tokenizer gives up on it.
        """
        return self._plain.encode(text, special=special)

    def encode_apart(self, text: str, own: Iterable[tuple[int, str]], mark: str) -> list[int]:
        """Encode a text in which only the control words at `own` are control, without the `mark`s in it.

        `own`: (position, word), ascending. The text must hold neither OPEN nor CLOSE.
        """
        pieces, at = [], 0
        for position, word in own:
            pieces += [text[at:position].replace(mark, ""), OPEN, word, CLOSE]
            at = position + len(word)
        pieces.append(text[at:].replace(mark, ""))
        return self._apart.encode("".join(pieces), special=False)

    def encode_with_places(self, text: str, *, special: bool) -> tuple[list[int], list[int]]:
        """Encode as `encode` does. Returns the ids, and for each token the characters of `text` before it.

        Tokens cover the text without gaps: one begins where those before it end. A token that adds nothing to the text
        (one that the tokenizer puts around it) has the place of the next one.

        Raises: as `encode`.
        """
        return self._plain.encode_with_places(text, special=special)

    def encode_as_text(self, text: str, param: str) -> list[int]:
        """Encode a text in which nothing is control, whatever it spells.

        Raises:
            InvalidFormat: the tokenizer cannot read a control word in it as text; names `param`.
            TypeError, UnicodeEncodeError: it is not valid Unicode.
        """
        apart = OPEN not in text and CLOSE not in text
        ids = self._apart.encode(text, special=False) if apart else []
        if not apart or not self.has_just(ids, ()):
            raise InvalidFormat(
                f"{param} holds the spelling of a control token of this model, which its tokenizer cannot read as "
                "text, or a noncharacter beside which it cannot; leave it out.",
                param=param,
            )
        return ids

    def beginning(self) -> list[int]:
        """Return the ids that the tokenizer puts before a text."""
        whole, plain = self.encode("a", special=True), self.encode("a", special=False)
        places = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
        return whole[: next(places, 0)]

    def has_just(self, ids: Iterable[int], own: Iterable[tuple[int, str]]) -> bool:
        """Return whether the control tokens in `ids` are exactly the words of `own`."""
        wanted = [self._words[word] for _, word in own if word in self._words]
        return [i for i in ids if i in self._control] == wanted


class _Copy:
    """A tokenizer that shares another's model and recognises the words in `apart` only between OPEN and CLOSE."""

    def __init__(self, original: Tokenizer, apart: Container[str] = ()) -> None:
        self.backend = Tokenizer(original.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor"):
            if (value := getattr(original, part)) is not None:
                setattr(self.backend, part, value)
        ids: dict[str, int] = {}
        for token_id, token in sorted(original.get_added_tokens_decoder().items()):
            name = f"{OPEN}{token.content}{CLOSE}" if token.content in apart else token.content
            added = AddedToken(
                name,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=token.special,
            )
            (self.backend.add_special_tokens if token.special else self.backend.add_tokens)([added])
            ids[name] = token_id
        numbers = {self.backend.token_to_id(name): token_id for name, token_id in ids.items()}
        self._original_ids = {here: there for here, there in numbers.items() if here != there}

    def encode(self, text: str, *, special: bool) -> list[int]:
        try:
            ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
        except BaseException as error:
            if panicked(error):  # after a number of steps that one of its expressions may take, for example
                raise InvalidFormat(f"the tokenizer of this model gives up on this text: {error}"[:300]) from None
            raise
        return [self._original_ids.get(i, i) for i in ids] if self._original_ids else ids

    def encode_with_places(self, text: str, *, special: bool) -> tuple[list[int], list[int]]:
        ids = self.encode(text, special=special)
        encoding = self.backend.encode_batch([text], add_special_tokens=special)[0]
        assert len(encoding.ids) == len(ids), "both encode alike"
        places: list[int] = []
        end = 0
        for start, stop in encoding.offsets:
            # The library leaves white space out of a token's span, and gives the parts of a character the same one.
            places.append(max(min(start, end) if stop > start else end, places[-1] if places else 0))
            end = max(end, stop)
        return ids, places


class _Least:
    """A lower bound on the number of tokens of a text, from the byte pairs inside tokens and the tokens' lengths.

    A token is a piece of the (normalised) text. A pair of bytes that is inside no token has a token's end between them.
    If no token with the byte b has more than L(b) bytes, the text has at least as many tokens as the sum of 1 / L(b).
    """

    def __init__(self, tokens: Iterable[bytes], *, swallowed: bool, spaces: bool, forms: Any) -> None:
        kept = [token for token in tokens if token]
        lengths = np.fromiter(map(len, kept), np.int64, len(kept))
        row = np.frombuffer(b"".join(kept), np.uint8)
        longest = np.ones(256, np.int64)
        np.maximum.at(longest, row, np.repeat(lengths, lengths))
        last = np.zeros(len(row), np.bool_)
        last[np.cumsum(lengths) - 1] = True
        pairs = row[:-1].astype(np.uint16) << 8 | row[1:]
        inside = np.zeros(1 << 16, np.bool_)
        inside[pairs[~last[:-1]]] = True
        self._weights: NDArray[np.float64] = 1.0 / longest
        ends = ~inside.reshape(256, 256)  # by first byte and second
        if swallowed:
            blank = np.frombuffer(b" \t\n\r\x0b\x0c", np.uint8)
            self._weights[blank] = 0.0
            ends[blank, :] = ends[:, blank] = False
        self._ends: NDArray[np.bool_] = ends.reshape(-1)
        self._swallowed = swallowed
        self._spaces = spaces
        self._forms = forms

    @classmethod
    def of(cls, backend: Tokenizer) -> _Least | None:
        """Read a tokenizer; None where a token can stand for any length of text, or for none."""
        normal, pre = _steps_of(backend)
        vocabulary = backend.get_vocab(with_added_tokens=False)
        byte_level = any(step["type"] == "ByteLevel" for step in pre)
        if byte_level:
            complete = all(chr(code) in vocabulary for code, byte in BYTE_LEVEL.items() if byte < 256)
            read = [token.translate(BYTE_LEVEL).encode("latin-1", "ignore") for token in vocabulary]
        else:
            complete = getattr(backend.model, "byte_fallback", False) and all(
                f"<0x{byte:02X}>" in vocabulary for byte in range(256)
            )
            read = [b"-" if _BYTE.fullmatch(token) else token.replace("▁", " ").encode() for token in vocabulary]
        if not complete or not all(map(_keeps, normal)) or not all(map(_keeps, pre)):
            return None
        added = backend.get_added_tokens_decoder().values()
        return cls(
            [*read, *(token.content.encode() for token in added)],
            swallowed=any(token.lstrip or token.rstrip for token in added),
            spaces=not byte_level,
            forms=backend.normalizer if any(step["type"] in _UNICODE_FORMS for step in normal) else None,
        )

    def tokens(self, text: str) -> int:
        cuts = 0
        if self._forms is not None and not text.isascii():  # in pieces, so that other threads have their turns
            pieces = [self._forms.normalize_str(text[at : at + _PIECE]) for at in range(0, len(text), _PIECE)]
            text, cuts = "".join(pieces), len(pieces) - 1
        if self._spaces:
            text = text.replace("▁", " ")
        if self._swallowed:
            text = re.sub(r"[^\S\x00-\x7f]", " ", text)
        row = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
        by_length = float(self._weights @ np.bincount(row, minlength=256))
        ends = 0
        for start in range(0, len(row) - 1, _PART):
            part = row[start : start + _PART + 1].astype(np.uint16)
            ends += int(np.count_nonzero(self._ends[part[:-1] << 8 | part[1:]]))
        # Slightly less: the sum is rounded millions of times, and a cut may split a character.
        return max(0, max(int(by_length * (1 - 1e-9)), ends) - 8 * cuts)


def _flat(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return [step for each in part[inner] for step in _flat(each, inner)] if part["type"] == "Sequence" else [part]


def _keeps(step: Mapping[str, Any]) -> bool:
    """Whether a step of a tokenizer keeps each byte of a text in some token."""
    match step:
        case {"type": "ByteLevel" | "Digits" | "Prepend" | "NFC" | "NFD" | "NFKC" | "NFKD"}:
            return True
        case {"type": "Metaspace", "replacement": "▁"}:
            return True
        case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            return True
        case {"type": "Split" | "Punctuation", "behavior": behavior}:
            return bool(behavior != "Removed")
    return False


def _steps_of(backend: Tokenizer) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The steps of a tokenizer before its model: normalisation, and the cut into words."""
    shell = Tokenizer(models.BPE())  # to write the model itself as JSON may take a second
    for part in ("normalizer", "pre_tokenizer"):
        if (value := getattr(backend, part)) is not None:
            setattr(shell, part, value)
    parts = json.loads(shell.to_str())
    return _flat(parts["normalizer"], "normalizers"), _flat(parts["pre_tokenizer"], "pretokenizers")
