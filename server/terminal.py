"""rich's console, with control characters in names, paths and messages escaped."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from server.logs import printable

__all__ = ["Terminal"]


class Terminal(Console):
    """A console that escapes control characters (`\\x1b`), except those that rich itself writes."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, with each segment's text escaped. Colours and cursor movements are not in the text."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, keep="\n\t"), style, control)
