"""`TokenTable`: a vocabulary as llguidance reads it. Plain data; no torch, no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from llguidance import LLTokenizer, TokenizerWrapper

from engine.text.vocabulary import Vocabulary

__all__ = ["TokenTable"]

_SLICES: Final = (
    r"[\x20\x0A\x0D\x09]+", r'[^"\\\x00-\x1F\x7F<]{1,10}', r'[^"\\\x00-\x1F\x7F<]{1,30}',
    r'[^"\\\x00-\x1F\x7F]{1,10}', r'[^"\\\x00-\x1F\x7F]{1,30}', r'[^"\\\x00-\x1F\x7F]+',
)  # fmt: skip
"""Kinds of tokens that a mask takes or leaves as one: llguidance's own, and those of text that cannot begin a tag."""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The bytes of each token, and which tokens are special or end a reply."""

    tokens: list[bytes]
    """By id. A special token has a byte before its name that no text has."""
    special: list[int]
    """Ids that stand for no text."""
    names: dict[str, int]
    """Ids of special tokens by name."""
    ends: list[int]
    """Ids that end a reply."""

    @classmethod
    def of(cls, vocabulary: Vocabulary, vocab_size: int, names: Mapping[str, int], ends: Sequence[int]) -> TokenTable:
        """Read a vocabulary. `vocab_size`: columns of the model's logits, which may be more than it has tokens."""
        tokens, special = [], []
        for i in range(vocab_size):
            if i < vocabulary.size and vocabulary.is_text(i):
                tokens.append(vocabulary.token_bytes(i))
            else:
                # 0xff is in no UTF-8 text: how llguidance tells the name of a special token from the same letters.
                name = vocabulary.token_text(i) if i in vocabulary.special_ids else f"<|no token {i}|>"
                tokens.append(b"\xff" + name.encode())
                special.append(i)
        return cls(tokens, special, dict(names), list(ends))

    def tokenizer(self, encode: Callable[[str], list[int]]) -> LLTokenizer:
        """Build llguidance's tokenizer. `encode`: text → ids without special tokens."""
        wrapper = TokenizerWrapper(_Tokens(self.tokens, self.special, self.ends[0], encode))
        return LLTokenizer(wrapper, n_vocab=len(self.tokens), eos_token=self.ends, slices=list(_SLICES))

    def as_json(self) -> dict[str, Any]:
        """Write the tokens as one long string and their lengths, which is parsed in a hundredth of a second."""
        return {
            "bytes": b"".join(self.tokens).decode("latin-1"),
            "lengths": [*map(len, self.tokens)],
            "special": self.special,
            "names": self.names,
            "ends": self.ends,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TokenTable:
        """Read what `as_json` wrote."""
        data, tokens, start = value["bytes"].encode("latin-1"), [], 0
        for length in value["lengths"]:
            tokens.append(data[start : start + length])
            start += length
        return cls(tokens, value["special"], value["names"], value["ends"])


class _Tokens:
    """The interface that llguidance requires of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], end: int, encode: Callable[[str], list[int]]) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = end
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))
