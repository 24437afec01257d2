"""Tool calls whose arguments are written one by one, as pairs of key and value without JSON's quotes.

    begin  open NAME middle  key_open KEY value_open VALUE value_close  …  close  end

A value ends where its closing delimiter precedes another argument or the end of the call, so a delimiter inside a value
is text. A value that must be JSON ends where the JSON does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from engine.replies.delimiters import SPACE, begins, end_of, has_begun, literal
from engine.replies.tool_calls.json_notation import ends_in_string, no_constant
from engine.replies.tool_format import ToolFormat
from engine.text.json_schema import properties_of, read_value, types_of
from engine.types.tools import Tool

__all__ = ["PairsCall"]

_NAME: Final = re.compile(r"[A-Za-z0-9_./-]{1,128}")
_LONGEST_NAME: Final = 4096  # of an argument that no schema names


class PairsCall:
    """One call with its arguments as pairs, read while its text grows."""

    __slots__ = (
        "_arguments", "_at", "_blank", "_failed", "_format", "_key", "_name", "_parts", "_root", "_seek", "_tools",
        "_whole",
    )  # fmt: skip

    def __init__(self, tool_format: ToolFormat, tools: Mapping[str, Tool]) -> None:
        self._format = tool_format
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
        self._whole: tuple[str, str] | None = None  # the call, once it has ended

    def end(self, held: str) -> int | None:
        """Return where the call, or what turned out to be none, ends; None if it has not ended yet.

        Each `held` must begin with the one before.
        """
        while not self._failed:
            if self._name is None:
                going = self._read_name(held)
            elif self._key is None:
                going = self._read_key(held)
            else:
                going = self._read_value(held)
            if self._whole is not None:
                return self._at
            if not going:
                return None
        stop = self._format.stop or ""
        at = held.find(stop, self._at) if stop else -1
        if at >= 0:
            return at + len(stop)
        self._at = max(self._at, len(held) - len(stop) + 1)  # what was searched is not searched again
        return None

    def read(self, text: str) -> tuple[str, str] | None:
        """Return the name and the arguments of the call that `end` or `unfinished` found; None if it was none."""
        return self._whole

    def unfinished(self, held: str) -> list[str]:
        """Return the end of a reply, as the text of one call, if only the rest of its closing delimiter is missing."""
        return [held] if self._lacks_only_its_end(held) else []

    def opens(self, held: str) -> bool | None:
        """Say whether a text begins as the format writes a call; None if that cannot be told yet."""
        begun, opening = ("".join(part.split()) for part in (held, self._format.open))
        return True if begun.startswith(opening) else None if opening.startswith(begun) else False

    def begun(self, held: str) -> bool | None:
        """Say whether a text that has not ended is a call that has begun; None if so far it is but an opening.

        To be asked after `end`. What can be no call of one of the tools has not begun.
        """
        opened = has_begun(held, self._format.begin, self._format.open)
        if self._failed or not opened:
            return False if self._failed else opened
        if self._name is not None:
            return self._name in self._tools
        head = end_of(self._format.begin + self._format.open, held, 0) or end_of(self._format.open, held, 0)
        match = _NAME.match(held, head) if head is not None else None
        if match is None or match.end() < len(held):
            return match is not None and match[0] in self._tools
        return any(tool.startswith(match[0]) for tool in self._tools)

    def _lacks_only_its_end(self, held: str) -> bool:
        """Whether so much of the closing delimiter is there that no argument can follow."""
        if self._name is None or self._failed:
            return False
        at, place = self._at, -1
        if self._key is not None:
            delimiter = self._format.value_close.strip()
            place = held.find(delimiter, self._seek)
            at = place + len(delimiter)
        close, opening = ("".join(delimiter.split()) for delimiter in (self._format.close, self._format.key_open))
        rest = "".join(held[at:].split())
        shared = next((n for n, (a, b) in enumerate(zip(close, opening, strict=False)) if a != b), len(opening))
        if len(rest) <= shared or not close.startswith(rest):
            return False
        if self._key is not None and (place < 0 or not self._take_value(held[self._at : place])):
            return False
        self._finish()
        return self._whole is not None

    def _read_name(self, held: str) -> bool:
        found = self._format
        head = end_of(found.begin + found.open, held, 0) or end_of(found.open, held, 0)
        match = _NAME.match(held, head) if head is not None else None
        if match is None or match.end() == len(held):
            return False  # a call without a name ends with its last tag
        after = end_of(found.middle, held, match.end())
        if after is None:
            self._failed = not begins(found.middle, held, match.end())
            return self._failed
        self._name, self._at = match[0], after
        tool = self._tools.get(self._name)
        self._root = (tool.parameters if tool is not None else None) or {}
        self._parts = properties_of(self._root)
        return True

    def _read_key(self, held: str) -> bool:
        """Read the name of an argument, up to where its value begins, or the end of the call."""
        found = self._format
        self._at = SPACE.match(held, self._at).end()  # type: ignore[union-attr]
        ends = end_of(found.close, held, self._at)
        if ends is not None:
            self._at = ends
            self._finish()
            return True
        at = end_of(found.key_open, held, self._at)
        if at is None:
            expected = (found.key_open, found.close)
            self._failed = not any(begins(delimiter, held, self._at) for delimiter in expected)
            return self._failed
        # A name that is known may hold anything; another ends where the value begins.
        delimiter = found.value_open.rstrip()
        left = len(held) - at
        if any(left < len(key + delimiter) and (key + delimiter).startswith(held[at:]) for key in self._parts):
            return False
        known = [key for key in self._parts if held.startswith(key + delimiter, at)]
        if known:
            self._key = max(known, key=len)
            self._at = at + len(self._key + delimiter)
        else:
            match = literal(delimiter).search(held, at)
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
            space = SPACE.match(held, self._blank[1]).end()  # type: ignore[union-attr]
            self._blank = (after, space)  # white space is gone over once
            following = (found.key_open, found.close)
            ends = any(end_of(delimiter, held, space) is not None for delimiter in following)
            if not ends and any(begins(delimiter, held, space) for delimiter in following):
                return False  # what follows has not come yet
            if ends and self._take_value(held[self._at : place]):
                self._key, self._at = None, after
                return True
            self._seek = place + 1

    def _take_value(self, text: str) -> bool:
        """Take a value, and say whether it was all of it. White space that the format writes around it is left out."""
        found, key = self._format, self._key
        assert key is not None
        part = self._parts.get(key, True)
        lead = found.value_open[len(found.value_open.rstrip()) :]
        trail = found.value_close[: len(found.value_close) - len(found.value_close.lstrip())]
        text = text.removeprefix(lead).removesuffix(trail)
        if "string" not in types_of(part, self._root) and ends_in_string(text):
            return False
        self._arguments[key] = read_value(text, part, self._root)
        return True

    def _finish(self) -> None:
        assert self._name is not None
        members = (f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in self._arguments.items())
        written = f"{{{', '.join(members)}}}"
        try:
            written.encode()  # half a surrogate pair is no text
            json.loads(written, parse_constant=no_constant)
        except (ValueError, RecursionError):
            self._failed = True
            return
        self._whole = (self._name, written)
