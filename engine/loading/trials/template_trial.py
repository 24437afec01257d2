"""Render a chat template for the first time in a child process, which may crash. Knows no tokens and no model.

A template comes with a checkpoint and is untrusted. Each rendering has a budget (`engine.templates.budget`), which
limits counted work; the child limits time and memory, for work that is not counted. What succeeds there is rendered
again in this process. Where a system has no such child processes (Windows), only the budget applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from engine.confined.process import AVAILABLE, Confined, ConfinedError, ConfinedFault
from engine.errors import LoadError
from engine.replies import reasoning, tool_format
from engine.templates.chat_template import ChatTemplate

__all__ = ["check", "render"]

SECONDS: Final = 20.0
"""Processor time for the dozen renderings below. A published template takes 5 milliseconds for all of them."""
MEMORY: Final = 1 << 30


def check(source: str | None, tool_use: str | None, special_tokens: Mapping[str, str]) -> None:
    """Render everything that loading renders, in a child process.

    Raises:
        LoadError: the template is not valid, or exceeds the limits.
    """
    if source is None or not AVAILABLE:
        return
    confined = Confined("templates", seconds=SECONDS, memory_bytes=MEMORY, at_once=1)
    given = {"source": source, "tool_use": tool_use, "special_tokens": dict(special_tokens)}
    try:
        confined.call("engine.loading.trials.template_trial:render", given)
    except ConfinedFault as fault:
        raise LoadError(f"The chat template was tried in a process of its own, which {fault}.") from None
    except ConfinedError as error:
        raise LoadError(f"{error}" if error.kind == "LoadError" else f"The chat template: {error}") from None
    finally:
        confined.close()


def render(given: Mapping[str, Any]) -> None:
    """Render everything that loading renders: to find how content, thoughts and calls are written."""
    template = ChatTemplate(given["source"], given["special_tokens"], tool_use=given["tool_use"])
    reasoning.find_reasoning_format(template)
    tool_format.find_tool_format(template)
