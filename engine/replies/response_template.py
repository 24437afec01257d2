"""Parses replies by a response template: transformers' declarative format for the parts of a model's output.

A response template names regions (`thinking`, `content`, `tool_calls`), the delimiters that open and close each, and
how the text between them is read (https://huggingface.co/docs/transformers/main/chat_response_parsing). transformers
loads and checks the template. Regions are found here, because transformers' parser drops text outside of regions and
raises where a region cannot be read; both must come out as text. No tokens, no torch, no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import regex  # type: ignore[import-untyped]

from engine.errors import InvalidFormat
from engine.replies.reply_parser import Parsed
from engine.replies.template_calls import PATIENCE, read_calls, too_slow
from engine.replies.tool_calls.json_notation import ends_in_string
from engine.types.reply_format import ReplyFormat

__all__ = ["ResponseTemplate", "TemplateParser"]

_THOUGHTS: Final = frozenset({"thinking", "reasoning", "reasoning_content", "thoughts"})
_CALLS: Final = frozenset({"tool_calls", "tool_call"})
_KEPT: Final = 4096
"""Characters of finished text that are kept at most."""
_SEARCHED: Final = 20_000_000
"""Characters searched in one reply, repeated searches included; after that the rest of the reply is plain text."""
_CHECKS: Final = 256  # of whether a delimiter is inside a JSON string of a call, for one reply


class ResponseTemplate:
    """A checked response template.

    Raises:
        ValueError: it is not a response template; the message says where.
    """

    __slots__ = ("_opens", "_spec", "source", "tails")

    def __init__(self, source: Mapping[str, Any]) -> None:
        from transformers.utils.chat_parsing.response_templates import load_response_template

        self.source = source
        try:
            self._spec = load_response_template(dict(source))
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        self._opens = tuple(field for field in self._spec.fields.values() if field.open_re is not None)
        patterns = [p for f in self._spec.fields.values() for p, literals in _patterns(f) if p and literals is None]
        self.tails = {p: regex.compile(rf"(?:{p.pattern})\Z[\s\S]", p.flags) for p in patterns}
        """For each delimiter that is an expression, one that only ever matches in part, at the end of a text."""

    def opening(self, prompt: str) -> str:
        """Return the beginning of the reply that the prompt has already written: all after the last start of a turn.

        Raises:
            InvalidFormat: the search takes too long.
        """
        end = None
        try:
            for match in self._spec.start_anchor_re.finditer(prompt, timeout=PATIENCE):
                end = match.end()
        except TimeoutError:
            raise InvalidFormat(
                "this model's response template finds no start of the reply in this prompt within "
                f"{PATIENCE:g} second; another response_template in models.yaml may.",
                param="messages",
            ) from None
        return "" if end is None else prompt[end:]

    def mentions(self, token: str) -> bool:
        """Return whether a special token occurs in the template, so that the parser must see it in the text."""
        return token in json.dumps(self.source, ensure_ascii=False).replace("\\", "")

    def describe(self) -> str:
        """Describe in one line how calls begin and end."""
        for name in self._spec.fields:
            if name in _CALLS:
                given = self.source["fields"][name]
                begin, end = (given.get(k) or given.get(f"{k}_pattern") or "" for k in ("open", "close"))
                return f"{begin}…{end}".replace("\n", "⏎")
        return "none"

    @property
    def fields(self) -> tuple[Any, ...]:
        """The regions that have an opening delimiter."""
        return self._opens


class TemplateParser:
    """The `ReplyParser` of a response template. One per choice.

    White space beside the delimiters of a region is dropped. A call that cannot be read, or names an unknown tool, is
    text; one that breaks off with the reply is left out.

    Args:
        template: the model's response template.
        reply_format: how this reply is to be read.
    """

    __slots__ = (
        "_at", "_before", "_body", "_buffer", "_checks", "_count", "_fields", "_left", "_match", "_opened",
        "_parallel", "_plain", "_region", "_said", "_space", "_tails", "_thought", "_tools", "_trim",
    )  # fmt: skip

    def __init__(self, template: ResponseTemplate, reply_format: ReplyFormat) -> None:
        self._fields = tuple(f for f in template.fields if reply_format.tools or f.name not in _CALLS)
        self._tails = template.tails
        self._tools = {tool.name: tool for tool in reply_format.tools}
        self._parallel = reply_format.parallel_tool_calls
        self._left = _SEARCHED
        self._checks = 0
        self._buffer = ""
        self._at = 0  # text before this place has been returned
        self._region: Any = None
        self._match: Any = None  # what opened the region
        self._opened = 0
        self._body = 0
        self._space = ""  # white space held back: a delimiter may follow
        self._trim = False  # whether a delimiter came last
        self._before = ("", False)  # the two as they were before the region
        self._said = False
        self._thought = False
        self._count = 0
        self._plain = False  # given up: the rest is text
        self.push(reply_format.opening)

    @property
    def thinking(self) -> bool:
        return self._region is not None and self._region.name in _THOUGHTS

    @property
    def held(self) -> Parsed:
        if self._region is not None and self._region.name in _CALLS:
            return Parsed("", self._before[0] + self._buffer[self._opened :])
        text = self._space + self._buffer[self._at :]
        return Parsed(text, "") if self.thinking else Parsed("", text)

    def push(self, text: str) -> Parsed:
        self._buffer += text
        return self._read(end=False)

    def finish(self, *, cut: bool = False) -> Parsed:
        if cut:
            self._leave_out_half_a_delimiter()
        parsed = self._read(end=True, cut=cut)
        space, self._space = self._space, ""
        if self._trim or self._region is not None:
            return parsed
        return parsed._replace(text=parsed.text + space)

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _read(self, *, end: bool, cut: bool = False) -> Parsed:
        reasoning: list[str] = []
        text: list[str] = []
        calls: list[tuple[str, str]] = []
        seen: set[tuple[int, str | None]] = set()
        while True:
            match, field, limit = self._next(end)
            if self._region is None or self._region.name not in _CALLS:
                said = self._say(self._buffer[self._at : limit])
                (reasoning if self.thinking else text).append(said)
            self._at = limit  # what was searched once is not searched again
            if match is None:
                break
            if self._region is None:
                self._region, self._match = field, match
                self._opened, self._body = match.start(), match.end()
                self._before = (self._space, self._trim)
                self._space, self._trim = "", True
            elif not self._is_quoted(match):
                self._close(match, text, calls)
            self._at = max(self._at, match.end())
            place = (self._at, self._region and self._region.name)
            if place in seen:  # delimiters without a character could open and close for ever
                self._give_up()
            seen.add(place)
        if end and self._region is not None:
            self._close(None, text, calls, cut)
        whole = self._region is not None and self._region.name in _CALLS  # a call is kept until it has ended
        if (
            not whole and self._at > _KEPT
        ):  # one character stays, or a later delimiter would be at the beginning of the text
            self._buffer, self._at = self._buffer[self._at - 1 :], 1
        return Parsed("".join(reasoning), "".join(text), tuple(calls))

    def _next(self, end: bool) -> tuple[Any, Any, int]:
        """Find the next complete delimiter: its match, its field, and how far the text before it is certain."""
        size = len(self._buffer)
        self._left -= size - self._at
        if self._left < 0 and not self._plain:
            self._give_up()
        if self._plain:
            return None, None, size
        if self._region is not None:
            watched = [self._region] if self._region.close_re is not None else []
        else:
            watched = list(self._fields)
        best, best_field, limit = None, None, size
        for field in watched:
            pattern, literals = _patterns(field)[self._region is not None]
            longer = field.open_literal_can_extend if self._region is None else field.close_literal_can_extend
            tail = None
            try:
                match = pattern.search(self._buffer, self._at, partial=not end, timeout=PATIENCE)
                if match is not None and not match.partial and not end and literals is None:
                    tail = self._tails[pattern].search(self._buffer, self._at, partial=True, timeout=PATIENCE)
            except TimeoutError:
                raise too_slow(field.name) from None
            if match is None:
                continue
            grows = match.end() == size and (match.start() == match.end() or literals is None or longer)
            if tail is not None and tail.start() <= match.start():
                limit = min(limit, tail.start())  # more text may make it a longer one, or one that begins before
            elif not end and (match.partial or grows):
                limit = min(limit, match.start())
            elif best is None or (match.start(), -match.end()) < (best.start(), -best.end()):
                best, best_field = match, field
        if best is None or best.start() > limit or (best.start() == limit and limit < size):
            return None, None, limit
        if best.start() == best.end() and self._region is not None and best.start() == self._at == size and not end:
            return None, None, limit
        return best, best_field, best.start()

    def _give_up(self) -> None:
        """Treat the rest of the reply as text."""
        if self._region is not None and self._region.name in _CALLS:
            self._at = self._opened
        self._plain, self._region = True, None

    def _say(self, text: str) -> str:
        """Return the text to show. White space waits for what follows; beside a delimiter it is dropped."""
        if self._trim:
            text = text.lstrip()
            if not text:
                return ""
            # Two texts with a call between them, or two thoughts.
            apart = self._thought if self.thinking else self._said and self._count and self._region is None
            self._space = "\n" if apart else ""
            self._trim = False
        text = self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        if said and self.thinking:
            self._thought = True
        elif said:
            self._said = True
        return said

    def _leave_out_half_a_delimiter(self) -> None:
        """Drop the end of the text if it may be the beginning of a delimiter. How a call ends is seen when it does."""
        if self._plain or (self._region is not None and self._region.name in _CALLS):
            return
        fields = self._fields if self._region is None else (self._region,)
        for field in fields:
            delimiter = field.open_re if self._region is None else field.close_re
            if delimiter is None:
                continue
            try:
                match = delimiter.search(self._buffer, self._at, partial=True, timeout=PATIENCE)
            except TimeoutError:
                raise too_slow(field.name) from None
            if match is not None and match.partial:
                self._buffer = self._buffer[: match.start()]

    def _close(self, match: Any, text: list[str], calls: list[tuple[str, str]], cut: bool = False) -> None:
        """End the region, at a delimiter or (None) with the reply. `cut`: as in `finish`."""
        region, opened, body = self._region, self._opened, self._body
        stop = match.start() if match is not None else self._almost_closed(region)
        after = match.end() if match is not None else len(self._buffer)
        self._region = None
        self._space, self._trim = "", True
        if region.name not in _CALLS:
            return
        found = self._calls(region, self._buffer[body:stop])
        if found:
            calls += found
            self._count += len(found)
        elif match is None and (cut if (begun := self._begun(region, self._buffer[body:])) is None else begun):
            pass  # it breaks off
        else:
            self._space, self._trim = self._before
            text.append(self._say(self._buffer[opened:after]))
        self._at = after

    def _almost_closed(self, region: Any) -> int:
        """Return where the text of a call ends that lacks but the rest of its closing delimiter."""
        if region.name in _CALLS and region.close_re is not None and not self._plain:
            try:
                match = region.close_re.search(self._buffer, self._body, partial=True, timeout=PATIENCE)
            except TimeoutError:
                raise too_slow(region.name) from None
            if match is not None and match.partial:
                return int(match.start())
        return len(self._buffer)

    def _begun(self, region: Any, body: str) -> bool | None:
        """Say whether a region that has not ended is a call that has begun; None if only its opening is there."""
        body = body.strip()
        if not body:
            return True if self._match.groupdict() else None
        if region.content == "json":
            return body[0] in "{[" and not _is_whole(body)
        return body[0] == "<" if region.content == "xml-inline" else True

    def _is_quoted(self, match: Any) -> bool:
        """Whether a closing delimiter is inside a JSON string of the call."""
        if self._region.name not in _CALLS or self._region.content != "json" or match.start() == match.end():
            return False
        self._checks += 1
        return self._checks < _CHECKS and ends_in_string(self._buffer[self._body : match.start()])

    def _calls(self, region: Any, body: str) -> list[tuple[str, str]]:
        """The calls of a region; none if it cannot be read, or if a second call is not allowed."""
        if self._count and not self._parallel:
            return []
        captures = {k: v for k, v in self._match.groupdict().items() if v is not None}
        calls = read_calls(region, body, captures, self._tools)
        return calls if self._parallel else calls[:1]


def _is_whole(body: str) -> bool:
    """Whether a text begins with a whole JSON value."""
    try:
        json.JSONDecoder().raw_decode(body)
    except (ValueError, RecursionError):
        return False
    return True


def _patterns(field: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The opening and the closing delimiter of a region, each as an expression and the literals it consists of."""
    return (field.open_re, field.open_literals), (field.close_re, field.close_literals)
