"""How a model writes its thoughts, and how they are separated from its answer. No tokens, no torch.

find_reasoning_format    chat template → `ReasoningFormat`, from a rendered turn with known thoughts or from its source
Splitter                 separates the thoughts in the text of one choice from the answer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.errors import InvalidParameter, TemplateRefused
from engine.replies.delimiters import overlap, shared
from engine.templates.chat_template import ChatTemplate
from engine.types.messages import ChatMessage

__all__ = ["EFFORTS", "ReasoningFormat", "Splitter", "find_reasoning_format", "template_variables"]

EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh")

_DELIMITERS: Final = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""Common delimiters, for templates that do not render thoughts. Both must occur in the source."""

_SWITCHES: Final = ("enable_thinking", "thinking")
_LEVELS: Final[Mapping[str, str]] = {
    "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high",
}  # fmt: skip
"""reasoning_effort → the value for templates that have a variable of that name."""

_THOUGHT: Final = "Zweifel"  # no template writes this word
_REPLY: Final = "Antwort"


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The delimiters of a model's thoughts."""

    open: str
    """The text before the thoughts, without white space around it."""
    close: str
    """The text after them, without white space around it."""
    closing: str
    """All that the template writes between the thoughts and the answer, white space included."""
    answer_open: str = ""
    """The text before an answer without thoughts; often none."""
    resume: str = ""
    """The text between the end of the thoughts and an answer or a call, if the thoughts are a turn of their own."""
    asides: tuple[str, ...] = ()
    """The openings of other turns that such a model may write before its answer. They close as thoughts do."""


def find_reasoning_format(template: ChatTemplate) -> ReasoningFormat | None:
    """Derive how a model writes thoughts from its chat template; None if the template does not support them."""
    if template.source is None:
        return None
    found = _probe(template)
    if found is not None:
        return found
    for open_, close in _DELIMITERS:
        if close in template.source and open_ in template.source:
            return ReasoningFormat(open_, close, f"\n{close}\n\n")
    return None


def _probe(template: ChatTemplate) -> ReasoningFormat | None:
    """Render an answer with thoughts and one without; the difference gives the delimiters."""
    user = ChatMessage("user", "Frage")
    try:
        prompt = template.render([user])
        thoughtful = template.render([user, ChatMessage("assistant", _REPLY, reasoning_content=_THOUGHT)], again=False)
        plain = template.render([user, ChatMessage("assistant", _REPLY)], again=False)
    except TemplateRefused:
        return None
    begin, end = thoughtful.find(_THOUGHT), thoughtful.rfind(_REPLY)
    if begin < 0 or end < begin or thoughtful.count(_THOUGHT) != 1:
        return None
    # The prompt may open thoughts, and a template may write empty ones before an answer without them; not both.
    start = min(shared(thoughtful[:begin], prompt), shared(thoughtful[:begin], plain))
    open_ = thoughtful[start:begin].strip()
    closing = thoughtful[begin + len(_THOUGHT) : end]
    if not open_ or not closing.strip():
        return None
    answer = plain[min(start, shared(plain, prompt)) : plain.rfind(_REPLY)].strip()
    close = closing.strip()
    return ReasoningFormat(open_, close, closing, "" if open_ in answer or close in answer else answer)


def template_variables(template: ChatTemplate, found: ReasoningFormat | None, effort: str) -> dict[str, Any] | None:
    """Translate `reasoning_effort` into variables of a chat template; None if it has no variable for it.

    Raises:
        InvalidParameter: not an effort; or `none` for a model that always thinks.
    """
    if effort not in EFFORTS:
        raise InvalidParameter(
            f"reasoning_effort must be one of {', '.join(EFFORTS)}, not {effort[:100]!r}.", param="reasoning_effort"
        )
    known = template.variables
    chosen: dict[str, Any] = {name: effort not in ("none", "minimal") for name in _SWITCHES if name in known}
    if "reasoning_effort" in known and effort in _LEVELS:
        chosen["reasoning_effort"] = _LEVELS[effort]
    if not chosen and effort == "none" and found is not None:
        raise InvalidParameter(
            "reasoning_effort: this model always thinks; its template has no switch for none.", param="reasoning_effort"
        )
    return chosen or None


class Splitter:
    """Separates thoughts from the answer in text that arrives in pieces. Thoughts can only precede the answer.

    White space beside the delimiters is dropped. The joined parts do not depend on how the text was cut.

    Args:
        found: how the model writes thoughts.
        opened: whether the prompt ends inside the thoughts.
    """

    __slots__ = ("_format", "_held", "_state", "inside")

    def __init__(self, found: ReasoningFormat, *, opened: bool) -> None:
        self._format = found
        self._held = ""
        self._state = "open" if opened else "start"
        self.inside = opened
        """Whether the text so far ends inside the thoughts."""

    @property
    def held(self) -> tuple[str, str]:
        """The text that is held back, of the thoughts and of the answer. White space that is dropped is not."""
        return self._held if self._state == "thoughts" else "", self._held if self._state == "start" else ""

    def push(self, text: str) -> tuple[str, str]:
        """Take a piece of text; return what it adds to the thoughts and to the answer."""
        if self._state == "answer":
            return "", text
        self._held += text
        thoughts = ""
        if self._state == "start":
            self._begin()
        if self._state == "open":  # nothing but white space so far
            self._held = self._held.lstrip()
            if self._held:
                self._state = "thoughts"
        if self._state == "thoughts":
            thoughts = self._think()
        if self._state == "closed":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "answer"
        if self._state == "answer":
            answer, self._held = self._held, ""
            return thoughts, answer
        return thoughts, ""

    def finish(self, *, cut: bool = False) -> tuple[str, str]:
        """End the reply; return what was held back.

        `cut`: the reply was ended by a limit; then what may be the beginning of a delimiter is left out.
        """
        held, self._held = self._held, ""
        if cut and held.strip():  # nothing else is held back but white space
            return "", ""
        if self._state == "thoughts":
            return held.rstrip(), ""
        return "", held if self._state == "start" else ""

    def _begin(self) -> None:
        """Decide whether the text begins with thoughts, once that is certain."""
        text = self._held.lstrip()
        for delimiter, state in ((self._format.open, "open"), (self._format.answer_open, "closed")):
            if delimiter and text.startswith(delimiter):
                self._held, self._state = text[len(delimiter) :], state
                self.inside = state == "open"
                return
        if not any(d.startswith(text) for d in (self._format.open, self._format.answer_open) if d):
            self._state = "answer"

    def _think(self) -> str:
        close = self._format.close
        end = self._held.find(close)
        if end >= 0:
            thoughts, self._held = self._held[:end].rstrip(), self._held[end + len(close) :]
            self._state, self.inside = "closed", False
            return thoughts
        # Held back: the beginning of the delimiter, and the white space before it or at the end.
        thoughts = self._held[: len(self._held) - overlap(self._held, close)].rstrip()
        self._held = self._held[len(thoughts) :]
        return thoughts
