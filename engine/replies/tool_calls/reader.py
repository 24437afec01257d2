"""`CallReader`: separates tool calls from text while a reply is generated. No tokens, no torch, no HTTP.

A call is returned only when it is complete and valid: the name of a tool, and arguments that are a JSON object. One
that breaks off with the reply is left out. What else follows an opening delimiter is returned as text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from engine.replies.delimiters import TAG, overlap
from engine.replies.tool_calls.json_notation import JsonCall
from engine.replies.tool_calls.pairs_notation import PairsCall
from engine.replies.tool_format import ToolFormat
from engine.types.reply_format import ReplyFormat

__all__ = ["CallReader", "call_id"]


def call_id(seed: int, choice: int, prompt: Sequence[int], number: int) -> str:
    """Return the id of a call: `call_` and nine letters and digits, the same whenever the request is repeated.

    Nine, because some templates show ids to the model and accept no other length.
    """
    text = f"{seed}/{choice}/{number}/{','.join(map(str, prompt))}"
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:12], "big")
    letters = "0123456789abcdefghijklmnopqrstuvwxyz"
    return "call_" + "".join(letters[digest // 36**i % 36] for i in range(9))


class CallReader:
    """Reads the text of one choice piece by piece, and returns text and calls.

    Args:
        tool_format: how the model writes calls.
        reply_format: how this reply is to be read. Only its tools can be called.
    """

    __slots__ = (
        "_after", "_block", "_call", "_calling", "_confirmed", "_ends", "_exact", "_first", "_format", "_gap", "_held",
        "_parallel", "_said", "_tools", "_triggers", "count",
    )  # fmt: skip

    def __init__(self, tool_format: ToolFormat, reply_format: ReplyFormat) -> None:
        self._format = tool_format
        self._tools = {tool.name: tool for tool in reply_format.tools}
        self._parallel = reply_format.parallel_tool_calls
        self._exact = reply_format.exact_calls
        self._first = reply_format.calls_or_answer or not tool_format.tagged
        self._confirmed = False  # that what is held begins as a call does
        tags = [match[0] for match in map(TAG.match, (tool_format.begin, tool_format.open)) if match]
        if self._exact:
            tags = tags[:1]
        self._triggers = tuple(dict.fromkeys(tags)) or (tool_format.open.strip()[:1],)
        self._ends = tool_format.end.strip()
        self._held = ""
        self._gap = ""  # white space before the opening of what may be a call
        self._calling = False
        self._call = self._new_call()
        self._said = False  # whether any text but white space came out
        self._after = False  # whether a call was the last thing that came
        self._block = False  # whether the next call may follow without an opening tag
        self.count = 0
        """Calls so far."""

    @property
    def held(self) -> str:
        """The text that is held back, because a call may have begun in it."""
        return self._gap + self._held if self._calling else self._held

    def push(self, text: str) -> tuple[str, list[tuple[str, str]]]:
        """Take a piece of text; return the text that is certain, and the calls (name, arguments) that it completes."""
        self._held += text
        return self._read(end=False)

    def finish(self, *, cut: bool = False) -> tuple[str, list[tuple[str, str]]]:
        """End the reply; return what was held back, as calls if they are complete, else as text.

        A call that breaks off is left out. `cut`: the reply was ended by a limit; then what may be the beginning of a
        call's opening is left out, too, and otherwise it is text.
        """
        shown, calls = self._read(end=True, cut=cut)
        held, self._held = self._held, ""
        if cut and held.strip():  # the beginning of an opening
            held = ""
        if self._after:  # white space beside a call, and the beginning of what ends a block, belong to nothing
            held = "" if self._ends.startswith(held.strip()) else self._beside(held.strip())
        return shown + held, calls

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _new_call(self) -> JsonCall | PairsCall:
        if self._format.style == "json":
            return JsonCall(self._format, self._tools, exact=self._exact)
        return PairsCall(self._format, self._tools)

    def _read(self, *, end: bool, cut: bool = False) -> tuple[str, list[tuple[str, str]]]:
        shown = ""
        calls: list[tuple[str, str]] = []
        while True:
            if not self._calling:
                shown += self._pass_on()
                if not self._calling:
                    return shown, calls
                self._call = self._new_call()
            if not self._format.tagged and self._is_answer():
                text, self._held, self._calling = self._held, "", False
                shown += self._beside(self._gap + text)
                continue
            place = self._call.end(self._held) if self._format.tagged else None
            if place is None and not end:
                return shown, calls
            if place is None and (last := self._last(self._held)):
                self._held, self._calling, self._after = "", False, True
                return shown, calls + last
            if place is None and self._breaks_off(cut):
                self._held, self._calling = "", False
                return shown, calls
            if place is None:  # it never ended: its closing tag may stand in a string whose quote is missing
                place = self._first_stop()
            text, self._held, self._calling = self._held[:place], self._held[place:], False
            call = self._take(text)
            if call is None:  # it only began like one
                shown += self._beside(self._gap + text)
                self._block = False
            else:
                calls.append(call)
                self._after = self._block = True

    def _beside(self, text: str) -> str:
        """Return text to be shown, on a line of its own if a call stood between it and earlier text."""
        gap = "\n" if self._after and self._said else ""
        if gap or self._after:
            text = text.lstrip()
        self._said, self._after = True, False
        return gap + text

    def _pass_on(self) -> str:
        """Return the text before the next opening tag of a call. What may become such a tag is held back."""
        if self._after and not self._follow():
            return ""
        held = self._held
        if self._first and self._said:
            self._held = ""  # a call counts only where no text precedes it
            return held
        at = min((i for i in map(held.find, self._triggers) if i >= 0), default=-1)
        if at >= 0 and (not self._first or not held[:at].strip()):
            shown = held[:at].rstrip()
            self._calling, self._gap, self._held = True, held[len(shown) : at], held[at:]
        else:
            keep = len(held) - max(overlap(held, trigger) for trigger in self._triggers)
            keep = len(held[:keep].rstrip())
            shown, self._held = held[:keep], held[keep:]
        if not shown.strip():
            return shown
        self._block = False
        return self._beside(shown)

    def _follow(self) -> bool:
        """After a call, skip the end of its block or begin its next call. Return False to wait for more text."""
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
            tag = TAG.match(opening)
            opening = tag[0] if tag else opening[:1]
            rest = held.removeprefix(between).lstrip()
            if held.startswith(between) and rest.startswith(opening):
                self._calling, self._gap, self._held = True, held[: len(held) - len(rest)], rest
                return False
            if between.startswith(held) or (held.startswith(between) and opening.startswith(rest)):
                return False
        return True

    def _is_answer(self) -> bool:
        """Whether the held text, in a format without tags, certainly begins no call of one of the tools."""
        opens = None if self._confirmed else self._call.opens(self._held)
        self._confirmed = self._confirmed or opens is True
        return opens is False

    def _breaks_off(self, cut: bool) -> bool:
        """Whether what is held is a call that the end of the reply cuts, and not a text that only names a tag."""
        self._call.end(self._held)  # which also says how far it has come; no more than once where a call has tags
        begun = self._call.begun(self._held)
        return cut if begun is None else begun

    def _first_stop(self) -> int:
        """Return how far a call that never ended reaches: to the first closing tag, even one inside a string."""
        stop = self._format.stop
        at = self._held.find(stop) if stop is not None else -1
        return at + len(stop) if stop is not None and at >= 0 else len(self._held)

    def _take(self, text: str) -> tuple[str, str] | None:
        """Return the call, and count it, if the text is one call of one of the tools."""
        if self.count and not self._parallel:
            return None
        try:
            call = self._call.read(text)
        except (ValueError, RecursionError):  # no JSON, or nested beyond what Python bears
            return None
        if call is None or call[0] not in self._tools:
            return None
        self.count += 1
        return call

    def _last(self, held: str) -> list[tuple[str, str]]:
        """Read the calls at the end of a reply that lack their closing tag, or belong to a format without one."""
        count, calls = self.count, []
        for text in self._call.unfinished(held):
            call = self._take(text)
            if call is None:
                self.count = count
                return []
            calls.append(call)
        return calls
