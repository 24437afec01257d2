"""How a model writes tool calls: read off its chat template. Knows text and JSON; no tokens, no torch, no HTTP.

A turn with calls of known names and arguments is rendered, once with one call and once with two, and what stands around
the names and the arguments is the format:

    begin  open NAME middle ARGUMENTS close  between  open NAME middle ARGUMENTS close  end

Arguments are a JSON object, or (`pairs`) written one by one: key_open KEY value_open VALUE value_close.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from engine.errors import TemplateRefused
from engine.replies.delimiters import TAG, shared
from engine.templates.chat_template import ChatTemplate, definition_of
from engine.types.messages import ChatMessage, ToolCall
from engine.types.tools import Tool

__all__ = [
    "CALL_ID", "GENERIC", "ToolFormat", "find_tool_format", "generic_messages", "one_call_a_turn", "with_written_calls",
]  # fmt: skip

CALL_ID: Final = "\x00"
"""Stands in `close` for the call's id, of nine letters and digits, where a format writes one."""

_NAMES: Final = ("erstaufruf", "zweitaufruf")  # no template writes these words
_IDS: Final = ("abcdef001", "abcdef002")
_KEYS: Final = ("schluessel", "nummer")
_VALUE: Final = "Zufallswert"
_NUMBER: Final = 7351
_ARGUMENTS: Final = f'{{"{_KEYS[0]}": "{_VALUE}", "{_KEYS[1]}": {_NUMBER}}}'
_TOOL: Final = Tool(
    _NAMES[0],
    "-",
    {"type": "object", "properties": {key: {"type": "string", "description": "-"} for key in _KEYS}},
)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """See the head of this file. `between` is None where a turn holds one call only."""

    style: Literal["json", "pairs"]
    begin: str
    open: str
    middle: str
    close: str
    between: str | None
    end: str
    key_open: str = ""
    value_open: str = ""
    value_close: str = ""

    @property
    def delimiter(self) -> str:
        """The text by which a call is recognised: the first tag of its opening, or all of it."""
        tag = TAG.match(self.begin + self.open)
        return tag[0] if tag else self.begin + self.open

    @property
    def tagged(self) -> bool:
        """Whether a tag tells a call from text; if not, calls are all of a reply."""
        return TAG.match(self.begin + self.open) is not None

    @property
    def stop(self) -> str | None:
        """The last tag of `close`, with which a call ends; None if it ends with its JSON."""
        tags = TAG.findall(self.close)
        return tags[-1] if tags else None

    def describe(self) -> str:
        """One line for people."""
        body = "{…}" if self.style == "json" else f"{self.key_open}KEY{self.value_open}VALUE{self.value_close}…"
        text = f"{self.begin}{self.open}NAME{self.middle}{body}{self.close}{self.end}"
        return text.replace(CALL_ID, "ID").replace("\n", "⏎")


