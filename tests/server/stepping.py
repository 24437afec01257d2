"""A real engine that takes a step only when a test grants it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from engine import AsyncEngine


class Steps:
    """Holds the engine before each step until a test grants it: what happens "within one step" can be counted."""

    def __init__(self, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = 0
        self._permits = threading.Semaphore(0)
        self._free = False
        step = engine.engine.step

        def held() -> Any:
            if not self._free:
                self._permits.acquire(timeout=120)
            self.taken += 1
            return step()

        monkeypatch.setattr(engine.engine, "step", held)

    def grant(self, count: int = 1) -> None:
        """Let the engine take `count` steps when it has work; returns at once."""
        self._permits.release(count)

    def release(self) -> None:
        """Hold it no longer."""
        self._free = True
        self._permits.release()
