"""Finds stop strings in text that arrives in pieces. Knows characters, no tokens.

StopStrings    an automaton for all stop strings of a request; immutable, shared by its choices
StopMatcher    passes the text of one choice on, up to the first stop string
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

__all__ = ["StopMatcher", "StopStrings"]


class StopStrings:
    """The automaton of Aho and Corasick over a request's stop strings: one step per character, however many there are.

    A state stands for the longest end of the text that begins a stop string. Immutable after construction.
    """

    __slots__ = ("_fail", "_next", "depth", "longest")

    def __init__(self, stops: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]
        """By state, how many of the last characters begin a stop string."""
        self.longest = [0]
        """By state, the length of the longest stop string that ends here; 0 if none does."""
        for stop in stops:
            self._add(stop)
        self._fail = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], char)
                self.longest[child] = self.longest[child] or self.longest[self._fail[child]]
                queue.append(child)

    def _add(self, stop: str) -> None:
        if not stop:
            raise ValueError("an empty stop string would match at once")
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self.longest.append(0)
            state = self._next[state][char]
        self.longest[state] = len(stop)

    def __bool__(self) -> bool:
        return len(self._next) > 1

    def step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)


class StopMatcher:
    """Passes text on up to the first stop string, and never a part of one.

    After each `push`, if the text so far contains a stop string, it ends before the one that begins first. Pushes are
    tokens, so a longer stop string that begins earlier loses to one that an earlier token completed. The answer is
    always the text of the generated tokens, cut at its first stop string.
    """

    __slots__ = ("_held", "_state", "_stops", "found")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = 0
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text: of those that begin where it ends, the first to be complete."""

    def push(self, text: str) -> tuple[str, bool]:
        """Take a piece of text; return the text that is certain, and whether a stop string was found."""
        stops = self._stops
        if not stops:
            return text, False
        text, begin = self._held + text, len(self._held)
        first = len(text)
        state = self._state
        for end in range(begin, len(text)):
            state = stops.step(state, text[end])
            length = stops.longest[state]
            if length and end + 1 - length < first:
                first = end + 1 - length
                self.found = text[first : end + 1]
        if first < len(text):
            self._state, self._held = 0, ""
            return text[:first], True
        shown = len(text) - stops.depth[state]
        self._state, self._held = state, text[shown:]
        return text[:shown], False

    def pass_on(self, text: str) -> str:
        """Take a piece of text in which a stop string counts for nothing; return what no later match can begin in."""
        stops = self._stops
        if not stops:
            return text
        held, state = self._held + text, self._state
        for character in text:
            state = stops.step(state, character)
            if stops.longest[state]:
                state = 0
        shown = len(held) - stops.depth[state]
        self._state, self._held = state, held[shown:]
        return held[:shown]

    @property
    def held(self) -> str:
        """The text that is held back."""
        return self._held

    def release(self) -> str:
        """Return the text held back. No later match begins in it."""
        held, self._held, self._state = self._held, "", 0
        return held
