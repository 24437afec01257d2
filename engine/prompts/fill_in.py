"""Prompts with a gap: the text before it and the text after it, in the form that code models were trained on.

The form is known by the tokens in a tokenizer, never by a model's name. Knows no model, no limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from engine.errors import InvalidFormat
from engine.prompts.prompt_encoder import PromptEncoder

__all__ = ["FILL_IN_FORMS", "FillInForm", "encode_fill_in", "find_fill_in_form"]

_ANCHOR: Final = "☺"
"""A character put before a text so that it is not encoded as the beginning of one; its tokens are taken off again."""


@dataclass(frozen=True, slots=True)
class FillInForm:
    """The control tokens of one family, and their order.

    Attributes:
        before: the token before the text that precedes the gap.
        after: the token before the text that follows the gap.
        gap: the token after which the model writes; empty where there is none.
        after_first: whether the text that follows the gap comes first in the prompt.
        ends: tokens with which the family's models end the filling, beside the end tokens of the checkpoint.
        families: models that are known to use it.
    """

    before: str
    after: str
    gap: str
    after_first: bool = False
    ends: tuple[str, ...] = ()
    families: str = ""

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens that a vocabulary must have."""
        return tuple(token for token in (self.before, self.after, self.gap) if token)


FILL_IN_FORMS: Final = (
    FillInForm(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ends=("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<|file_separator|>"),
        families="Qwen2.5-Coder, Qwen3, CodeGemma, Granite 4",
    ),
    FillInForm(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        ends=("<|endoftext|>", "<fim_pad>", "<file_sep>", "<filename>"),
        families="StarCoder, StarCoder2, Granite Code",
    ),
    FillInForm("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ends=("<|endoftext|>",), families="SantaCoder"),
    FillInForm("▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",), families="CodeLlama"),
    FillInForm("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", families="DeepSeek-Coder"),
    FillInForm("[PREFIX]", "[SUFFIX]", "", after_first=True, families="Codestral"),
)
"""The forms that are known. The order of their tokens is that of the models' own documentation."""


def find_fill_in_form(words: Mapping[str, int]) -> FillInForm | None:
    """Return the form whose tokens are among a tokenizer's control words; None if there is none."""
    return next((form for form in FILL_IN_FORMS if all(token in words for token in form.tokens)), None)


def encode_fill_in(
    encoder: PromptEncoder,
    form: FillInForm,
    words: Mapping[str, int],
    prefix: str,
    suffix: str,
    *,
    special: bool,
    field: str,
) -> list[int]:
    """Encode a prompt with a gap. What the two texts spell stays text.

    Args:
        words: the tokenizer's control words.
        field: the name of `prefix` in error messages.
        special: whether the prompt begins as the tokenizer begins a text (with `<s>`, for example).

    Raises:
        InvalidFormat: a text spells a control token that the tokenizer cannot read as text.
        TypeError, UnicodeEncodeError: see `PromptEncoder.encode`.
    """
    before = [words[form.before], *encoder.encode_as_text(prefix, field)]
    after = [words[form.after], *_continued(encoder, suffix)]
    gap = [words[form.gap]] if form.gap else []
    parts = [after, before] if form.after_first else [before, after]
    return [*(encoder.beginning() if special else ()), *parts[0], *parts[1], *gap]


def _continued(encoder: PromptEncoder, text: str) -> list[int]:
    """Encode a text without the space that some tokenizers put before the first word."""
    if not text:
        return []
    anchor = encoder.encode_as_text(_ANCHOR, "suffix")
    ids = encoder.encode_as_text(_ANCHOR + text, "suffix")
    if ids[: len(anchor)] == anchor:
        return ids[len(anchor) :]
    raise InvalidFormat("suffix begins with text that this model's tokenizer cannot set apart.", param="suffix")
