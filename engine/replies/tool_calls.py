"""Tool calls in a model's free text: read when they are whole, text when they are not. No tokens, no torch, no HTTP.

A call is told only when all of it has come and it is one: a known name, arguments that are a JSON object. Whatever else
the model wrote after the mark of a call comes out as text, so that nothing is lost and nobody sees half a call.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, Final

from engine.replies.tool_format import CALL_ID, ToolFormat
from engine.text.json_schema import properties_of, read_value, types_of
from engine.types.reply_format import ReplyFormat
from engine.types.tools import Tool

__all__ = ["CallReader", "call_id", "ends_in_a_text"]

_TAG: Final = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{2,}\]")
_SPACE: Final = re.compile(r"\s*")
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LONGEST_NAME: Final = 4096  # of an argument that no schema names
_CHECKS: Final = 64  # of whether JSON is cut inside a text, for one call


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_no_constant)


def call_id(seed: int, choice: int, prompt: Sequence[int], number: int) -> str:
    """`call_` and nine letters and digits: other calls have others, and the same request has the same again.

    Nine, because some templates show ids to the model and take no other length.
    """
    text = f"{seed}/{choice}/{number}/{','.join(map(str, prompt))}"
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:12], "big")
    letters = "0123456789abcdefghijklmnopqrstuvwxyz"
    return "call_" + "".join(letters[digest // 36**i % 36] for i in range(9))


class CallReader:
    """Text in, (text, calls) out. One per choice.

    Args:
        found: how the model writes calls.
        reply_format: how this reply is to be read. Only its tools can be called.
    """

    __slots__ = (
        "_after", "_block", "_calling", "_confirmed", "_ends", "_exact", "_first", "_format", "_gap", "_held",
        "_parallel", "_said", "_scan", "_tools", "_triggers", "count",
    )  # fmt: skip

    def __init__(self, found: ToolFormat, reply_format: ReplyFormat) -> None:
        self._format = found
        self._tools = {tool.name: tool for tool in reply_format.tools}
        self._parallel = reply_format.parallel_tool_calls
        self._exact = reply_format.exact_calls
        self._first = reply_format.calls_or_answer or not found.tagged
        self._confirmed = False  # that what is held begins as a call does
        marks = [match[0] for match in map(_TAG.match, (found.begin, found.open)) if match]
        if self._exact:
            marks = marks[:1]
        self._triggers = tuple(dict.fromkeys(marks)) or (found.open.strip()[:1],)
        self._ends = found.end.strip()
        self._held = ""
        self._gap = ""  # white space before the mark of what may be a call
        self._calling = False
        self._scan = self._scanner()
        self._said = False  # whether any text but white space came out
        self._after = False  # whether a call was the last thing that came
        self._block = False  # whether the next call may follow without a mark before it
        self.count = 0
        """Calls so far."""

    def push(self, text: str) -> tuple[str, list[tuple[str, str]]]:
        """Take a piece of text: what may be shown now, and the calls (name, arguments) that it completes."""
        self._held += text
        return self._read(end=False)

    def finish(self) -> tuple[str, list[tuple[str, str]]]:
        """The end of the reply: what was held back, as calls if it is whole ones, else as text."""
        shown, calls = self._read(end=True)
        held, self._held = self._held, ""
        if self._after:  # white space beside a call, and the beginning of what ends a block, belong to nothing
            held = "" if self._ends.startswith(held.strip()) else self._beside(held.strip())
        return shown + held, calls

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _scanner(self) -> _JsonScan | _PairScan:
        found = self._format
        return _JsonScan(found) if found.style == "json" else _PairScan(found, self._tools)

    def _read(self, *, end: bool) -> tuple[str, list[tuple[str, str]]]:
        shown = ""
        calls: list[tuple[str, str]] = []
        while True:
            if not self._calling:
                shown += self._pass_on()
                if not self._calling:
                    return shown, calls
                self._scan = self._scanner()
            place: int | None = None
            if self._format.tagged:
                place = self._scan.end(self._held)
            elif self._exact and not self._confirmed and not self._may_be_one(self._held):
                place = len(self._held)
            if place is None and not end:
                return shown, calls
            if place is None and (last := self._last(self._held)):
                self._held, self._calling, self._after = "", False, True
                return shown, calls + last
            if place is None:  # it never ended: its closing mark may stand in a text whose quote is missing
                place = self._first_stop()
            text, self._held, self._calling = self._held[:place], self._held[place:], False
            call = self._take(text)
            if call is None:  # it only looked like one
                shown += self._beside(self._gap + text)
                self._block = False
            else:
                calls.append(call)
                self._after = self._block = True

    def _beside(self, text: str) -> str:
        """Text that comes out; in a line of its own where a call stood between it and other text."""
        gap = "\n" if self._after and self._said else ""
        if gap or self._after:
            text = text.lstrip()
        self._said, self._after = True, False
        return gap + text

    def _pass_on(self) -> str:
        """Text up to the next mark of a call. What may be the beginning of a mark stays, and white space before it."""
        if self._after and not self._follow():
            return ""
        held = self._held
        if self._first and self._said:
            self._held = ""  # a mark counts only where nothing was said before it
            return held
        at = min((i for i in map(held.find, self._triggers) if i >= 0), default=-1)
        if at >= 0 and (not self._first or not held[:at].strip()):
            shown = held[:at].rstrip()
            self._calling, self._gap, self._held = True, held[len(shown) : at], held[at:]
        else:
            keep = len(held) - max(_overlap(held, trigger) for trigger in self._triggers)
            keep = len(held[:keep].rstrip())
            shown, self._held = held[:keep], held[keep:]
        if not shown.strip():
            return shown
        self._block = False
        return self._beside(shown)

    def _follow(self) -> bool:
        """Right after a call: pass over what ends its block, or begin the next call of it; False to wait for more."""
        found = self._format
        self._held = held = self._held.lstrip()
        if not held:
            return False
        if self._block and self._ends:
            if held.startswith(self._ends):
                self._block, self._held = False, held[len(self._ends) :].lstrip()
                return bool(self._held)
            if self._ends.startswith(held):
                return False
        if self._block and found.begin and found.between is not None and (self._ends or not self._exact):
            between, opening = found.between.strip(), found.open.strip()
            tag = _TAG.match(opening)
            opening = tag[0] if tag else opening[:1]
            rest = held.removeprefix(between).lstrip()
            if held.startswith(between) and rest.startswith(opening):
                self._calling, self._gap, self._held = True, held[: len(held) - len(rest)], rest
                return False
            if between.startswith(held) or (held.startswith(between) and opening.startswith(rest)):
                return False
        return True

    def _may_be_one(self, text: str) -> bool:
        """Whether a text begins as the format writes a call, white space aside, as far as it has come."""
        begun, opening = ("".join(part.split()) for part in (text, self._format.open))
        self._confirmed = begun.startswith(opening)
        return begun.startswith(opening) or opening.startswith(begun)

    def _first_stop(self) -> int:
        """How far a call that never ended reaches: up to the first tag that ends one, whatever it stands in."""
        stop = self._format.stop
        at = self._held.find(stop) if stop is not None else -1
        return at + len(stop) if stop is not None and at >= 0 else len(self._held)

    def _without_begin(self, text: str) -> str:
        """What follows the mark before the first call, if it is there; white space beside its tags is free."""
        tags = [piece for piece in re.split(f"({_TAG.pattern})", self._format.begin) if piece]
        match = re.match(r"\s*" + r"\s*".join(re.escape(piece.strip()) for piece in tags), text)
        return text[match.end() if match else 0 :].strip()

    def _take(self, text: str) -> tuple[str, str] | None:
        """One call, if the text is just that."""
        if self.count and not self._parallel:
            return None
        try:
            call = self._json(self._without_begin(text)) if isinstance(self._scan, _JsonScan) else self._scan.call
        except (ValueError, RecursionError):  # no JSON, or nested beyond what Python bears
            return None
        if call is None or call[0] not in self._tools:
            return None
        self.count += 1
        return call

    def _json(self, text: str) -> tuple[str, str] | None:
        opening, closing = self._format.open, self._format.close
        if "{" not in opening:
            match = _pattern(opening, r"(?P<name>[A-Za-z0-9_.-]+)", self._format.middle).match(text)
            if match is None:
                return None
            value = _object_end(text, match.end())
            if value is None or not _is_only(text[value[1] :], closing):
                return None
            return match["name"], text[value[0] : value[1]]
        if self._exact and not self._may_be_one(text):
            return None
        head, _, key = opening.partition("{")
        body = _pattern(head).match(text)
        members = _members(text, body.end()) if body else None
        if members is None:
            return None
        names, end = members
        if not _is_only(text[end:], closing.partition("}")[2]):
            return None
        name = names.get(key.strip(' ":'))
        arguments = names.get(self._format.middle.strip('", :')) or names.get("arguments") or names.get("parameters")
        if name is None or arguments is None or not text[slice(*arguments)].startswith("{"):
            return None
        called = json.loads(text[slice(*name)])
        return (called, text[slice(*arguments)]) if isinstance(called, str) else None

    def _last(self, held: str) -> list[tuple[str, str]]:
        """Calls at the end of a reply: one whose closing mark the model left out, or all of a format without marks."""
        found = self._format
        if isinstance(self._scan, _PairScan):
            call = self._take(held) if self._scan.whole(held) else None
            return [call] if call else []
        if found.stop is not None:
            call = self._take(held.rstrip() + self._missing(held))
            return [call] if call else []
        calls: list[tuple[str, str]] = []
        count, text = self.count, self._without_begin(held)
        while text and text != found.end.strip():
            members = _members(text, 0)
            call = self._take(text[: members[1]]) if members else None
            if members is None or call is None:
                self.count = count
                return []
            calls.append(call)
            text = text[members[1] :].strip().removeprefix((found.between or "").strip()).strip()
        return calls

    def _missing(self, held: str) -> str:
        """The end of `close` that a text lacks."""
        close = self._format.close.strip()
        text = held.rstrip()
        for size in range(len(close), -1, -1):
            if text.endswith(close[:size]):
                return close[size:] if size else ""
        return ""


class _JsonScan:
    """Where a call with JSON in it ends: at its last tag, if that stands in no text, or with its object."""

    __slots__ = ("_at", "_begin", "_checks", "_depth", "_passed", "_pattern", "_quoted", "_stop")

    def __init__(self, found: ToolFormat) -> None:
        self._stop = found.stop
        stop = f"|{re.escape(self._stop)}" if self._stop else ""
        self._pattern = re.compile(rf'\\.|["{{}}\n]{stop}', re.DOTALL)
        self._at = 0
        self._begin = -1  # of the JSON
        self._depth = 0
        self._passed: int | None = None  # the end of the first tag that seemed to stand in this text
        self._quoted = False
        self._checks = 0

    def end(self, held: str) -> int | None:
        """The place behind the call; None if it has not come yet. `held` only ever grows."""
        limit = len(held) - (_overlap(held, self._stop) if self._stop else 0)
        for match in self._pattern.finditer(held, self._at, limit):
            self._at = match.end()
            mark = match[0]
            if mark == self._stop:
                if not self._quoted:
                    return self._at
                if self._passed is None:  # in one text, one tag is as good as the next
                    self._checks += 1
                    if self._checks < _CHECKS and not ends_in_a_text(held[self._begin : match.start()]):
                        return self._at
                    self._passed = self._at
            elif self._quoted and mark == "\n" and self._passed:
                return self._passed  # no text in JSON goes over the end of a line: a quote was missing
            elif self._quoted:
                self._quoted = mark not in ('"', "\n")
                self._passed = None
            elif mark == '"':
                self._quoted = self._depth > 0
            elif mark == "{":
                self._begin = match.start() if self._begin < 0 else self._begin
                self._depth += 1
            elif mark == "}":
                self._depth -= 1
                if self._depth == 0 and self._stop is None:
                    return self._at
        # A backslash at the limit may begin an escape; all else was seen.
        self._at = max(self._at, limit - (held[max(self._at, limit - 1) : limit] == "\\"))
        return None


class _PairScan:
    """A call whose arguments are written one by one, read as it comes.

    A value ends where its closing tag stands before another argument or the end of the call, so that tags in a value
    are text; a value that has to be JSON ends where it is.
    """

    __slots__ = (
        "_arguments", "_at", "_blank", "_failed", "_format", "_key", "_name", "_parts", "_root", "_seek", "_tools",
        "call",
    )  # fmt: skip

    def __init__(self, found: ToolFormat, tools: Mapping[str, Tool]) -> None:
        self._format = found
        self._tools = tools
        self._at = 0  # what stands before was read
        self._seek = 0  # no end of the value stands before
        self._blank = (-1, -1)  # after a closing tag, and after the white space behind it
        self._name: str | None = None
        self._key: str | None = None
        self._root: Any = {}
        self._parts: dict[str, Any] = {}
        self._arguments: dict[str, str] = {}
        self._failed = False
        self.call: tuple[str, str] | None = None
        """The call, once it has ended."""

    def end(self, held: str) -> int | None:
        """The place behind the call, or behind what turned out to be none; None if it has not come yet."""
        while not self._failed:
            if self._name is None:
                going = self._read_name(held)
            elif self._key is None:
                going = self._read_key(held)
            else:
                going = self._read_value(held)
            if self.call is not None:
                return self._at
            if not going:
                return None
        stop = self._format.stop or ""
        at = held.find(stop, self._at)
        return at + len(stop) if at >= 0 and stop else None

    def whole(self, held: str) -> bool:
        """Whether just the end of its closing mark is missing: so much of it is there that no argument can follow."""
        if self._name is None or self._failed:
            return False
        at, place = self._at, -1
        if self._key is not None:
            mark = self._format.value_close.strip()
            place = held.find(mark, self._seek)
            at = place + len(mark)
        close, opening = ("".join(mark.split()) for mark in (self._format.close, self._format.key_open))
        rest = "".join(held[at:].split())
        shared = next((n for n, (a, b) in enumerate(zip(close, opening, strict=False)) if a != b), len(opening))
        if len(rest) <= shared or not close.startswith(rest):
            return False
        if self._key is not None and (place < 0 or not self._take_value(held[self._at : place])):
            return False
        self._finish()
        return self.call is not None

    def _read_name(self, held: str) -> bool:
        found = self._format
        head = _end_of(found.begin + found.open, held, 0) or _end_of(found.open, held, 0)
        match = _NAME.match(held, head) if head is not None else None
        if match is None or match.end() == len(held):
            return False  # a call without a name ends with its last tag
        after = _end_of(found.middle, held, match.end())
        if after is None:
            self._failed = not _begins(found.middle, held, match.end())
            return self._failed
        self._name, self._at = match[0], after
        tool = self._tools.get(self._name)
        self._root = (tool.parameters if tool is not None else None) or {}
        self._parts = properties_of(self._root)
        return True

    def _read_key(self, held: str) -> bool:
        """The name of an argument up to where its value begins, or the end of the call."""
        found = self._format
        self._at = _SPACE.match(held, self._at).end()  # type: ignore[union-attr]
        ends = _end_of(found.close, held, self._at)
        if ends is not None:
            self._at = ends
            self._finish()
            return True
        at = _end_of(found.key_open, held, self._at)
        if at is None:
            marks = (found.key_open, found.close)
            self._failed = not any(_begins(mark, held, self._at) for mark in marks)
            return self._failed
        # A name that is known may hold anything; another ends where the value begins.
        mark = found.value_open.rstrip()
        left = len(held) - at
        if any(left < len(key + mark) and (key + mark).startswith(held[at:]) for key in self._parts):
            return False
        known = [key for key in self._parts if held.startswith(key + mark, at)]
        if known:
            self._key = max(known, key=len)
            self._at = at + len(self._key + mark)
        else:
            match = _literal(mark).search(held, at)
            if match is None:
                self._failed = left > _LONGEST_NAME
                return self._failed
            self._key, self._at = held[at : match.start()].strip(), match.end()
        self._seek = self._at
        return True

    def _read_value(self, held: str) -> bool:
        found = self._format
        close = found.value_close.strip()
        while True:
            place = held.find(close, self._seek)
            if place < 0:
                self._seek = max(self._seek, len(held) - len(close) + 1)
                return False
            after = place + len(close)
            if self._blank[0] != after:
                self._blank = (after, after)
            space = _SPACE.match(held, self._blank[1]).end()  # type: ignore[union-attr]
            self._blank = (after, space)  # white space is gone over once
            marks = (found.key_open, found.close)
            ends = any(_end_of(mark, held, space) is not None for mark in marks)
            if not ends and any(_begins(mark, held, space) for mark in marks):
                return False  # what follows has not come yet
            if ends and self._take_value(held[self._at : place]):
                self._key, self._at = None, after
                return True
            self._seek = place + 1

    def _take_value(self, text: str) -> bool:
        """Whether this is all of the value. White space that the format writes around it is no part of it."""
        found, key = self._format, self._key
        assert key is not None
        part = self._parts.get(key, True)
        lead = found.value_open[len(found.value_open.rstrip()) :]
        trail = found.value_close[: len(found.value_close) - len(found.value_close.lstrip())]
        text = text.removeprefix(lead).removesuffix(trail)
        if "string" not in types_of(part, self._root) and ends_in_a_text(text):
            return False
        self._arguments[key] = read_value(text, part, self._root)
        return True

    def _finish(self) -> None:
        assert self._name is not None
        members = (f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in self._arguments.items())
        written = f"{{{', '.join(members)}}}"
        try:
            written.encode()  # half a surrogate pair is no text
            json.loads(written, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            self._failed = True
            return
        self.call = (self._name, written)


def _overlap(text: str, mark: str) -> int:
    """How many of the last characters begin a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


