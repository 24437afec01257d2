"""Loads one model for a command, with its progress shown on standard error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from server.configuration import before_anything_heavy

if TYPE_CHECKING:
    from engine import LLM, ModelConfig

__all__ = ["load", "open_model"]

Tell = Callable[[str], None]


def open_model(entry: ModelConfig, pull: bool) -> LLM:
    """Load a model. Its live line vanishes once it is loaded.

    Raises:
        VerbatimError: see its message.
    """
    from server.progress.display import Display
    from server.terminal import Terminal

    before_anything_heavy(pull)
    with Display(Terminal(stderr=True), transient=True) as display:
        display.tell(entry.id, "loading")
        return load(entry, pull, lambda text: display.tell(entry.id, text))


def load(entry: ModelConfig, pull: bool, tell: Tell) -> LLM:
    """Load a model; `tell` hears what is done."""
    from engine import LLM

    return LLM.from_config(entry, pull=pull, progress=tell)
