"""Replies that are begun by their caller: what the model would have written so far, as text. No tokens, no torch.

A chat template is for turns that have ended: it trims an assistant's last message, drops its thoughts, or refuses it.
So the message is not rendered. The prompt is the one that the reply would have had, and the beginning of the reply is
put behind it, with what the model writes around its thoughts. `find_reply_form` reads that off the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine.errors import InvalidParameter, TemplateRefused, Unsupported
from engine.replies.delimiters import shared
from engine.replies.reasoning import ReasoningFormat
from engine.templates.chat_template import ChatTemplate
from engine.types.messages import ChatMessage
from engine.types.requests import GenerationRequest

__all__ = ["Beginning", "ReplyForm", "find_reply_form", "message_to_continue"]

_USER: Final = ChatMessage("user", "Frage")
_REPLY: Final = "Antwort"
_THOUGHT: Final = "Zweifel"  # no template writes these words


@dataclass(frozen=True, slots=True)
class Beginning:
    """The beginning of a reply. `thoughts` and `content` are the request's; the rest is what the model writes around.

    Attributes:
        opening: before the thoughts, or before an answer without any.
        between: between the thoughts and the answer.
    """

    opening: str
    thoughts: str
    between: str
    content: str

    @property
    def text(self) -> str:
        return f"{self.opening}{self.thoughts}{self.between}{self.content}"


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """What a model writes before and after the parts of a reply, white space included.

    Attributes:
        reasoning: the delimiters of its thoughts; None if it has none.
        answer: before an answer without thoughts. Most often nothing.
        thoughts: before thoughts that the prompt has not opened.
        between: between thoughts and the answer.
    """

    reasoning: ReasoningFormat | None = None
    answer: str = ""
    thoughts: str = ""
    between: str = ""

    def beginning(self, message: ChatMessage, prompt: str, at: str) -> Beginning:
        """Write the beginning of the reply that a message holds, behind a prompt; empty if it holds nothing.

        Args:
            at: the message's name in errors.

        Raises:
            Unsupported: it holds thoughts, and it is not known how the model writes them.
            InvalidParameter: it holds thoughts, and the prompt has closed them.
        """
        thoughts, content, found = message.reasoning_content or "", message.content or "", self.reasoning
        end = prompt.rstrip()
        if not thoughts:
            if not content:
                return Beginning("", "", "", "")
            opened = found is not None and end.endswith(found.open)
            return Beginning("" if opened else self.answer, "", self.between if opened else "", content)
        at = f"{at}.reasoning_content"
        if found is None:
            raise Unsupported(f"{at}: this model does not think, so there are no thoughts to go on from.", param=at)
        if end.endswith(found.close):
            raise InvalidParameter(
                f"{at}: thinking is switched off in this request, so the reply cannot go on from thoughts.", param=at
            )
        opening = "" if end.endswith(found.open) else self.thoughts
        return Beginning(opening, thoughts, self.between if content else "", content)


def find_reply_form(template: ChatTemplate, reasoning: ReasoningFormat | None) -> ReplyForm:
    """Read off a template what it writes before an answer and around thoughts.

    Empty thoughts before an answer without any (Qwen3) are left out: the model need not write them. A template that
    shows no earlier thoughts leaves the common form: the delimiters on lines of their own.
    """
    known = ReplyForm()
    if reasoning is not None:
        known = ReplyForm(
            reasoning, reasoning.answer_open, f"{reasoning.open}\n", reasoning.closing + reasoning.answer_open
        )
    try:
        prompt = template.render([_USER])
    except TemplateRefused:
        return known
    answer = _before(template, prompt, ChatMessage("assistant", _REPLY), _REPLY)
    if answer is None or (reasoning is not None and (reasoning.open in answer or reasoning.close in answer)):
        answer = known.answer
    if reasoning is None:
        return ReplyForm(answer=answer)
    thinker = ChatMessage("assistant", _REPLY, reasoning_content=_THOUGHT)
    opening = _before(template, prompt, thinker, _THOUGHT)
    if opening is None or not opening.strip().endswith(reasoning.open):
        opening = reasoning.open if prompt.rstrip().endswith(reasoning.open) else known.thoughts
    whole = _rendered(template, thinker)
    begin, end = whole.find(_THOUGHT), whole.rfind(_REPLY)
    between = whole[begin + len(_THOUGHT) : end] if 0 <= begin < end else known.between
    return ReplyForm(reasoning, answer, opening, between if reasoning.close in between else known.between)


def message_to_continue(request: GenerationRequest) -> ChatMessage:
    """Return the message from which the reply goes on: the last one.

    Raises:
        InvalidParameter: it is not the assistant's, holds calls, or is the only one; or there are no messages.
    """
    messages: Sequence[ChatMessage] = request.messages or ()
    if not messages:
        raise InvalidParameter("continue_final_message needs messages.", param="continue_final_message")
    at, last = f"messages.{len(messages) - 1}", messages[-1]
    if last.role != "assistant":
        raise InvalidParameter(
            f"{at}.role: with continue_final_message the last message must be the assistant's, not {last.role!r}.",
            param=f"{at}.role",
        )
    if last.tool_calls:
        raise InvalidParameter(
            f"{at}.tool_calls: with continue_final_message the last message must hold no calls, which have ended.",
            param=f"{at}.tool_calls",
        )
    if len(messages) == 1:
        raise InvalidParameter(
            "messages: with continue_final_message there must be a message before the assistant's.", param="messages"
        )
    return last


def _before(template: ChatTemplate, prompt: str, message: ChatMessage, word: str) -> str | None:
    """Return what the template writes between the prompt and a word of the reply; None if it writes another prompt."""
    whole = _rendered(template, message)
    at = whole.rfind(word)
    if at < len(prompt) or shared(whole, prompt) < len(prompt):
        return None
    return whole[len(prompt) : at]


def _rendered(template: ChatTemplate, message: ChatMessage) -> str:
    """Render a turn that has ended; nothing if the template refuses it."""
    try:
        return template.render([_USER, message], again=False)
    except TemplateRefused:
        return ""
