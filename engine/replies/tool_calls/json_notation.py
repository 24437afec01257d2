"""Tool calls whose arguments are one JSON object: where such a call ends, and its name and arguments.

    begin  open NAME middle {"city": "Oslo"} close  end

The call itself may be a JSON object too: `{"name": NAME, "arguments": {…}}`, its members in any order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Final

from engine.replies.delimiters import SPACE, TAG, begins, end_of, has_begun, overlap, pattern
from engine.replies.tool_format import CALL_ID, ToolFormat

__all__ = ["JsonCall", "could_begin", "ends_in_string", "no_constant"]

NAMED: Final = r"(?P<name>[A-Za-z0-9_./-]+)"
_CHECKS: Final = 64  # of whether JSON was cut inside a string, for one call
_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_ESCAPE: Final = len("\\u0041")  # how many characters may stand for one of a name
_BESIDE: Final = ("id", "type", "index", "arguments", "parameters")  # members that may precede a name


def no_constant(name: str) -> None:
    """Refuse NaN and the infinities, which Python's parser takes for numbers and JSON does not have."""
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=no_constant)


class JsonCall:
    """One call with JSON in it, found in text that grows.

    A call ends with its closing tag, unless that stands in a JSON string, or with its JSON object where the format has
    no closing tag.
    """

    __slots__ = (
        "_at", "_begin", "_checks", "_depth", "_exact", "_format", "_passed", "_pattern", "_quoted", "_stop", "_tools",
    )  # fmt: skip

    def __init__(self, tool_format: ToolFormat, tools: Iterable[str], *, exact: bool) -> None:
        """`tools`: names. `exact`: whether only what the format writes to the letter is a call."""
        self._format = tool_format
        self._tools = tuple(tools)
        self._exact = exact
        self._stop = tool_format.stop
        stop = f"|{re.escape(self._stop)}" if self._stop else ""
        self._pattern = re.compile(rf'\\.|["{{}}\n]{stop}', re.DOTALL)
        self._at = 0
        self._begin = -1  # of the JSON
        self._depth = 0
        self._passed: int | None = None  # the end of the first closing tag that seemed to stand in this string
        self._quoted = False
        self._checks = 0

    def end(self, held: str) -> int | None:
        """Return where the call ends; None if it has not ended yet. Each `held` must begin with the one before."""
        limit = len(held) - (overlap(held, self._stop) if self._stop else 0)
        for match in self._pattern.finditer(held, self._at, limit):
            self._at = match.end()
            piece = match[0]
            if piece == self._stop:
                if not self._quoted:
                    return self._at
                if self._passed is None:  # of several closing tags in one string the first is enough
                    self._checks += 1
                    if self._checks < _CHECKS and not ends_in_string(held[self._begin : match.start()]):
                        return self._at
                    self._passed = self._at
            elif self._quoted and piece == "\n" and self._passed:
                return self._passed  # no JSON string goes over the end of a line: a quote was missing
            elif self._quoted:
                self._quoted = piece not in ('"', "\n")
                self._passed = None
            elif piece == '"':
                self._quoted = self._depth > 0
            elif piece == "{":
                self._begin = match.start() if self._begin < 0 else self._begin
                self._depth += 1
            elif piece == "}":
                self._depth -= 1
                if self._depth == 0 and self._stop is None:
                    return self._at
        # A backslash at the limit may begin an escape; all else was seen.
        self._at = max(self._at, limit - (held[max(self._at, limit - 1) : limit] == "\\"))
        return None

    def read(self, text: str) -> tuple[str, str] | None:
        """Return the name and the arguments of a text that is just one call; None if it is none.

        Raises:
            ValueError, RecursionError: it is no JSON, or nested more deeply than Python can parse.
        """
        text = self._without_begin(text)
        if "{" not in self._format.open:
            return self._read_named(text)
        if self._exact and not could_begin(self._format, text):
            return None
        return self._read_object(text)

    def unfinished(self, held: str) -> list[str]:
        """Cut the end of a reply into calls: one without its closing tag, or several of a format that has none."""
        if self._stop is not None:
            return [held.rstrip() + self._missing(held)]
        between, end = (self._format.between or "").strip(), self._format.end.strip()
        calls, text = [], self._without_begin(held)
        while text and text != end:
            members = _members(text, 0)
            if members is None:
                return []
            calls.append(text[: members[1]])
            text = text[members[1] :].strip().removeprefix(between).strip()
        return calls

    def opens(self, held: str) -> bool | None:
        """Say whether a text begins as a call of one of the tools; None if that cannot be told yet.

        For formats without tags, where an answer in JSON may begin like a call.
        """
        at = _behind(held, self._format.open)
        if at is None:
            return None
        if at < 0:  # a call whose members come in another order is one, unless a grammar holds the reply
            return False if self._exact else None
        longest = _ESCAPE * max(map(len, self._tools), default=0) + 2
        written = '"' + held[at : at + longest]
        name = _STRING.match(written)
        if name is None:
            return None if len(written) <= longest and self._may_name(written) else False
        if not self._may_name(name[0]):
            return False
        place = _behind(held, self._format.middle, at + name.end() - 2) if self._exact else 0
        return None if place is None else place >= 0

    def begun(self, held: str) -> bool | None:
        """Say whether a text that has not ended is a call that has begun; None if so far it is but an opening.

        To be asked after `end`. What can be no call of one of the tools has not begun.
        """
        head, brace, key = self._format.open.partition("{")
        close = self._format.close.partition("}")[2] if brace else self._format.close
        if self._begin >= 0 and self._depth == 0:
            whole = _object_at(held, self._begin)
            if whole is None:
                return False
            rest = "".join(held[whole[1] :].split())
            return "".join(close.split()).startswith(rest) and self._is_call(held[: whole[1]] + close)
        opened = has_begun(held, self._format.begin, head + brace if self._format.tagged else self._format.open)
        if not opened:
            return opened
        if brace:
            return self._begin < 0 or self._may_be_call(held, key.strip(' ":'))
        text, middle = self._without_begin(held), self._format.middle
        match = pattern(self._format.open, NAMED).match(text)
        if match is None or not self._may_name(f'"{match["name"]}' + '"' * (match.end() < len(text))):
            return False
        if match.end() == len(text) or begins(middle, text, match.end()):
            return True
        place = end_of(middle, text, match.end())
        return place is not None and text[place:].lstrip()[:1] in ("", "{")

    def _may_be_call(self, held: str, name: str) -> bool:
        """Whether a JSON object that breaks off has members as those of a call, as far as they have come.

        `name`: the member that names the tool.
        """
        known = (name, self._format.middle.strip('", :'), *_BESIDE)
        at, first = _after_space(held, self._begin + 1), True
        while at < len(held):
            key = _STRING.match(held, at)
            if key is None:  # it breaks off, or is none
                rest = held[at + 1 :]
                return held[at] == '"' and (not first or any(member.startswith(rest) for member in known))
            if first and key[0][1:-1] not in known:
                return False
            at = _after_space(held, key.end())
            if held[at : at + 1] not in ("", ":"):
                return False
            at = _after_space(held, at + 1)
            value = _value_at(held, at)
            if key[0][1:-1] == name and at < len(held) and not self._may_name(held[at:value]):
                return False
            if value is None:  # it breaks off
                return True
            at = _after_space(held, value)
            if held[at : at + 1] not in ("", ","):
                return False
            at, first = _after_space(held, at + 1), False
        return True

    def _may_name(self, written: str) -> bool:
        """Whether a JSON string is the name of a tool; if it has no end yet, whether it may become one."""
        if _STRING.fullmatch(written):
            return _decoded(written) in self._tools
        begun = written[1:].partition("\\")[0]  # of an escape only the rest tells what it stands for
        return written[:1] == '"' and any(tool.startswith(begun) for tool in self._tools)

    def _is_call(self, text: str) -> bool:
        """Whether a whole text is a call of one of the tools."""
        try:
            call = self.read(text)
        except (ValueError, RecursionError):
            return False
        return call is not None and call[0] in self._tools

    def _without_begin(self, text: str) -> str:
        """The text behind `begin`, if it is there. White space beside its tags is free."""
        tags = [piece for piece in re.split(f"({TAG.pattern})", self._format.begin) if piece]
        match = re.match(r"\s*" + r"\s*".join(re.escape(piece.strip()) for piece in tags), text)
        return text[match.end() if match else 0 :].strip()

    def _read_named(self, text: str) -> tuple[str, str] | None:
        """Read a call whose name stands before its JSON."""
        match = pattern(self._format.open, NAMED, self._format.middle).match(text)
        if match is None:
            return None
        value = _object_at(text, match.end())
        if value is None or not _is_closing(text[value[1] :], self._format.close):
            return None
        return match["name"], text[value[0] : value[1]]

    def _read_object(self, text: str) -> tuple[str, str] | None:
        """Read a call that is a JSON object, in which the name is a member."""
        head, _, key = self._format.open.partition("{")
        body = pattern(head).match(text)
        members = _members(text, body.end()) if body else None
        if members is None:
            return None
        places, end = members
        if not _is_closing(text[end:], self._format.close.partition("}")[2]):
            return None
        name = places.get(key.strip(' ":'))
        own = places.get(self._format.middle.strip('", :'))
        arguments = own or places.get("arguments") or places.get("parameters")
        if name is None or arguments is None or not text[slice(*arguments)].startswith("{"):
            return None
        called = json.loads(text[slice(*name)])
        return (called, text[slice(*arguments)]) if isinstance(called, str) else None

    def _missing(self, held: str) -> str:
        """The end of `close` that a text lacks."""
        close, text = self._format.close.strip(), held.rstrip()
        for size in range(len(close), -1, -1):
            if text.endswith(close[:size]):
                return close[size:] if size else ""
        return ""


