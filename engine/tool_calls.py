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

from engine.tool_format import CALL_ID, ToolFormat

__all__ = ["CallReader", "call_id"]

_TAG: Final = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{2,}\]")
_SPACE: Final = re.compile(r"\s*")


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
        found: the model's format.
        tools: the request's definitions, by name; what is not there cannot be called.
        parallel: whether more than one call is taken; the rest of the reply is then text.
    """

    __slots__ = (
        "_after", "_calling", "_ends", "_format", "_held", "_parallel", "_said", "_stop", "_tagged", "_tools",
        "_triggers", "count",
    )  # fmt: skip

    def __init__(self, found: ToolFormat, tools: Mapping[str, Mapping[str, Any]], *, parallel: bool = True) -> None:
        self._format = found
        self._tools = tools
        self._parallel = parallel
        marks = [_TAG.match(text) for text in (found.begin, found.open)]
        self._tagged = any(marks)
        self._triggers = tuple(dict.fromkeys(m[0] for m in marks if m)) or (found.open.strip()[:1],)
        tags = _TAG.findall(found.close)
        self._stop: str | None = tags[-1] if tags else None
        self._ends = found.end.strip()
        self._held = ""
        self._calling = False
        self._said = False  # whether any text but white space came out
        self._after = False  # whether a call was the last thing that came
        self.count = 0
        """Calls so far."""

    def push(self, text: str) -> tuple[str, list[tuple[str, str]]]:
        """Take a piece of text: what may be shown now, and the calls (name, arguments) that it completes."""
        self._held += text
        shown = ""
        calls: list[tuple[str, str]] = []
        while True:
            if not self._calling:
                shown += self._pass_on()
            if not self._calling or self._stop is None or (end := self._held.find(self._stop)) < 0:
                return shown, calls
            end += len(self._stop)
            text, self._held, self._calling = self._held[:end], self._held[end:], False
            call = self._take(text)
            if call is None:  # it only looked like one
                shown += text
                self._said, self._after = True, False
            else:
                calls.append(call)
                self._after = True

    def finish(self) -> tuple[str, list[tuple[str, str]]]:
        """The end of the reply: what was held back, as calls if it is whole ones, else as text."""
        held, self._held = self._held, ""
        if not self._calling:
            return ("" if self._after else held), []
        self._calling = False
        calls = self._last(held)
        return ("", calls) if calls else (held, [])

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _pass_on(self) -> str:
        """Text up to the next mark of a call. What may be the beginning of a mark stays, and white space before it."""
        if self._after:
            self._held = self._held.lstrip()
            if self._ends and self._held.startswith(self._ends):
                self._held, self._ends = self._held[len(self._ends) :].lstrip(), ""
            if not self._held or self._ends.startswith(self._held):
                return ""
        held = self._held
        if not self._tagged and self._said:
            self._held = ""  # a mark that is no tag counts only where nothing was said before it
            return held
        at = min((i for i in map(held.find, self._triggers) if i >= 0), default=-1)
        if at >= 0 and (self._tagged or not held[:at].strip()):
            self._calling, self._held = True, held[at:]
            shown = held[:at].rstrip()
        else:
            keep = len(held) - max(_overlap(held, trigger) for trigger in self._triggers)
            keep = len(held[:keep].rstrip())
            shown, self._held = held[:keep], held[keep:]
        if not shown.strip():
            return shown
        gap = "\n" if self._after and self._said else ""  # where a call stood between two texts
        self._said, self._after = True, False
        return gap + shown

    def _without_begin(self, text: str) -> str:
        """What follows the mark before the first call, if it is there; white space beside its tags is free."""
        tags = [piece for piece in re.split(f"({_TAG.pattern})", self._format.begin) if piece]
        match = re.match(r"\s*" + r"\s*".join(re.escape(piece.strip()) for piece in tags), text)
        return text[match.end() if match else 0 :].strip()

    def _is_end(self, text: str) -> bool:
        return text.strip() in ("", self._format.end.strip())

    def _take(self, text: str) -> tuple[str, str] | None:
        """One call, if the text is just that, whatever stood before its name."""
        if self.count and not self._parallel:
            return None
        found = self._format
        text = self._without_begin(text)
        try:
            call = self._pairs(text) if found.style == "pairs" else self._json(text)
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

    def _pairs(self, text: str) -> tuple[str, str] | None:
        found = self._format
        match = _pattern(found.open, r"(?P<name>[A-Za-z0-9_.-]+)", found.middle).match(text)
        if match is None:
            return None
        rest = text[match.end() :]
        end = rest.rfind(found.close.strip())
        if end < 0 or rest[end:].strip() != found.close.strip():
            return None
        pair = _pattern(found.key_open, r"(?P<key>.*?)", found.value_open, r"(?P<value>.*?)", found.value_close)
        arguments: dict[str, Any] = {}
        at = 0
        body = rest[:end].rstrip() + "\n"
        while at < len(body) - 1 and (one := pair.match(body, at)):
            key = one["key"].strip()
            arguments[key] = self._typed(match["name"], key, one["value"])
            at = one.end()
        if body[at:].strip():
            return None
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)  # 1e999 is no JSON: ValueError
        written.encode()  # half a surrogate pair, spelled as an escape, is no text: ValueError
        return match["name"], written

    def _typed(self, name: str, key: str, value: str) -> Any:
        """A value that is written without quotes: a text where the schema says so, else JSON if it is any."""
        schema = self._tools.get(name, {}).get("parameters") or {}
        properties = schema.get("properties")
        part = properties.get(key) if isinstance(properties, Mapping) else None
        if isinstance(part, Mapping) and part.get("type") == "string":
            return value
        try:
            return json.loads(value, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return value

    def _last(self, held: str) -> list[tuple[str, str]]:
        """Calls at the end of a reply: one whose closing mark the model left out, or all of a format without marks."""
        if self._stop is not None:
            call = self._take(held.rstrip() + self._missing(held))
            return [call] if call else []
        calls: list[tuple[str, str]] = []
        found = self._format
        text = self._without_begin(held)
        while text and not self._is_end(text):
            members = _members(text, 0)
            if members is None:
                return []
            call = self._take(text[: members[1]])
            if call is None:
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
