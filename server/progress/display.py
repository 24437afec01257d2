"""Shows models while they load: a live line for each on a terminal; elsewhere plain lines, without control characters.

Draws what it is told; knows no registry and no engine.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Final, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from server.progress.lines import LOADING, ModelLine, line_of
from server.terminal import one_line

if TYPE_CHECKING:
    from typing import Self

    from engine import ModelStatus

__all__ = ["Display"]

_MARKS: Final = {"ready": "[green]✓[/]", "failed": "[bold red]✗[/]", "dead": "[bold red]✗[/]"}
_A_SECOND: Final = 4  # redraws of a live line


class Display:
    """The lines of all models that load. Safe to use from several threads. As a context it ends the live lines.

    Args:
        transient: the live lines vanish at the end, because something else is the command's result.
        clock: seconds, for how long a model has been loading.
    """

    def __init__(
        self, console: Console, *, transient: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._transient, self._clock = console, transient, clock
        self._lock = threading.RLock()
        self._lines: dict[str, ModelLine] = {}
        self._began: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._live: Live | None = None
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def tell(self, model_id: str, text: str, done: int | None = None, total: int | None = None) -> None:
        """Show what is done for a model that loads. `done`, `total`: bytes, where they are known."""
        self.show(ModelLine(model_id, "loading", text, done, total))

    def look(self, statuses: Iterable[ModelStatus]) -> None:
        """Show the state of every model. Its adapters, which are listed behind it, come and go with it."""
        for status in statuses:
            if status.parent is None:
                self.show(line_of(status))

    def show(self, line: ModelLine) -> None:
        """Show the new line of one model."""
        with self._lock:
            before = self._lines.get(line.model_id)
            if line == before:
                return
            self._lines[line.model_id] = line
            self._time(line, before)
            with contextlib.suppress(OSError):  # a terminal that has gone is no reason for anything to fail
                if self._console.is_terminal and self._open and not self._transient_end(line):
                    self._draw()
                elif line.differs(before) and line.state != "waiting":
                    self._print(line)

    def close(self) -> None:
        """End the live lines. Later lines are printed one below the other. Safe to call twice."""
        with self._lock:
            self._open = False
            if self._live is not None:
                with contextlib.suppress(OSError):
                    self._live.stop()
                self._live = None

    @property
    def stream(self) -> TextIO:
        """Where the log writes: above the live lines, or to standard error where there are none."""
        return _Above(self) if self._console.is_terminal else sys.stderr  # type: ignore[return-value]

    def write(self, text: str) -> None:
        """Write lines of a log above the live lines."""
        with self._lock, contextlib.suppress(OSError):
            self._console.print(text.removesuffix("\n"), markup=False, highlight=False, soft_wrap=True)

    def _transient_end(self, line: ModelLine) -> bool:
        return self._transient and line.state not in LOADING and self._live is None

    def _time(self, line: ModelLine, before: ModelLine | None) -> None:
        if line.state == "loading" and (before is None or before.state != "loading"):
            self._began[line.model_id] = self._clock()
        elif line.state != "loading" and before is not None and before.state == "loading":
            self._took[line.model_id] = self._clock() - self._began[line.model_id]

    def _draw(self) -> None:
        if self._live is None:
            self._live = Live(
                get_renderable=self._table,
                console=self._console,
                refresh_per_second=_A_SECOND,
                transient=self._transient,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        if not any(line.state in LOADING for line in self._lines.values()):
            self.close()  # the last state of each line stays

    def _table(self) -> Table:
        """Return a line for each model; it is as wide as the terminal at most.

        Takes no lock: rich's thread calls it with its own, which whoever shows a line waits for with ours.
        """
        table = Table.grid(padding=(0, 1))
        for _ in range(2):
            table.add_column(no_wrap=True)
        table.add_column(no_wrap=self._open, overflow="ellipsis" if self._open else "fold")
        table.add_column(no_wrap=True, justify="right", style="dim")
        for line in list(self._lines.values()):
            mark = _MARKS.get(line.state, "[cyan]…[/]" if line.state == "loading" else " ")
            table.add_row(mark, f"[bold]{one_line(line.model_id)}[/]", one_line(line.sentence), self._seconds(line))
        return table

    def _seconds(self, line: ModelLine) -> str:
        if line.state == "loading":
            now = self._clock()
            return f"{now - self._began.get(line.model_id, now):.0f} s"
        took = self._took.get(line.model_id)
        return "" if took is None else f"{took:.1f} s"

    def _print(self, line: ModelLine) -> None:
        took = self._took.get(line.model_id)
        after = f" ({took:.1f} s)" if took is not None and line.state == "ready" else ""
        state = "ready · " if line.state == "ready" else ""
        told = f"{line.model_id}: {state}{line.sentence}{after}"
        self._console.print(one_line(told), highlight=False, soft_wrap=True)


class _Above:
    """A stream for a log handler."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def write(self, text: str) -> int:
        self._display.write(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""
