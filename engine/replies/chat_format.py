"""How a model speaks beside plain text: its thoughts, its tool calls, and where each of that was learnt from. No torch.

In this order: a response template that models.yaml names; one that the tokenizer ships; what rendering the chat
template shows; the small table below, for families whose template does not write what the model writes; the generic
form.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from engine.replies.reasoning import ReasoningFormat, Splitter, find_reasoning_format
from engine.replies.reply_parser import DelimiterParser, ReplyParser
from engine.replies.response_template import ResponseTemplate, TemplateParser
from engine.replies.tool_calls.reader import CallReader
from engine.replies.tool_format import CALL_ID, GENERIC, ToolFormat, find_tool_format
from engine.templates.chat_template import ChatTemplate
from engine.types.reply_format import ReplyFormat
from engine.types.tools import Tool

__all__ = ["ChatFormat", "find_chat_format"]

log = logging.getLogger("verbatim.engine")


@dataclass(frozen=True, slots=True)
class _Family:
    """One row of the table. `marks`: what all stands in the source of its chat template."""

    name: str
    marks: tuple[str, ...]
    response_template: Mapping[str, Any]
    tool_format: ToolFormat
    reasoning: ReasoningFormat | None
    """In place of what probing finds."""
    writes_calls: bool
    """Whether the chat template writes earlier calls."""


_FUNCTION: Final = {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}}
_FAMILIES: Final = (
    _Family(
        "gpt-oss",
        ("<|channel|>analysis<|message|>", "functions."),
        {
            "start_anchor": "<|start|>assistant",
            "fields": {
                "thinking": {
                    "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>",
                    "close": "<|end|>",
                },
                "content": {
                    "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)<\|message\|>",
                    "close": ["<|end|>", "<|return|>"],
                },
                "tool_calls": {
                    # The recipient stands before the channel or after it: the model writes both.
                    # Each piece has a bound: what might yet become a call is held back, and looked at again.
                    "open_pattern": r"(?:<\|start\|>assistant)?(?:<\|channel\|>\w{1,16})? to=functions\."
                    r"(?P<name>[\w.-]{1,64}+)(?:<\|channel\|>\w{1,16})?[^<]{0,32}"
                    r"(?:<\|constrain\|>\w{1,16})?<\|message\|>",
                    "close": ["<|call|>", "<|end|>"],
                    "repeats": True,
                    "content": "json",
                    "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
                },
            },
        },
        ToolFormat("json", "", "<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "", None, ""),
        ReasoningFormat(
            "<|channel|>analysis<|message|>",
            "<|end|>",
            "<|end|><|start|>assistant",
            "<|channel|>final<|message|>",
            "<|start|>assistant",
            ("<|channel|>commentary<|message|>",),
        ),
        True,
    ),
    _Family(
        "granite",
        ("<|tool_call|>", "<|start_of_role|>"),
        {
            "start_anchor_pattern": r"<\|start_of_role\|>assistant[^<]*<\|end_of_role\|>",
            "fields": {
                "thinking": {"open": "<think>", "close": "</think>"},
                "content": {"open": "<response>", "close": "</response>"},
                "tool_calls": {
                    "open": "<|tool_call|>",
                    "content": "json",
                    "transform_each": True,
                    "transform": _FUNCTION,
                },
            },
        },
        ToolFormat("json", "<|tool_call|>[", '{"name": "', '", "arguments": ', "}", ", ", "]"),
        None,
        False,
    ),
)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What is known of a model's speech.

    `reasoning`: the marks of its thoughts, to begin, end and count them; None if it has none. `tool_format`: how its
    calls are written; None if that is not known and calls can be read only. `response_template`: what replies are read
    by, if not by those two. `template_format`: how its chat template writes earlier calls, or would if it did; it may
    be another than what is read. `shows_tools`, `writes_calls`: whether its chat template shows definitions, and
    earlier calls. `source`: where the form of its calls comes from, in words.
    """

    reasoning: ReasoningFormat | None
    tool_format: ToolFormat | None
    response_template: ResponseTemplate | None
    template_format: ToolFormat | None
    shows_tools: bool
    writes_calls: bool
    source: str

    def parser(self, reply_format: ReplyFormat) -> ReplyParser | None:
        """Make the parser of one reply; None if all of the reply is answer."""
        if self.response_template is not None:
            return TemplateParser(self.response_template, reply_format) if reply_format.chat else None
        thoughts = self.reasoning if reply_format.chat else None
        calls = self.tool_format if reply_format.tools else None
        splitter = Splitter(thoughts, opened=reply_format.thinking) if thoughts else None
        reader = CallReader(calls, reply_format) if calls else None
        return DelimiterParser(splitter, reader) if splitter or reader else None

    def mentions(self, token: str, *, calls: bool) -> bool:
        """Whether a special token is part of the speech: then it has to be seen, although it adds nothing to a text."""
        if self.response_template is not None:
            return self.response_template.mentions(token)
        texts: list[str] = []
        if self.reasoning is not None:
            found = self.reasoning
            texts += [found.open, found.close, found.closing, found.answer_open]
        if calls and self.tool_format is not None:
            form = self.tool_format
            texts += [form.begin, form.open, form.middle, form.close, form.between or "", form.end]
            texts += [form.key_open, form.value_open, form.value_close]
        return any(token in text for text in texts)

    def describe(self) -> str:
        """How a call is written, in one line."""
        if self.tool_format is not None:
            return self.tool_format.describe()
        assert self.response_template is not None
        return self.response_template.describe()