GENERIC: Final = ToolFormat("json", "", '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", "")
"""For templates that know nothing of tools: the form that most models have seen."""


def find_tool_format(template: ChatTemplate) -> ToolFormat | None:
    """The format of a template; None if it does not render calls."""
    user = ChatMessage("user", "Frage")
    calls = [ToolCall(i, name, _ARGUMENTS) for i, name in zip(_IDS, _NAMES, strict=True)]
    try:
        prompt = template.render([user], tools=[_TOOL])
        plain = template.render([user, ChatMessage("assistant", "Antwort")], again=False, tools=[_TOOL])
        one = template.render([user, ChatMessage("assistant", "", tool_calls=(calls[0],))], again=False, tools=[_TOOL])
    except TemplateRefused:
        return None
    try:
        two = template.render([user, ChatMessage("assistant", "", tool_calls=tuple(calls))], again=False, tools=[_TOOL])
    except TemplateRefused:
        two = ""  # one call a turn
    return _derive(prompt, plain, one, two)


def _write_calls(found: ToolFormat, calls: Sequence[ToolCall]) -> str:
    """Calls as the model writes them; `json` formats only."""
    texts = [f"{found.open}{c.name}{found.middle}{c.arguments}{found.close.replace(CALL_ID, c.id)}" for c in calls]
    return found.begin + (found.between or "\n").join(texts) + found.end


def with_written_calls(messages: Sequence[ChatMessage], found: ToolFormat) -> list[ChatMessage]:
    """Earlier calls as text, for a template that shows tools and their results but writes no calls."""
    return [
        replace(m, content=f"{m.content or ''}\n{_write_calls(found, m.tool_calls)}".lstrip("\n"), tool_calls=())
        if m.tool_calls
        else m
        for m in messages
    ]


def one_call_a_turn(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Each turn with several calls as several, each with its result, for a template that takes one call a turn."""
    turns: list[ChatMessage] = []
    left = list(messages)
    while left:
        turn = left.pop(0)
        if len(turn.tool_calls) < 2:
            turns.append(turn)
            continue
        results: list[ChatMessage] = []
        while left and left[0].role == "tool":
            results.append(left.pop(0))
        for i, call in enumerate(turn.tool_calls):
            said = turn if i == 0 else replace(turn, content="", reasoning_content=None)
            turns.append(replace(said, tool_calls=(call,)))
            own = next((result for result in results if result.tool_call_id == call.id), None)
            if own is not None:
                turns.append(own)
                results.remove(own)
        turns += results
    return turns


def generic_messages(messages: Sequence[ChatMessage], tools: Sequence[Tool], *, system: bool) -> list[ChatMessage]:
    """A conversation with tools as one without, for a template that knows nothing of them.

    The definitions go into a system turn (`system` false: into the first turn), calls into the assistant's text,
    results into a user's turn.
    """
    lines = [json.dumps(definition_of(tool)["function"], ensure_ascii=False) for tool in tools]
    block = "\n".join(
        [
            "# Tools",
            "These functions can be called:",
            *lines,
            "To call one, write only this, with its name and its arguments:",
            f"{GENERIC.open}NAME{GENERIC.middle}{{}}{GENERIC.close}",
        ]
    )
    turns: list[ChatMessage] = []
    for message in messages:
        content = message.content or ""
        if message.role == "tool":
            result = f"<tool_response>\n{content}\n</tool_response>"
            if turns and turns[-1].role == "user" and (turns[-1].content or "").endswith("</tool_response>"):
                turns[-1] = replace(turns[-1], content=f"{turns[-1].content}\n{result}")
            else:
                turns.append(ChatMessage("user", result))
        elif message.tool_calls:
            turns += with_written_calls([message], GENERIC)
        else:
            turns.append(message)
    if not tools:
        return turns
    first = turns[0]
    if first.role in ("system", "developer") or not system:
        return [replace(first, content=f"{block}\n\n{first.content or ''}"), *turns[1:]]
    return [ChatMessage("system", block), *turns]


def _derive(prompt: str, plain: str, one: str, two: str) -> ToolFormat | None:
    start = len(_common(_atoms(one), _atoms(prompt)))
    one, tail = one[start:], plain[plain.rfind("Antwort") + len("Antwort") :]
    two = two[start:] if two else ""
    for call_id in _IDS:
        one, two = one.replace(call_id, CALL_ID), two.replace(call_id, CALL_ID)
    name = one.rfind(_NAMES[0])
    if name < 0:
        return None
    before, after = one[:name], one[name + len(_NAMES[0]) :]
    if _ARGUMENTS in after:
        middle, _, rest = after.partition(_ARGUMENTS)
        style: Literal["json", "pairs"] = "json"
        pairs = ("", "", "")
    else:
        found = _pairs(after)
        if found is None:
            return None
        middle, rest, *marks = found
        style, pairs = "pairs", (marks[0], marks[1], marks[2])
    rest = _without_end(rest, tail)
    before = _after_thoughts(before)
    if not (TAG.match(before) or before.startswith("{")):
        return None  # nothing that a reader could know a call by (gpt-oss writes them to a channel of their own)
    second = two.find(_NAMES[1])
    if second < 0:
        return ToolFormat(style, "", before, middle, rest, None, "", *pairs)
    # What stands between the first call's arguments and the second's name: close, between, open.
    last = _ARGUMENTS if style == "json" else f"{_NUMBER}{pairs[2]}"
    gap = two[two.find(last) + len(last) : second]
    close = _common(_atoms(gap), _atoms(rest))
    gap, end = gap[len(close) :], rest[len(close) :]
    open_ = _common_end(_atoms(gap), _atoms(before))
    between = gap[: len(gap) - len(open_)]
    begin = before[: len(before) - len(open_)]
    if style == "pairs" and not between and open_.startswith("\n") and begin == "":
        open_, between = open_[1:], "\n"
    return ToolFormat(style, begin, open_, middle, close, between, end, *pairs)


def _pairs(text: str) -> tuple[str, str, str, str, str] | None:
    """(middle, rest, key_open, value_open, value_close) of arguments that are written one by one."""
    places = [text.find(word) for word in (_KEYS[0], _VALUE, _KEYS[1], str(_NUMBER))]
    if min(places) < 0 or places != sorted(places):
        return None
    head = text[: places[0]]
    value_open = text[places[0] + len(_KEYS[0]) : places[1]]
    gap = text[places[1] + len(_VALUE) : places[2]]
    rest = text[places[3] + len(str(_NUMBER)) :]
    key_open = _common_end(_atoms(gap), _atoms(head))
    value_close = gap[: len(gap) - len(key_open)]
    if not rest.startswith(value_close) or not value_close.strip() or not key_open.strip():
        return None
    return head[: len(head) - len(key_open)], rest[len(value_close) :], key_open, value_open, value_close


def _without_end(rest: str, tail: str) -> str:
    """What follows the arguments, without what ends every turn."""
    mark = tail.strip()
    if mark and mark in rest:
        return rest[: rest.index(mark)].rstrip("\n")
    common = _common_end(_atoms(rest), _atoms(tail))
    return rest[: len(rest) - len(common)]


def _after_thoughts(before: str) -> str:
    """What stands before the first name, without empty thoughts and the white space around them."""
    return re.sub(r"^\s*<think>\s*</think>\s*", "", before).lstrip("\n")


def _atoms(text: str) -> list[str]:
    """A text as tags, each whole, and single characters: a tag is shared or not, never half of it."""
    atoms: list[str] = []
    at = 0
    for tag in TAG.finditer(text):
        atoms += [*text[at : tag.start()], tag[0]]
        at = tag.end()
    return [*atoms, *text[at:]]


def _common(a: Sequence[str], b: Sequence[str]) -> str:
    """The text of the atoms that two lists begin with alike."""
    return "".join(a[: shared(a, b)])


def _common_end(a: Sequence[str], b: Sequence[str]) -> str:
    """The text of the atoms that two lists end with alike."""
    size = shared(a[::-1], b[::-1])
    return "".join(a[len(a) - size :])
