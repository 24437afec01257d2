"""Claude Code: `claude -p` against a base URL of one's own."""

from tool import Tool, holds
from tries import ANSWER, KEY, MODEL, QUESTION, ROOT, run

QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_AUTOUPDATER": "1",
}
WHERE = {"ANTHROPIC_BASE_URL": ROOT, "ANTHROPIC_API_KEY": KEY, "ANTHROPIC_MODEL": MODEL}
WHERE |= {"ANTHROPIC_SMALL_FAST_MODEL": MODEL}


def asked(*more: str) -> str:
    with Tool("claude") as claude:
        return claude.run("-p", QUESTION, *more, **WHERE, **QUIET)


def plain() -> None:
    holds(asked(), ANSWER)


def stream() -> None:
    told = asked("--output-format", "stream-json", "--include-partial-messages", "--verbose")
    holds(told, '"content_block_delta"')
    holds(told, ANSWER)


def tools() -> None:
    told = asked("--allowedTools", "Bash", "--output-format", "stream-json", "--verbose")
    holds(told, "four-from-the-shell\\n" if "four-from-the-shell\\n" in told else '"content":"four-from-the-shell"')
    holds(told, ANSWER)


COMMAND = {"call": "Bash", "arguments": {"command": "echo four-from-the-shell", "description": "Says four"}}
run("messages", {"plain": plain, "stream": stream, "tools": (tools, COMMAND)})
