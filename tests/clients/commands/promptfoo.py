"""promptfoo: an evaluation of one question, over both endpoints that it speaks."""

import json
from pathlib import Path
from typing import Any

from tool import Tool
from tries import ADD, ANSWER, BASE, DRAWN, KEY, MODEL, QUESTION, run, same, seeded

QUIET = {"PROMPTFOO_DISABLE_TELEMETRY": "1", "PROMPTFOO_DISABLE_UPDATE": "1", "PROMPTFOO_DISABLE_SHARING": "1"}
QUIET |= {"PROMPTFOO_DISABLE_REMOTE_GENERATION": "1"}
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}


def tries(kind: str) -> dict[str, Any]:
    def output(**config: Any) -> Any:
        """What the model said, as promptfoo's own report has it."""
        provider = {"id": f"openai:{kind}:{MODEL}", "config": {"apiBaseUrl": BASE, "apiKey": KEY, **config}}
        with Tool("promptfoo") as promptfoo:
            suite = {"prompts": [QUESTION], "providers": [provider], "tests": [{"vars": {}}]}
            Path(promptfoo.work, "promptfooconfig.json").write_text(json.dumps(suite))
            where = {"PROMPTFOO_CONFIG_DIR": str(promptfoo.home), **QUIET}
            promptfoo.run(
                "eval", "-c", "promptfooconfig.json", "--no-cache", "--no-progress-bar", "-o", "out.json", **where
            )
            [result] = json.loads(Path(promptfoo.work, "out.json").read_text())["results"]["results"]
            if result.get("error"):
                raise RuntimeError(result["error"])
            return result["response"]["output"]

    def plain() -> None:
        same(output(), ANSWER)

    def tools() -> None:
        tool = {"name": "add", "parameters": PARAMETERS}
        given = {"type": "function", "function": tool} if kind == "chat" else {"type": "function", **tool}
        told = json.dumps(output(tools=[given]))
        same('"add"' in told or '\\"add\\"' in told, True)

    def structured() -> None:
        named = {"name": "answer", "schema": SCHEMA, "strict": True}
        form = {"type": "json_schema", "json_schema": named} if kind == "chat" else {"type": "json_schema", **named}
        told = output(response_format=form)
        same(json.loads(told) if isinstance(told, str) else told, {"answer": 4})

    def seed() -> None:
        more = {} if kind == "chat" else {"temperature": 1}
        seeded(lambda number: output(max_tokens=24, temperature=1, seed=number, **more))

    made = {"plain": plain, "tools": (tools, ADD), "structured": structured}
    return {**made, "seed": (seed, DRAWN)} if kind == "chat" else made


run("chat/completions", tries("chat"))
run("responses", tries("responses"))
