"""`TextLimit`: refuse a prompt's text that is too long before it is encoded, and what the tokenizer cannot read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from engine.errors import ContextLengthExceeded, InvalidFormat
from engine.host_memory import give_back_memory
from engine.prompts.prompt_encoder import CHARACTERS_PER_TOKEN, PromptEncoder

__all__ = ["TextLimit"]

_SHORT: Final = 1 << 17
"""Prompts of up to this many characters are always counted in full: the exact number of tokens helps a client."""

_LONG: Final = 1 << 20
"""Longer prompts, in characters, take so much memory to encode that it is given back at once."""


class TextLimit:
    """What one model's context says about texts that are not encoded yet. `context_length`: in tokens."""

    def __init__(self, encoder: PromptEncoder, context_length: int) -> None:
        self._encoder = encoder
        self._context_length = context_length

    @contextlib.contextmanager
    def reading(self, text: str, param: str) -> Iterator[None]:
        """Refuse a text that is too long before it is encoded; give memory back after a long one.

        Raises:
            ContextLengthExceeded: it has more tokens than the context holds, or more characters than are read for it.
            InvalidFormat: it is not valid Unicode. Errors inside that name no field name `param`.
        """
        limit = self._context_length
        least = self._encoder.at_least(text) if len(text) > _SHORT else 0
        if least is not None and least >= limit:
            raise ContextLengthExceeded(
                f"the prompt has at least {least} tokens; this model's context holds {limit}, one of them for the "
                "answer.",
                param=param,
                prompt_tokens=least,
                context_length=limit,
            )
        if least is None and len(text) > (most := limit * CHARACTERS_PER_TOKEN):
            raise ContextLengthExceeded(
                f"the prompt has {len(text)} characters; this model's context holds {limit} tokens, and at most "
                f"{most} characters are read for it.",
                param=param,
                context_length=limit,
            )
        try:
            yield
        except (UnicodeEncodeError, TypeError):
            raise InvalidFormat(f"{param} holds text that is not valid Unicode.", param=param) from None
        except InvalidFormat as error:
            error.param = error.param or param
            raise
        finally:
            if len(text) > _LONG:
                give_back_memory()
