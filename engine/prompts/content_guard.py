"""`ContentGuard`: tells control words that a request spells from the template's own. Pure text; knows no tokenizer.

A control word (`<|im_end|>`, `<think>`) in a message is text, not control. Templates trim, split and join, so to know
which words are their own a conversation is rendered twice: as it is, and with a mark in all text of the request. The
mark is a noncharacter that occurs nowhere in the request. It is put after each character that can begin a control word
and before each that can end one. A control word in the marked prompt is the template's, as no other is in one piece.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from engine.errors import InvalidFormat
from engine.prompts.going_on import Beginning
from engine.types.messages import ChatMessage
from engine.types.tools import Tool

__all__ = ["ContentGuard", "ControlWords", "Conversation", "Marked"]

_MARKS: Final = tuple(chr(code) for code in range(0xFDD2, 0xFDF0))
"""Noncharacters, which no exchanged text should contain. The first that a request does not contain is the mark."""

_KEPT: Final = frozenset({"<think>", "</think>"})
"""In an assistant's text these separate thoughts from the answer: templates search for them."""

_SCHEMA: Final = frozenset(
    (
        *("type", "function", "name", "description", "parameters", "properties", "required", "items", "enum", "title"),
        *("default", "anyOf", "oneOf", "allOf", "format", "minimum", "maximum", "pattern", "nullable", "strict"),
        *("object", "array", "string", "integer", "number", "boolean", "null", "return", "arguments"),
    )
)
"""Words of a tool's definition that templates search for: never marked."""

_PIECE: Final = 1 << 18
_STRING: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_LETTERS: Final = re.compile(r"\w")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template renders of a request. `clock`: what it tells as the time; None: the template's own clock."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...]
    variables: Mapping[str, Any]
    clock: dt.datetime | None = None
    again: bool = True
    """Whether the assistant speaks next. If not, the conversation ends with the last message."""
    reply: Beginning | None = None
    """The beginning of the assistant's reply, which the prompt ends with."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A conversation with marks. `spelled`: whether a text in it contains a whole control word."""

    conversation: Conversation
    mark: str
    spelled: bool


class ControlWords:
    """The texts that become control tokens.

    Args:
        words: the control words.
        kept: those that remain control words in an assistant's text, because templates split it by them.
    """

    def __init__(self, words: Iterable[str], kept: Iterable[str] = ()) -> None:
        self.words = frozenset(words)
        parting = frozenset(kept) | _KEPT
        self._longest = max(map(len, self.words), default=0)
        self._parting = sorted(parting)
        self._split = self.words - parting  # in an assistant's text
        self._pattern = re.compile(_any_of(self.words))
        self._inside = frozenset(inside for word in self.words for inside in _insides(word)) - _SCHEMA
        self._first, self._last = {word[0] for word in self.words}, {word[-1] for word in self.words}
        self._longest_inside = max(map(len, self._inside), default=0)
        self._escaped = [
            (re.compile(rf"(?<!\\)((?:\\\\)*)((?i:\\u{ord(c):04x}))"), c in self._last, c in self._first)
            for c in sorted(self._first | self._last)
        ]

    def find(self, text: str) -> list[tuple[int, str]]:
        """Find the control words in a text, with their places: leftmost, then longest, as tokenizers do."""
        return [(found.start(), found[0]) for found in self._pattern.finditer(text)]

    def spelled_in(self, text: str, *, assistant: bool) -> bool:
        """Return whether a text of the request contains a whole control word that must become text."""
        words = self._split if assistant else self.words
        # In pieces, so that a search in megabytes does not keep all other threads waiting.
        pieces = (text[at : at + _PIECE + self._longest] for at in range(0, len(text), _PIECE))
        return any(word in piece for piece in pieces for word in words)

    def marked(self, text: str, mark: str, *, assistant: bool = False) -> str:
        """Put marks into a text, so that no control word that it begins, ends or contains is in one piece."""
        marked = self._edged(text, mark)
        for word in self._parting if assistant else ():
            marked = marked.replace(self._edged(word, mark), word)
        return marked

    def apart(self, text: str, mark: str) -> str:
        """Put a mark before a text that is the inside of a control word."""
        inside = text.strip()
        if len(inside) > self._longest_inside or inside not in self._inside:
            return text
        start = text.index(inside)
        return f"{text[:start]}{mark}{text[start:]}"

    def marked_in_json(self, text: str, mark: str) -> str:
        """Put marks into the strings of a JSON text."""

        def string(found: re.Match[str]) -> str:
            inside = self._edged(found[0][1:-1], mark)
            for escape, before, after in self._escaped:
                inside = escape.sub(rf"\1{mark if before else ''}\2{mark if after else ''}", inside)
            return f'"{self.apart(inside, mark)}"'

        return _STRING.sub(string, text)

    def _edged(self, text: str, mark: str) -> str:
        # In pieces and not by an expression: a call that finds a million places keeps all other threads waiting.
        if len(text) > _PIECE:
            return "".join(self._edged(text[at : at + _PIECE], mark) for at in range(0, len(text), _PIECE))
        for character in self._first:
            text = text.replace(character, f"{character}{mark}")
        for character in self._last:
            text = text.replace(character, f"{mark}{character}")
        return text