def find_chat_format(
    template: ChatTemplate, *, given: Mapping[str, Any] | None = None, shipped: Mapping[str, Any] | None = None
) -> ChatFormat:
    """What is to be known of a model.

    Args:
        given: the response template that models.yaml names.
        shipped: the one that the tokenizer brings along. One that cannot be used is left out, with a warning.

    Raises:
        ValueError: `given` is no response template.
    """
    reasoning, form = find_reasoning_format(template), find_tool_format(template)
    source = template.serving(tools=True).source or ""
    family = next((f for f in _FAMILIES if all(mark in source for mark in f.marks)), None)
    read_by: ResponseTemplate | None = None
    source = "chat template" if form else "generic"
    if given is not None:
        read_by, source = ResponseTemplate(given), "models.yaml"
    elif shipped is not None:
        try:
            read_by, source = ResponseTemplate(shipped), "tokenizer"
        except ValueError as error:
            log.warning("The tokenizer's response_template is left out: %s", error)
    shows, writes = form is not None, form is not None
    if form is None and family is not None:
        form, shows, writes = family.tool_format, True, family.writes_calls
        reasoning = family.reasoning or reasoning
        if read_by is None:
            read_by, source = ResponseTemplate(family.response_template), f"table ({family.name})"
    if read_by is None:
        return ChatFormat(reasoning, form or GENERIC, None, form, shows, writes, source)
    # What is written by a form has to be read by the template, or calls cannot be asked for.
    usable = next((f for f in (form, GENERIC) if f is not None and _reads(read_by, f)), None)
    return ChatFormat(reasoning, usable, read_by, form, shows, writes, source)


_PROBE: Final = ReplyFormat(chat=True, tools=(Tool("probe", parameters={"properties": {"a": {"type": "string"}}}),))


def _reads(template: ResponseTemplate, form: ToolFormat) -> bool:
    parser = TemplateParser(template, _PROBE)
    written = '{"a": "b"}' if form.style == "json" else f"{form.key_open}a{form.value_open}b{form.value_close}"
    close = form.close.replace(CALL_ID, "abcdef001")
    parts = [parser.push(f"{form.begin}{form.open}probe{form.middle}{written}{close}{form.end}"), parser.finish()]
    calls: Sequence[tuple[str, str]] = [call for part in parts for call in part.calls]
    return calls == [("probe", '{"a": "b"}')] and not any(part.text.strip() for part in parts)