def _pattern(*parts: str) -> re.Pattern[str]:
    """Literals with any white space where they have some, and named groups as they are."""
    made = []
    for part in parts:
        if part.startswith("(?P<"):
            made.append(part)
        else:
            made.append(r"\s*".join(re.escape(piece) for piece in re.split(r"\s+", part)))
    return re.compile(r"\s*" + "".join(made), re.DOTALL)


def _literal(mark: str) -> re.Pattern[str]:
    """A mark, with any white space where it has some."""
    return re.compile(r"\s*".join(re.escape(piece) for piece in mark.split()))


def _end_of(mark: str, text: str, at: int) -> int | None:
    """Where a mark ends that stands here, after any white space; None if it does not."""
    match = _literal(mark).match(text, _SPACE.match(text, at).end())  # type: ignore[union-attr]
    return match.end() if match else None


def _begins(mark: str, text: str, at: int) -> bool:
    """Whether all that follows may be the beginning of a mark, after any white space."""
    if len(text) - at > 4 * len(mark) + 256:
        return False  # so much white space is in no mark
    rest, whole = "".join(text[at:].split()), "".join(mark.split())
    return len(rest) < len(whole) and whole.startswith(rest)


def ends_in_a_text(value: str) -> bool:
    """Whether JSON was cut between two quotes."""
    try:
        json.loads(value)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        pass
    return False