class ContentGuard:
    """Marks the text of requests. Holds no state; safe to use from several threads."""

    def __init__(self, words: ControlWords) -> None:
        self.words = words

    def mark(self, conversation: Conversation, rendered: str) -> Marked | None:
        """Put marks into a conversation; None if nothing in it could be part of a control word.

        Args:
            rendered: the prompt without marks, in which the mark must not occur either.

        Raises:
            InvalidFormat: it contains all characters that could be the mark.
        """
        taken = _Taken()
        taken.conversation(conversation)
        for mark in _MARKS:
            if mark not in taken.found and mark not in rendered:
                walk = _Marking(self.words, mark)
                marked = walk.conversation(conversation)
                return Marked(marked, mark, walk.spelled) if walk.touched else None
        raise InvalidFormat(
            "messages hold each of the noncharacters U+FDD2 to U+FDEF; leave one of them out.", param="messages"
        )


class _Walk(ABC):
    """Visits all texts of a conversation and replaces them with what `text` and `arguments` return."""

    @abstractmethod
    def text(self, text: str, *, assistant: bool = False, apart: bool = True) -> str:
        """Visit a text. `assistant`: the model may have said it. `apart`: it may be the inside of a control word."""

    @abstractmethod
    def arguments(self, text: str) -> str:
        """Visit the arguments of a call, which are JSON text."""

    def conversation(self, given: Conversation) -> Conversation:
        return Conversation(
            tuple(self._message(message) for message in given.messages),
            tuple(self._tool(tool) for tool in given.tools),
            # A template compares its variables with words of its own, which may be the inside of a control word.
            {name: self._deep(value, apart=False) for name, value in given.variables.items()},
            given.clock,
            given.again,
            None if given.reply is None else self._reply(given.reply),
        )

    def _reply(self, given: Beginning) -> Beginning:
        return dataclasses.replace(
            given,
            thoughts=self.text(given.thoughts, assistant=True),
            content=self.text(given.content, assistant=True),
        )

    def _message(self, message: ChatMessage) -> ChatMessage:
        assistant = message.role == "assistant"

        def text(given: str | None, assistant: bool = False) -> str | None:
            return None if given is None else self.text(given, assistant=assistant)

        return dataclasses.replace(
            message,
            content=text(message.content, assistant),
            reasoning_content=text(message.reasoning_content, assistant),
            name=text(message.name),
            tool_call_id=text(message.tool_call_id),
            tool_calls=tuple(
                dataclasses.replace(
                    call, id=self.text(call.id), name=self.text(call.name), arguments=self.arguments(call.arguments)
                )
                for call in message.tool_calls
            ),
        )

    def _tool(self, tool: Tool) -> Tool:
        return dataclasses.replace(
            tool,
            name=self.text(tool.name),
            description=None if tool.description is None else self.text(tool.description),
            parameters=self._deep(tool.parameters),
        )

    def _deep(self, value: Any, *, apart: bool = True) -> Any:
        if isinstance(value, str):
            return self.text(value, apart=apart)
        if isinstance(value, Mapping):
            return {self._deep(key, apart=apart): self._deep(item, apart=apart) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self._deep(item, apart=apart) for item in value]
        return value


class _Taken(_Walk):
    """Collects the noncharacters in a conversation."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def text(self, text: str, *, assistant: bool = False, apart: bool = True) -> str:
        self.found.update(mark for mark in _MARKS if mark in text)
        return text

    def arguments(self, text: str) -> str:
        lowered = text.lower()
        self.found.update(mark for mark in _MARKS if mark in text or f"{ord(mark):x}" in lowered)  # or as an escape
        return text


class _Marking(_Walk):
    """Puts marks into the texts."""

    def __init__(self, words: ControlWords, mark: str) -> None:
        self._words = words
        self._mark = mark
        self.touched = False
        self.spelled = False

    def text(self, text: str, *, assistant: bool = False, apart: bool = True) -> str:
        changed = self._words.marked(text, self._mark, assistant=assistant)
        return self._note(text, self._words.apart(changed, self._mark) if apart else changed, assistant=assistant)

    def arguments(self, text: str) -> str:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return self.text(text)
        read = json.dumps(value, ensure_ascii=False)  # without escapes
        return self._note(read, self._words.marked_in_json(text, self._mark), text)

    def _note(self, read: str, changed: str, written: str | None = None, *, assistant: bool = False) -> str:
        if changed != (read if written is None else written):
            self.touched = True
            self.spelled = self.spelled or self._words.spelled_in(read, assistant=assistant)
        return changed


def _insides(word: str) -> Iterator[str]:
    """The parts of a control word that a template may put between its own brackets (`'<' ~ name ~ '>'`)."""
    starts = [at for at in range(1, len(word)) if not _LETTERS.search(word[:at])]
    ends = [at for at in range(1, len(word)) if not _LETTERS.search(word[at:])]
    return (word[start:end] for start in starts for end in ends if _LETTERS.search(word[start:end]))


def _any_of(words: Iterable[str]) -> str:
    """An expression for the longest of some words, as a tree of their letters: each place is searched once."""
    tree: dict[str, Any] = {}
    for word in words:
        branch = tree
        for character in word:
            branch = branch.setdefault(character, {})
        branch[""] = {}

    def written(branch: dict[str, Any]) -> str:
        ways = [re.escape(character) + written(rest) for character, rest in sorted(branch.items()) if character]
        if not ways:
            return ""
        more = ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"
        return f"(?:{more})?" if "" in branch else more

    return written(tree) or "(?!)"
