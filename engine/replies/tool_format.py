"""`ToolFormat`: how a model writes tool calls, derived from its chat template. No tokens, no torch, no HTTP.

The template renders a turn with calls of known names and arguments, once with one call and once with two. The text
around the names and the arguments is the format:

    begin  open NAME middle ARGUMENTS close  between  open NAME middle ARGUMENTS close  end

Arguments are a JSON object or, in the style `pairs`, written one by one: key_open KEY value_open VALUE value_close.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from engine.errors import TemplateRefused
from engine.replies.delimiters import TAG, shared
from engine.templates.chat_template import ChatTemplate
from engine.types.messages import ChatMessage, ToolCall
from engine.types.tools import Tool

__all__ = ["CALL_ID", "GENERIC", "ToolFormat", "find_tool_format"]

CALL_ID: Final = "\x00"
"""In `close`, the place of the call's id, nine letters and digits, where a format writes one."""

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
    """The delimiters of calls and arguments, as in the head of this file.

    `between` is None where a turn may hold only one call.
    """

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
        """Whether a call begins with a tag. If not, a call can only be a whole reply."""
        return TAG.match(self.begin + self.open) is not None

    @property
    def stop(self) -> str | None:
        """The last tag of `close`, which ends a call; None if a call ends with its JSON."""
        tags = TAG.findall(self.close)
        return tags[-1] if tags else None

    def describe(self) -> str:
        """Describe the format in one line."""
        body = "{…}" if self.style == "json" else f"{self.key_open}KEY{self.value_open}VALUE{self.value_close}…"
        text = f"{self.begin}{self.open}NAME{self.middle}{body}{self.close}{self.end}"
        return text.replace(CALL_ID, "ID").replace("\n", "⏎")


GENERIC: Final = ToolFormat("json", "", '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", "")
"""The format for templates that do not support tools: the one that most models were trained on."""


def find_tool_format(template: ChatTemplate) -> ToolFormat | None:
    """Derive the format of a chat template; None if it does not render calls."""
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
        middle, rest, *delimiters = found
        style, pairs = "pairs", (delimiters[0], delimiters[1], delimiters[2])
    rest = _without_end(rest, tail)
    before = _after_thoughts(before)
    if not (TAG.match(before) or before.startswith("{")):
        return None  # nothing by which a reader could recognise a call (gpt-oss writes calls to a channel of their own)
    second = two.find(_NAMES[1])
    if second < 0:
        return ToolFormat(style, "", before, middle, rest, None, "", *pairs)
    # Between the first call's arguments and the second's name: close, between, open.
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
    """Derive (middle, rest, key_open, value_open, value_close) of arguments that are written one by one."""
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
    """Remove from the text behind the arguments what ends every turn."""
    end = tail.strip()
    if end and end in rest:
        return rest[: rest.index(end)].rstrip("\n")
    common = _common_end(_atoms(rest), _atoms(tail))
    return rest[: len(rest) - len(common)]


def _after_thoughts(before: str) -> str:
    """Remove from the text before the first name empty thoughts and the white space around them."""
    return re.sub(r"^\s*<think>\s*</think>\s*", "", before).lstrip("\n")


def _atoms(text: str) -> list[str]:
    """Split a text into whole tags and single characters, so that two texts never share half a tag."""
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
