"""opencode: `opencode run` with a provider of its own."""

import json
from pathlib import Path

from tool import Tool, holds
from tries import ANSWER, BASE, KEY, MODEL, QUESTION, run

CONFIG = {
    "$schema": "https://opencode.ai/config.json",
    "autoupdate": False,
    "share": "disabled",
    "permission": {"bash": "allow"},
    "provider": {
        "verbatim": {
            "npm": "@ai-sdk/openai-compatible",
            "name": "verbatim",
            "options": {"baseURL": BASE, "apiKey": KEY},
            "models": {MODEL: {"name": MODEL, "limit": {"context": 131072, "output": 4096}}},
        }
    },
}


def asked(*more: str) -> str:
    with Tool("opencode") as opencode:
        Path(opencode.work, "opencode.json").write_text(json.dumps(CONFIG))
        quiet = {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}
        return opencode.run("run", "--model", f"verbatim/{MODEL}", *more, QUESTION, **quiet)


def plain() -> None:
    holds(asked(), ANSWER)


def tools() -> None:
    told = asked("--format", "json")
    holds(told, "four-from-the-shell\\n")
    holds(told, ANSWER)


COMMAND = {"call": "bash", "arguments": {"command": "echo four-from-the-shell", "description": "Says four"}}
run("chat/completions", {"plain": plain, "tools": (tools, COMMAND)})
