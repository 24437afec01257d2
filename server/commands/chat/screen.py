"""Where a conversation is shown and typed: a terminal, or pipes. No control character of a model reaches a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Final, TextIO

from server.commands.chat.talker import Piece
from server.logs import printable

__all__ = ["Screen"]

_DIM: Final = "\x1b[2m"
_PLAIN: Final = "\x1b[0m"
_QUOTES: Final = '"""'


class Screen:
    """Reads messages from standard input, writes replies to standard output and everything else to standard error."""

    def __init__(self, source: TextIO | None = None, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._in, self._out, self._err = source or sys.stdin, out or sys.stdout, err or sys.stderr
        self._on_terminal = self._out.isatty()
        colours = "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._dims = self._on_terminal and colours
        self._err_dims = self._err.isatty() and colours
        self.interactive = self._in.isatty()
        """Whether a person types."""
        self._thinking = False
        if self.interactive:
            with contextlib.suppress(ImportError):  # arrows and history in this process; nothing is written to a file
                import readline  # noqa: F401

    def read(self) -> str | None:
        """Return the next message, which may have several lines; None at the end.

        A line that ends with a backslash goes on in the next one; three quotes begin and end a message of many lines.
        """
        line = self._line("> ")
        if line is None:
            return None
        if line.strip().startswith(_QUOTES):
            return self._quoted(line.strip().removeprefix(_QUOTES))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            following = self._line("… ")
            if following is None:
                break
            lines.append(following)
        return "\n".join(lines)

    def piece(self, piece: Piece) -> None:
        """Show a part of a reply. Thoughts are dimmed on a terminal and left out elsewhere."""
        if piece.thought and not self._on_terminal:
            return
        if piece.thought != self._thinking:
            self._thinking = piece.thought
            if not piece.thought:
                self._out.write("\n")
            self._paint(_DIM if piece.thought else _PLAIN)
        # Elsewhere than on a terminal the text is the text, to the byte.
        self._out.write(printable(piece.text, keep="\n\t") if self._on_terminal else piece.text)
        self._out.flush()

    def end(self) -> None:
        """End a reply's text."""
        if self._thinking:
            self._thinking = False
            self._paint(_PLAIN)
        self._out.write("\n")
        self._out.flush()

    def note(self, text: str) -> None:
        """Say something about a reply, or in answer to a command."""
        told = printable(text, keep="\n")
        print(f"{_DIM}{told}{_PLAIN}" if self._err_dims else told, file=self._err, flush=True)

    def _paint(self, code: str) -> None:
        if self._dims:
            self._out.write(code)

    def _quoted(self, first: str) -> str:
        lines: list[str] = []
        line: str | None = first
        while line is not None:
            if line.rstrip().endswith(_QUOTES):
                lines.append(line.rstrip().removesuffix(_QUOTES))
                break
            lines.append(line)
            line = self._line("… ")
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        if self.interactive and self._on_terminal and self._in is sys.stdin:
            try:
                return input(prompt)
            except EOFError:
                self._out.write("\n")
                return None
        if self.interactive:
            print(prompt, end="", file=self._err, flush=True)
        line = self._in.readline()
        return line.removesuffix("\n").removesuffix("\r") if line else None