def _is_only(text: str, closing: str) -> bool:
    """Whether a text is the end of a call, with any id in it and any white space."""
    parts = [_pattern(part).pattern for part in closing.split(CALL_ID)]
    return re.fullmatch(r"[^\"]*".join(parts) + r"\s*", text) is not None


def _object_end(text: str, at: int) -> tuple[int, int] | None:
    """Where the JSON object that begins here begins and ends."""
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    if text[at : at + 1] != "{":
        return None
    try:
        return at, _DECODER.raw_decode(text, at)[1]
    except (ValueError, RecursionError):
        return None


def _members(text: str, at: int) -> tuple[dict[str, tuple[int, int]], int] | None:
    """The members of the JSON object that begins here, as places in the text, and where it ends."""
    whole = _object_end(text, at)
    if whole is None:
        return None
    places: dict[str, tuple[int, int]] = {}
    at = _SPACE.match(text, whole[0] + 1).end()  # type: ignore[union-attr]
    while text[at] == '"':
        key, at = scanstring(text, at + 1, True)
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        begin = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
        end = _DECODER.raw_decode(text, begin)[1]
        places[key] = (begin, end)
        at = _SPACE.match(text, end).end()  # type: ignore[union-attr]
        if text[at] == ",":
            at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
    return places, whole[1]
