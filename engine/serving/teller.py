"""What is told of a load while it goes on: words and bytes, as one report."""

from __future__ import annotations

import threading
from collections.abc import Callable

from engine.types.model_info import LoadProgress

__all__ = ["Progress", "Teller"]

Progress = Callable[[LoadProgress], None]
"""Told how far a load is."""


class Teller:
    """Joins the words and the bytes of a load into one report. Used from any thread."""

    def __init__(self, tell: Progress) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._last = LoadProgress(text="")

    def say(self, text: str) -> None:
        """Tell what is being done."""
        with self._lock:
            self._last = LoadProgress(text=text, bytes_read=self._last.bytes_read, total_bytes=self._last.total_bytes)
            self._tell(self._last)

    def read(self, count: int, total: int) -> None:
        """Tell how many bytes were read of how many."""
        with self._lock:
            self._last = LoadProgress(text=self._last.text, bytes_read=count, total_bytes=total)
            self._tell(self._last)
