"""What `verbatim serve` says before a model is loaded. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine import PROJECT_VERSION
from server.hosts import LOOPBACK

if TYPE_CHECKING:
    from engine import ModelConfig
    from server.settings import ServerSettings

__all__ = ["example_request", "first_line", "further_lines"]


def first_line(address: str, *, page: bool = True) -> str:
    """Return the first line: it is printed as soon as the socket is open. `page`: whether one is served there."""
    return f"verbatim {PROJECT_VERSION} · {address}" + " · open it in a browser" * page


def further_lines(settings: ServerSettings, address: str, entries: Sequence[ModelConfig], *, keys: bool) -> list[str]:
    """Return what a client needs to know, below the first line."""
    lines = []
    if keys:
        lines.append("Every request needs a key: Authorization: Bearer KEY")
    elif settings.host not in LOOPBACK:
        lines.append("Anybody who reaches this address can use it: there are no keys.")
    noisy = [entry.id for entry in entries if entry.builtin == "noise"]
    lines += [f"{name} is a tiny random model: its text is noise. Put your own into models.yaml." for name in noisy]
    lines.append(f"Clients use {address}/v1. Try, once a model is ready:")
    lines.append("  " + example_request(address, entries[0].id, keys=keys))
    if all(entry.builtin == "demo" or entry.id == "demo" for entry in entries):
        lines.append("The demo model knows little. A real one in one command (89 MiB): verbatim models get smollm2")
    return lines


def example_request(address: str, model: str, *, keys: bool = False) -> str:
    """Return a request as a line to paste into a shell."""
    key = "-H 'Authorization: Bearer KEY' " if keys else ""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], "seed": 7})
    quoted = body.replace("'", "'\\''")  # inside single quotes, a shell knows no escape
    return f"curl {address}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{quoted}'"
