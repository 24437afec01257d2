"""`ChatPrompts`: renders messages and tools with a model's chat template, and encodes the prompt into token ids.

Content never becomes a control token. Knows templates, chat formats and control words; no limits, no sampling.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidFormat, TemplateRefused
from engine.grammar.compiler import GrammarCompiler
from engine.prompts.content_guard import ContentGuard, ControlWords, Conversation, Marked
from engine.prompts.going_on import Beginning, find_reply_form
from engine.prompts.prompt_encoder import CLOSE, OPEN, PromptEncoder, find_control_words
from engine.prompts.system_turns import lost_roles, with_late_turns_as_users
from engine.prompts.tool_messages import generic_messages, one_call_a_turn, with_written_calls
from engine.replies.chat_format import ChatFormat
from engine.replies.tool_format import CALL_ID, GENERIC, ToolFormat
from engine.templates.chat_template import ChatTemplate
from engine.types.messages import ChatMessage
from engine.types.requests import GenerationRequest
from engine.types.tools import Tool

__all__ = ["ChatPrompts", "Encoded", "control_words"]

_RESULTS = "<tool_response></tool_response>"
"""The tags that `generic_messages` writes around results."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt's token ids and its text."""

    ids: list[int]
    shown: str
    """The text, with `mark` inside each control word that the request spells."""
    mark: str = ""


def control_words(
    tokenizer: Any, template: ChatTemplate, chat_format: ChatFormat
) -> tuple[dict[str, int], frozenset[str]]:
    """Return a model's control words with their ids, and those of them that an assistant's text may contain as such.

    The latter are the delimiters of thoughts, and those of calls that are no special tokens: templates split by them
    what clients send back.
    """
    forms = [
        _written(form) for form in (chat_format.tool_format, chat_format.template_format, GENERIC) if form is not None
    ]
    own = template.source, template.tool_use.source if template.tool_use else None
    words = find_control_words(tokenizer, [*(text or "" for text in own), *forms, _RESULTS])
    special = {t.content for t in tokenizer.backend_tokenizer.get_added_tokens_decoder().values() if t.special}
    kept = {word for word in words if word not in special and chat_format.mentions(word, calls=True)}
    if chat_format.reasoning is not None:
        kept |= {chat_format.reasoning.open, chat_format.reasoning.close} & words.keys()
    return words, frozenset(kept)


