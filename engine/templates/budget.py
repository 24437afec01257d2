"""`Budget`: limits the steps and the characters of one rendering of a chat template. Knows no template.

The limits are counts, not clocks, so a rendering that is refused is refused on every machine.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Final, NoReturn

from jinja2.exceptions import TemplateError

__all__ = ["MOST_BITS", "MOST_WIDTH", "Budget", "OverBudget", "current"]

STEPS: Final = 4_000_000
STEPS_PER_MESSAGE: Final = 20_000
"""In addition, for each message and each tool. Of published templates gpt-oss's takes most: 4,000 for a message among
two thousand, and 20,000 for a tool of sixty parameters (docs/decisions/0022)."""
CHARACTERS: Final = 1 << 26
CHARACTERS_PER_CHARACTER: Final = 64
"""In addition, for each character of the request: a template searches each text a dozen times."""
HEAVIEST: Final = 1 << 26
"""Characters of one text, list or dictionary that a template makes."""
MOST_WIDTH: Final = 100_000
"""Characters of a field, an indentation or a piece, or entries, that a template may ask for by a number. Equal to the
sandbox's own bound on `range`."""
MOST_BITS: Final = 1 << 16
"""Bits of a whole number: products and powers of larger ones take long."""
_ENTRY: Final = 8
"""The weight in characters of a number, a None or a place in a list."""
_NOTED: Final = 64
"""The weight from which a container's weight is noted, so that it is not counted again."""


class OverBudget(TemplateError):
    """The template exceeded its budget. The message continues `The chat template …`."""


class Budget:
    """The remaining steps and characters of one rendering, and the weights of the values that it has made.

    A value's weight is the length of its text. A list may contain the same list twice, forty levels deep, so the weight
    of each container that a template makes is computed once, from the weights of its parts, and noted.
    """

    __slots__ = ("_most_characters", "_most_steps", "_notes", "characters", "steps")

    def __init__(self, messages: int, characters: int) -> None:
        """Start with the budget of a request with so many messages and tools, and so many characters in them."""
        self._most_steps = self.steps = STEPS + STEPS_PER_MESSAGE * messages
        self._most_characters = self.characters = CHARACTERS + CHARACTERS_PER_CHARACTER * characters
        self._notes: dict[int, tuple[int, Any]] = {}  # by id; the value is kept, or its id would be another's

    def step(self, count: int) -> None:
        self.steps -= count
        if self.steps < 0:
            self.end()

    def spend(self, characters: int) -> None:
        self.characters -= characters
        if self.characters < 0:
            self.end()

    def end(self) -> NoReturn:
        """Raise `OverBudget`, which says whether steps or characters ran out."""
        if self.steps < 0:
            raise OverBudget(f"takes more than {self._most_steps} steps")
        raise OverBudget(f"reads and makes more than {self._most_characters} characters")

    def spend_on(self, value: Any) -> None:
        """Count the characters of a value."""
        self.spend(len(value) if type(value) is str else self.weight(value))

    def made(self, value: Any) -> Any:
        """Count a value that was just made, note its weight, and return it."""
        kind = type(value)
        if kind is str:
            self.spend(len(value))
        elif kind is int:
            if value.bit_length() > MOST_BITS:
                raise OverBudget(f"makes a number of more than {MOST_BITS} bits")
        elif isinstance(value, _CONTAINERS):
            self.spend(_ENTRY * len(value))
            if self.weight(value) > HEAVIEST:
                raise OverBudget(f"makes a value of more than {HEAVIEST} characters")
        elif isinstance(value, str | bytes):
            self.spend(len(value))
        return value

    def noted(self, value: Any) -> int:
        """Return the weight of a container that the template made; 0 for one that came with the request."""
        note = self._notes.get(id(value))
        return note[0] if note is not None else 0

    def weight(self, value: Any) -> int:
        """Return the approximate length of a value's text."""
        if isinstance(value, str | bytes):
            return len(value)
        if not isinstance(value, _CONTAINERS):
            return _ENTRY
        note = self._notes.get(id(value))
        if note is not None:
            return note[0]
        self.step(1 + len(value))
        total = _ENTRY
        parts: Any = value.items() if isinstance(value, dict) else value
        for part in parts:
            total += (len(part) if type(part) is str else self.weight(part)) + _ENTRY
        if total >= _NOTED:
            self._notes[id(value)] = total, value
        return total


_CONTAINERS: Final[Any] = (list, tuple, dict, type({}.items()), type({}.values()), type({}.keys()))

current: ContextVar[Budget] = ContextVar("budget")
"""The budget of the current rendering."""