def could_begin(tool_format: ToolFormat, text: str) -> bool:
    """Return whether a text, white space aside, begins as the format writes a call, as far as it has come."""
    begun, opening = ("".join(part.split()) for part in (text, tool_format.open))
    return begun.startswith(opening) or opening.startswith(begun)


def _behind(text: str, delimiter: str, at: int = 0) -> int | None:
    """Return where a delimiter ends that begins at `at`; None if its rest is missing, -1 if another text is there.

    White space, also within it, is free.
    """
    expected = (character for character in delimiter if not character.isspace())
    wanted = next(expected, None)
    while wanted is not None:
        if at == len(text):
            return None
        if text[at] == wanted:
            wanted = next(expected, None)
        elif not text[at].isspace():
            return -1
        at += 1
    return at


def ends_in_string(value: str) -> bool:
    """Return whether JSON was cut inside a string."""
    try:
        json.loads(value)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        pass
    return False


def _is_closing(text: str, close: str) -> bool:
    """Whether a text is `close` and nothing else, with any call id in it."""
    parts = [pattern(part).pattern for part in close.split(CALL_ID)]
    return re.fullmatch(r"[^\"]*".join(parts) + r"\s*", text) is not None


def _after_space(text: str, at: int) -> int:
    return SPACE.match(text, at).end()  # type: ignore[union-attr]


