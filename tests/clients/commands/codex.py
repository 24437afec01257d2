"""Codex CLI: `codex exec` with a provider of its own."""

from pathlib import Path

from tool import Tool, holds
from tries import ANSWER, BASE, KEY, MODEL, QUESTION, run

CONFIG = f"""
model = "{MODEL}"
model_provider = "verbatim"
web_search = "disabled"
check_for_update_on_startup = false

[model_providers.verbatim]
name = "verbatim"
base_url = "{BASE}"
wire_api = "responses"
env_key = "VERBATIM_KEY"
request_max_retries = 0
stream_max_retries = 0

[analytics]
enabled = false
"""


def asked(*more: str) -> str:
    with Tool("codex") as codex:
        (codex.home / "config.toml").write_text(CONFIG)
        command = ["exec", "--skip-git-repo-check", "--sandbox", "read-only", *more, QUESTION]
        return codex.run(*command, CODEX_HOME=str(codex.home), VERBATIM_KEY=KEY)


def plain() -> None:
    holds(asked(), ANSWER)


def tools() -> None:
    told = asked("--json")
    holds(told, "four-from-the-shell")
    holds(told, ANSWER)


def structured() -> None:
    with Tool("codex") as scratch:
        schema = Path(scratch.work, "schema.json")
        schema.write_text(
            '{"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"], '
            '"additionalProperties": false}'
        )
        holds(asked("--output-schema", str(schema)).replace(" ", ""), '{"answer":4}')


COMMAND = {"call": "exec_command", "arguments": {"cmd": "echo four-from-the-shell"}}
run("responses", {"plain": plain, "tools": (tools, COMMAND), "structured": structured})