class ChatPrompts:
    """Renders and encodes conversations for one model. Holds no state; safe to use from several threads."""

    def __init__(
        self, template: ChatTemplate, chat_format: ChatFormat, encoder: PromptEncoder, words: ControlWords | None
    ) -> None:
        """`words`: the control words that content must not become; None to allow it."""
        self._template = template
        self._chat_format = chat_format
        self._encoder = encoder
        self._words = words
        self._guard = ContentGuard(words) if words is not None else None
        self._forms = {
            tools: find_reply_form(template.serving(tools=tools), chat_format.reasoning) for tools in (False, True)
        }
        self._lost = {tools: lost_roles(template.serving(tools=tools), tools=tools) for tools in (False, True)}

    def conversation(self, request: GenerationRequest, variables: Mapping[str, Any]) -> Conversation:
        """Collect what the template renders of a request with messages."""
        messages: Sequence[ChatMessage] = request.messages or ()
        if lost := self._lost[bool(request.tools)]:
            messages = with_late_turns_as_users(messages, lost)
        form = self._chat_format.template_format
        if self._by_template(request.tools) and form is not None and CALL_ID in form.close:
            messages = [_with_short_ids(message) for message in messages]
        return Conversation(
            tuple(messages), request.tools, variables, request.clock, again=request.add_generation_prompt
        )

    def beginning(self, tools: Sequence[Tool], message: ChatMessage, prompt: Encoded, at: str) -> Beginning:
        """Write an assistant's message as the beginning of the reply behind a prompt.

        Raises: as `ReplyForm.beginning`, in whose errors the message is called `at`.
        """
        return self._forms[bool(tools)].beginning(message, prompt.shown, at)

    def render(self, conversation: Conversation) -> str:
        """Render the prompt's text.

        Raises: what `ChatTemplate.render` raises.
        """
        prompt = self._rendered(conversation)
        return prompt if conversation.reply is None else prompt + conversation.reply.text

    def _rendered(self, conversation: Conversation) -> str:
        messages: Sequence[ChatMessage] = conversation.messages
        tools, variables = list(conversation.tools), conversation.variables
        clock, again = conversation.clock, conversation.again
        if self._by_template(tools):
            form = self._chat_format.template_format
            if form is not None and form.between is None:
                messages = one_call_a_turn(messages)
            if form is not None and not self._chat_format.writes_calls:
                messages = with_written_calls(messages, form)
            return self._template.render(messages, variables, again=again, tools=tools, clock=clock)
        if not tools and not any(m.tool_calls or m.role == "tool" for m in messages):
            return self._template.render(messages, variables, again=again, clock=clock)
        generic = functools.partial(generic_messages, messages, tools)
        try:
            return self._template.render(generic(system=True), variables, again=again, clock=clock)
        except TemplateRefused:  # it may know no system turn
            return self._template.render(generic(system=False), variables, again=again, clock=clock)

    def encode(self, conversation: Conversation, text: str) -> Encoded:
        """Encode a rendered conversation, so that control words that the request spells become text.

        Where no part of the request could be part of a control word, the result is the plain encoding of `text`.

        Raises:
            InvalidFormat: the tokenizer or the template makes it impossible to tell content from control.
            TypeError, UnicodeEncodeError: see `PromptEncoder.encode`.
        """
        marked = self._guard.mark(conversation, text) if self._guard is not None else None
        if marked is None or self._words is None:
            return Encoded(self._encoder.encode(text, special=False), text)
        own, shown = self._words.find(text), self._shown(marked, text)
        told = self._words.find(shown) if shown is not None else []
        if shown is None:
            as_it_is = not marked.spelled
        elif shown.replace(marked.mark, "") == text:
            as_it_is = _in_plain(told, shown, marked.mark) == own
        else:  # the marks changed what the template chose: allowed, if no control word was spelled
            as_it_is = not marked.spelled and [word for _, word in told] == [word for _, word in own]
        if as_it_is:
            ids = self._encoder.encode(text, special=False)
            if self._encoder.has_just(ids, own):
                return Encoded(ids, text)
        if shown is None or OPEN in shown or CLOSE in shown:
            raise self._refusal("beside a noncharacter, or in a template that changes or refuses it")
        ids = self._encoder.encode_apart(shown, told, marked.mark)
        if not self._encoder.has_just(ids, told):
            raise self._refusal("which its tokenizer cannot read as text")
        return Encoded(ids, shown, marked.mark)

    def encode_beginning(
        self,
        conversation: Conversation,
        text: str,
        ids: list[int],
        beginning: Beginning,
        spelling: GrammarCompiler,
    ) -> list[int]:
        """Encode the beginning of a reply behind a rendered conversation, as the model would have written it.

        Its tokens are those that the tokenizer makes of the whole text. Where it would join the prompt's end with the
        reply's first characters, which no model can, the beginning is spelled by itself.

        Args:
            text: the rendered conversation; ids: its tokens.
            spelling: spells texts to the byte.

        Raises: as `encode`.
        """
        if not beginning.text:
            return []
        whole = self.encode(dataclasses.replace(conversation, reply=beginning), text + beginning.text).ids
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        parts = (
            spelling.spell(beginning.opening),
            spelling.spell_text(beginning.thoughts),
            spelling.spell(beginning.between),
            spelling.spell_text(beginning.content),
        )
        if any(part is None for part in parts):
            raise InvalidFormat(
                "the tokenizer of this model joins the prompt with the beginning of the reply, and has no tokens for "
                "the latter alone.",
                param="messages",
            )
        return [token for part in parts for token in part or ()]

    def _by_template(self, tools: Sequence[Tool]) -> bool:
        # A template of its own for tools leaves the other one to conversations that know of none.
        return self._chat_format.shows_tools and (bool(tools) or self._template.tool_use is None)

    def _shown(self, marked: Marked, text: str) -> str | None:
        """Render the prompt with marks; None if the template refuses them or writes one as something else."""
        try:
            shown = self.render(marked.conversation)
        except TemplateRefused:
            return None
        code = f"{ord(marked.mark):x}"
        if f"\\u{code}" not in text:
            shown = shown.replace(f"\\u{code}", marked.mark)  # JSON in ASCII
        written = (code, str(ord(marked.mark)), "".join(f"%{byte:02x}" for byte in marked.mark.encode()))
        lowered = shown.lower()
        return None if any(form in lowered and form not in text.lower() for form in written) else shown

    def _refusal(self, why: str) -> InvalidFormat:
        return InvalidFormat(
            f"messages hold the spelling of a control token of this model, {why}; leave it out "
            "(content_special_tokens: parse in models.yaml takes such text as control tokens).",
            param="messages",
        )


def _in_plain(found: Sequence[tuple[int, str]], text: str, mark: str) -> list[tuple[int, str]]:
    """Convert places in a text with marks to places in the text without."""
    places, at, marks = [], 0, 0
    for position, word in found:
        marks += text.count(mark, at, position)
        at = position
        places.append((position - marks, word))
    return places


def _written(form: ToolFormat) -> str:
    parts = (form.begin, form.open, form.middle, form.close, form.between or "", form.end)
    return "\0".join((*parts, form.key_open, form.value_open, form.value_close))


def _with_short_ids(message: ChatMessage) -> ChatMessage:
    """Shorten a message's call ids to nine letters and digits, for templates that accept no other length."""

    def short(call_id: str) -> str:
        own = call_id.removeprefix("call_")
        return own if len(own) == 9 and own.isalnum() else hashlib.sha256(call_id.encode()).hexdigest()[:9]

    return dataclasses.replace(
        message,
        tool_calls=tuple(dataclasses.replace(call, id=short(call.id)) for call in message.tool_calls),
        tool_call_id=None if message.tool_call_id is None else short(message.tool_call_id),
    )
