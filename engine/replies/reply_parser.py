"""`ReplyParser`: separates thoughts, answer and tool calls while a reply is generated. No tokens, no torch, no HTTP.

There are two: `DelimiterParser` searches for delimiters that were read off a chat template, and
`response_template.TemplateParser` follows the response template that a tokenizer ships.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from engine.replies.reasoning import Splitter
from engine.replies.tool_calls.reader import CallReader

__all__ = ["DelimiterParser", "Parsed", "ReplyParser"]


class Parsed(NamedTuple):
    """What a piece of text adds to thoughts and answer, and the calls (name, arguments) that it completes."""

    reasoning: str = ""
    text: str = ""
    calls: tuple[tuple[str, str], ...] = ()


class ReplyParser(Protocol):
    """Takes the text of one choice in pieces. The joined parts do not depend on the pieces."""

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside the thoughts."""

    @property
    def held(self) -> Parsed:
        """The text that is held back, as it would be shown if nothing more came of it."""

    def push(self, text: str) -> Parsed:
        """Take a piece of text; return what is certain of it."""

    def finish(self, *, cut: bool = False) -> Parsed:
        """End the reply; return what was held back.

        A call that breaks off is left out. `cut`: the reply was ended by a limit and not by the model; then what may
        be the beginning of a call, or of a delimiter of thoughts or answer, is left out, too.
        """


class DelimiterParser:
    """Separates thoughts with a `splitter`, then tool calls in the rest with a `reader`; either may be missing."""

    __slots__ = ("_reader", "_splitter")

    def __init__(self, splitter: Splitter | None, reader: CallReader | None) -> None:
        self._splitter = splitter
        self._reader = reader

    @property
    def thinking(self) -> bool:
        return self._splitter is not None and self._splitter.inside

    @property
    def held(self) -> Parsed:
        thoughts, text = self._splitter.held if self._splitter is not None else ("", "")
        return Parsed(thoughts, (self._reader.held if self._reader is not None else "") + text)

    def push(self, text: str) -> Parsed:
        reasoning = ""
        calls: list[tuple[str, str]] = []
        if self._splitter is not None:
            reasoning, text = self._splitter.push(text)
        if self._reader is not None:
            text, calls = self._reader.push(text)
        return Parsed(reasoning, text, tuple(calls))

    def finish(self, *, cut: bool = False) -> Parsed:
        reasoning, text = "", ""
        calls: list[tuple[str, str]] = []
        if self._splitter is not None:
            reasoning, text = self._splitter.finish(cut=cut)
        if self._reader is not None:
            text, calls = self._reader.push(text)
            rest, more = self._reader.finish(cut=cut)
            text, calls = text + rest, calls + more
        return Parsed(reasoning, text, tuple(calls))
