"""What every client's script shares: where the server is, what is asked, and how the outcome of each try is told.

A script runs in its client's own environment, so this file needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import time
import traceback
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = os.environ["CLIENT_ROOT"]
BASE = f"{ROOT}/v1"
MODEL = "test"
KEY = "none"
QUESTION = "What is 2 + 2?"
ANSWER = "The answer is 4."

ADD: dict[str, Any] = {"call": "add", "arguments": {"a": 2, "b": 2}}
"""What the model does in the try with tools: it calls `add`, and says `ANSWER` once it has the result."""
DRAWN = {"drawn": "[a-z]{16}"}
"""The model draws a text of this form: for tries of seeds, which a scripted reply would pass whatever the seed."""
FREE = {"free": True}
"""The model says what its weights say, in the form that is asked for."""

Try = Callable[[], object]


def run(endpoint: str, tries: Mapping[str, Try | tuple[Try, dict[str, Any]]]) -> None:
    """Run tries one after the other and append a line of JSON for each to the file `CLIENT_RESULTS`.

    `tries`: name → a function that raises if something is wrong, alone or with what the model is to do.
    """
    for name, what in tries.items():
        function, script = what if isinstance(what, tuple) else (what, {})
        begin(endpoint, name, script)
        started = time.monotonic()
        error = ""
        try:
            function()
        except (Exception, SystemExit) as failed:
            traceback.print_exc()
            error = f"{type(failed).__name__}: {failed}"[:2000] or "failed"
        line = {"endpoint": endpoint, "try": name, "error": error, "seconds": round(time.monotonic() - started, 1)}
        with Path(os.environ["CLIENT_RESULTS"]).open("a") as results:
            results.write(json.dumps(line) + "\n")


def begin(endpoint: str, name: str, script: Mapping[str, Any]) -> None:
    """Tell the server which try begins and what its model is to do."""
    body = json.dumps({"endpoint": endpoint, "try": name, **script}).encode()
    request = urllib.request.Request(f"{ROOT}/scripted", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        response.read()


def same(found: object, wanted: object) -> None:
    """Raise if something is not what it should be."""
    if found != wanted:
        raise AssertionError(f"{found!r:.300} instead of {wanted!r:.300}")


def seeded(ask: Callable[[int], object]) -> None:
    """Raise unless a seed gives the same reply twice, and another seed another."""
    first, again, other = ask(7), ask(7), ask(8)
    same(again, first)
    if not first or other == first:
        raise AssertionError(f"the seed has no effect: {first!r:.300}")
