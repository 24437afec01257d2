"""The terminal: rich's console, without what a name, a path or a message from elsewhere could make a terminal do."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from server.logs import printable

__all__ = ["Terminal"]


class Terminal(Console):
    """A console that writes control characters out (`\\x1b`), save for those that rich makes itself."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does it. Colours are a segment's style and cursor movements its control; its text is only text."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, keep="\n\t"), style, control)
