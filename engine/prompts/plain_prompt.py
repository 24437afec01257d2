"""`PlainPrompts`: prompts that no chat template renders, as tokens and as text. Knows no limits, no sampling.

Such a prompt is the caller's own: control words that it spells are control tokens. Only in a prompt with a `suffix`,
whose control tokens are put in here, all text stays text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import InvalidParameter, Unsupported
from engine.prompts.fill_in import encode_fill_in, find_fill_in_form
from engine.prompts.prompt_encoder import PromptEncoder
from engine.text.vocabulary import Detokenizer, Vocabulary
from engine.types.requests import EchoedPrompt

__all__ = ["PlainPrompts"]


class PlainPrompts:
    """Encodes and decodes the plain prompts of one model. Holds no state; safe to use from several threads.

    Args:
        tokenizer: a transformers tokenizer.
        words: its control words (`find_control_words`).
    """

    def __init__(
        self, tokenizer: Any, vocabulary: Vocabulary, encoder: PromptEncoder, words: Mapping[str, int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._words = words
        self._form = find_fill_in_form(words)
        ends = self._form.ends if self._form is not None else ()
        self.fill_in_ends = tuple(sorted(words[end] for end in ends if end in words))
        """The tokens that end what fills a gap."""

    @property
    def fills_in(self) -> bool:
        """Whether the tokenizer has tokens for prompts with a `suffix`."""
        return self._form is not None

    def encode(
        self, text: str, suffix: str | None, *, special: bool, echo: bool, field: str
    ) -> tuple[list[int], EchoedPrompt | None]:
        """Encode a text, with the tokens that the tokenizer puts around one if `special`.

        `field`: the name of the text in error messages.

        Raises:
            Unsupported: there is a `suffix`, and the tokenizer has no tokens for it.
            InvalidParameter: there is a `suffix`, and the prompt is to be echoed.
            InvalidFormat, TypeError, UnicodeEncodeError: see `PromptEncoder.encode`.
        """
        if suffix is not None:
            if self._form is None:
                raise Unsupported(
                    "suffix: this model's tokenizer has no tokens for filling in the middle.", param="suffix"
                )
            if echo:
                raise InvalidParameter("echo and suffix cannot be combined.", param="suffix")
            return encode_fill_in(
                self._encoder, self._form, self._words, text, suffix, special=special, field=field
            ), None
        if not echo:
            return self._encoder.encode(text, special=special), None
        ids, places = self._encoder.encode_with_places(text, special=special)
        return ids, EchoedPrompt(text, self._named(ids), tuple(places))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens. Special tokens are written as their names."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def echo(self, ids: Sequence[int]) -> EchoedPrompt:
        """Return the text of a prompt that was given as tokens."""
        text, places, end = self.decode(ids), [], 0
        stream = Detokenizer(self._vocabulary)
        for token in ids:
            places.append(min(end, len(text)))
            if token in self._vocabulary.special_ids:
                shown, stream = (
                    stream.flush() + self._vocabulary.token_text(token),
                    Detokenizer(self._vocabulary, token),
                )
            else:
                shown, _ = stream.push(token)
            end += len(shown)
        return EchoedPrompt(text, self._named(ids), tuple(places))

    def last_text(self, ids: Sequence[int]) -> int | None:
        """Return the last token of text; None if there is none."""
        return next((token for token in reversed(ids) if self._vocabulary.is_text(token)), None)

    def _named(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Return each token's text at its place, as log-probabilities write it."""
        stream, named = Detokenizer(self._vocabulary), []
        for token in ids:
            named.append(self._vocabulary.token_text(token, stream.token_bytes(token)))
            stream.push(token)
        return tuple(named)
