"""llm, with a model of its `extra-openai-models.yaml`."""

import json
from pathlib import Path

from tool import Tool, holds
from tries import ADD, ANSWER, BASE, DRAWN, KEY, MODEL, QUESTION, run, same, seeded

MODELS = f"""
- model_id: verbatim
  model_name: {MODEL}
  api_base: {BASE}
  supports_tools: true
  supports_schema: true
"""


def asked(*more: str) -> str:
    with Tool("llm") as llm:
        Path(llm.home, "extra-openai-models.yaml").write_text(MODELS)
        return llm.run("-m", "verbatim", "--key", KEY, *more, QUESTION, LLM_USER_PATH=str(llm.home)).strip()


def plain() -> None:
    same(asked("--no-stream"), ANSWER)


def stream() -> None:
    same(asked(), ANSWER)


def tools() -> None:
    holds(asked("--functions", "def add(a: int, b: int) -> int:\n    return a + b"), ANSWER)


def structured() -> None:
    same(json.loads(asked("--schema", "answer int")), {"answer": 4})


def seed() -> None:
    seeded(lambda number: asked("-o", "seed", str(number), "-o", "temperature", "1", "-o", "max_tokens", "24"))


run(
    "chat/completions",
    {
        "plain": plain,
        "stream": stream,
        "tools": (tools, ADD),
        "structured": structured,
        "seed": (seed, DRAWN),
    },
)
