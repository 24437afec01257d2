"""rich's console, with control characters in names, paths and messages escaped."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from server.logs import printable

__all__ = ["Terminal", "one_line"]


def one_line(text: str) -> str:
    """Return text from outside as rich's markup that prints it in one line, line ends and halves of characters escaped.

    A `Terminal` leaves line ends as they are: with them, a name could look like a line that the program itself wrote.
    """
    return escape(printable(text.encode(errors="backslashreplace").decode()))


class Terminal(Console):
    """A console that escapes control characters (`\\x1b`), except those that rich itself writes."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, with each segment's text escaped. Colours and cursor movements are not in the text."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, keep="\n\t"), style, control)
