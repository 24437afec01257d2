"""`Speller`: finds tokens whose bytes are exactly those of a text. Knows no model, no grammar.

A tokenizer may read another text than it is given: SentencePiece puts a space before the first word, normalizers
compose or lower letters, an added token swallows the space beside it. What a grammar forces is spelled to the byte:

    as the tokenizer encodes it ──▶ as it encodes it behind a marker ──▶ by the longest tokens ──▶ by the fewest
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Sequence
from typing import Final

from engine.errors import panicked

__all__ = ["Speller"]

_MARKERS: Final = ("\ufdd0", "a")
"""What is put before a text so that it is no beginning: a noncharacter, which no token joins with anything, and a
letter for tokenizers that drop or reject that. Their tokens are taken off again."""
_LONG: Final = 4096  # characters of a text from which it is long
_SHORT_KEPT: Final = 256
_LONG_KEPT: Final = 8
"""Texts whose spelling is remembered. All choices of a request force the same texts, and a text of 250,000 characters
takes up to half a second."""


class Speller:
    """Spells texts in one vocabulary. A text always has the same spelling. Safe to use from several threads.

    Args:
        tokens: the bytes of each id. Those of a special token begin with 0xff, which is in no text.
        encode: text → ids without special tokens; None where there is no tokenizer.
        longest: text → ids, at each place the longest token. It may lead into a dead end.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        encode: Callable[[str], list[int]] | None,
        longest: Callable[[str], list[int]],
    ) -> None:
        self._tokens = tokens
        self._encode = encode
        self._longest = longest
        self.complete = len({token for token in tokens if len(token) == 1}) == 256
        """Whether there is a token for each byte, so that every text can be spelled."""
        self._most = max(map(len, tokens), default=0)
        self._ids: dict[bytes, int] | None = None  # by bytes; made when it is needed, which is seldom
        self._short = functools.lru_cache(_SHORT_KEPT)(self._kept)
        self._long = functools.lru_cache(_LONG_KEPT)(self._kept)

    def spell(self, text: str) -> list[int] | None:
        """Return ids whose bytes are those of a text; None if there are none. The last texts are remembered."""
        kept = (self._long if len(text) >= _LONG else self._short)(text)
        return None if kept is None else kept.tolist()

    def _kept(self, text: str) -> array[int] | None:
        ids = self._spell(text)
        return None if ids is None else array("i", ids)

    def _spell(self, text: str) -> list[int] | None:
        data = text.encode()
        ids = self._encoded(text, data)
        if ids is None:
            ids = self._longest(text)
        return ids if self._bytes(ids) == data else self._fewest(data)

    def can_spell(self, data: bytes) -> bool:
        """Return whether there are ids whose bytes are these."""
        return self.complete or self._fewest(data) is not None

    def _encoded(self, text: str, data: bytes) -> list[int] | None:
        """Encode a text, by itself or behind a marker. None if each time it becomes another text."""
        if self._encode is None:
            return None
        ids = self._try(self._encode, text)
        if self._bytes(ids) == data:
            return ids
        for marker in _MARKERS:
            ids = self._end(self._try(self._encode, marker + text), len(data))
            if self._bytes(ids) == data:
                return ids
        return None

    def _try(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        """Encode a text; no ids if the tokenizer gives up on it, or has tokens that the model has not."""
        try:
            ids = encode(text)
        except BaseException as error:
            if isinstance(error, Exception) or panicked(error):
                return []
            raise
        return ids if max(ids, default=0) < len(self._tokens) else []

    def _end(self, ids: list[int], size: int) -> list[int]:
        """Return the last ids, as many as have so many bytes or more."""
        at = len(ids)
        while at and size > 0:
            at -= 1
            size -= len(self._tokens[ids[at]])
        return ids[at:]

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._tokens[i] for i in ids)

    def _fewest(self, data: bytes) -> list[int] | None:
        """Return the fewest ids with these bytes; None if there are none."""
        if self._ids is None:
            self._ids = {token: i for i, token in reversed([*enumerate(self._tokens)])}
        counts: list[int | None] = [0, *[None] * len(data)]  # ids for so many bytes
        last = [0] * len(counts)  # the last of them
        for start, count in enumerate(counts):
            for end in range(start + 1, min(start + self._most, len(data)) + 1) if count is not None else ():
                token = self._ids.get(data[start:end])
                if token is not None and count is not None and ((so_far := counts[end]) is None or so_far > count + 1):
                    counts[end], last[end] = count + 1, token
        if counts[-1] is None:
            return None
        ids: list[int] = []
        at = len(data)
        while at:
            ids.append(last[at])
            at -= len(self._tokens[last[at]])
        return ids[::-1]