def _decoded(string: str) -> str | None:
    """The text of a JSON string; None if it is not one."""
    try:
        return str(json.loads(string))
    except ValueError:
        return None


def _value_at(text: str, at: int) -> int | None:
    """Where the JSON value at `at` ends; None if it does not."""
    try:
        return int(_DECODER.raw_decode(text, at)[1])
    except (ValueError, RecursionError):
        return None


def _object_at(text: str, at: int) -> tuple[int, int] | None:
    """Where the JSON object at `at`, after any white space, begins and ends."""
    at = SPACE.match(text, at).end()  # type: ignore[union-attr]
    if text[at : at + 1] != "{":
        return None
    try:
        return at, _DECODER.raw_decode(text, at)[1]
    except (ValueError, RecursionError):
        return None


def _members(text: str, at: int) -> tuple[dict[str, tuple[int, int]], int] | None:
    """Where each member's value of the JSON object at `at` begins and ends, and where the object ends."""
    whole = _object_at(text, at)
    if whole is None:
        return None
    places: dict[str, tuple[int, int]] = {}
    at = SPACE.match(text, whole[0] + 1).end()  # type: ignore[union-attr]
    while text[at] == '"':
        key, at = scanstring(text, at + 1, True)
        at = SPACE.match(text, at).end()  # type: ignore[union-attr]
        begin = SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
        end = _DECODER.raw_decode(text, begin)[1]
        places[key] = (begin, end)
        at = SPACE.match(text, end).end()  # type: ignore[union-attr]
        if text[at] == ",":
            at = SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
    return places, whole[1]
