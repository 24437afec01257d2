"""Begins to load the models at once: each in a process of its own, while this one imports what serves them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from engine import Registry
from server import logs
from server.progress.display import Display

if TYPE_CHECKING:
    from rich.console import Console

    from engine import ModelConfig
    from server.settings import ServerSettings

__all__ = ["loading"]


@contextmanager
def loading(
    entries: Sequence[ModelConfig], settings: ServerSettings, *, pull: bool, console: Console
) -> Iterator[tuple[Registry, Display]]:
    """Set up the log, and load the models inside the `with` block; its end closes the models and their display.

    SIGTERM ends the block, and this process with 0, as it does once the server runs.

    Models that load in this process wait until `Registry.start` is called again: two threads that import large
    libraries at once would see each other's halves.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with _loading(entries, settings, pull, console) as both:
            yield both
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _loading(
    entries: Sequence[ModelConfig], settings: ServerSettings, pull: bool, console: Console
) -> Iterator[tuple[Registry, Display]]:
    with Display(console) as display:
        logs.configure(settings.log_format, access_log=settings.access_log, stream=display.stream)
        registry = Registry(
            entries, pull=pull, on_progress=lambda *_: display.look(registry.list()), max_loaded=settings.max_loaded
        )
        try:
            if all(entry.isolation == "process" for entry in entries):
                registry.start()
            yield registry, display
        finally:
            registry.close()
