"""`ChatFormat`: how a model writes thoughts and tool calls, and where that was learnt from. No torch.

The sources, in order: a response template that models.yaml names; one that the tokenizer ships; the chat template; the
small table below, for families whose template does not write what the model writes; the generic format.
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
    """One row of the table."""

    name: str
    spellings: tuple[str, ...]
    """Texts by which its chat template is recognised: all of them occur in its source."""
    response_template: Mapping[str, Any]
    tool_format: ToolFormat
    reasoning: ReasoningFormat | None
    """Replaces what the chat template shows."""
    writes_calls: bool
    """Whether the chat template renders earlier calls."""


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
                    # The model writes the recipient before the channel or after it.
                    # Each piece has a bound, because text that may become a call is held back and searched again.
                    "open_pattern": r"(?:<\|start\|>assistant)?(?:<\|channel\|>\w{1,16})? to=functions\."
                    r"(?P<name>[\w./-]{1,128}+)(?:<\|channel\|>\w{1,16})?[^<]{0,32}"
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
    """How one model writes thoughts and tool calls."""

    reasoning: ReasoningFormat | None
    """The delimiters of its thoughts; None if it has none."""
    tool_format: ToolFormat | None
    """How calls are written; None if calls can be read but not enforced."""
    response_template: ResponseTemplate | None
    """The template by which replies are read, instead of the two above."""
    template_format: ToolFormat | None
    """How the chat template writes earlier calls, or would. It may differ from `tool_format`."""
    shows_tools: bool
    """Whether the chat template renders definitions of tools."""
    writes_calls: bool
    """Whether the chat template renders earlier calls."""
    source: str
    """Where the format of calls was learnt from, for people."""

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
        """Return whether a special token is part of a delimiter: the parser must see it although it adds no text."""
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
        """Describe in one line how a call is written."""
        if self.tool_format is not None:
            return self.tool_format.describe()
        assert self.response_template is not None
        return self.response_template.describe()


def find_chat_format(
    template: ChatTemplate, *, given: Mapping[str, Any] | None = None, shipped: Mapping[str, Any] | None = None
) -> ChatFormat:
    """Learn how a model writes thoughts and calls.

    Args:
        given: the response template that models.yaml names.
        shipped: the response template of the tokenizer. One that is invalid is ignored, with a warning.

    Raises:
        ValueError: `given` is not a response template.
    """
    reasoning, form = find_reasoning_format(template), find_tool_format(template)
    source = template.serving(tools=True).source or ""
    family = next((f for f in _FAMILIES if all(text in source for text in f.spellings)), None)
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
    # Calls can be enforced only in a format that the response template reads back.
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
