"""inspect-ai: a task of one sample with its providers for chat completions, responses and messages."""

import json
import os
import tempfile

from inspect_ai import Task, eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.model import ResponseSchema, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool
from inspect_ai.util import json_schema
from pydantic import BaseModel
from tries import ADD, ANSWER, BASE, DRAWN, KEY, MODEL, QUESTION, ROOT, run, same, seeded

os.environ["INSPECT_LOG_LEVEL"] = "error"
calls: list[tuple[int, int]] = []


class Answer(BaseModel):
    answer: int


@tool
def add():
    async def execute(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: One.
            b: Another.
        """
        calls.append((a, b))
        return a + b

    return execute


def tries(provider: str, base_url: str, *, seeds: bool) -> dict:
    def said(*before: object, **config: object) -> str:
        model = get_model(f"{provider}/{MODEL}", base_url=base_url, api_key=KEY, memoize=False)
        task = Task(dataset=[Sample(input=QUESTION, target="4")], solver=[*before, generate()], scorer=includes())
        with tempfile.TemporaryDirectory() as logs:
            how = {"display": "none", "log_dir": logs, "max_retries": 0, "fail_on_error": True}
            (log,) = evaluate(task, model=model, **how, **config)
            if log.status != "success" or not log.samples:
                raise RuntimeError(log.error.message if log.error else log.status)
            return log.samples[0].output.completion

    def plain() -> None:
        same(said(), ANSWER)

    def tools() -> None:
        calls.clear()
        same((said(use_tools(add())), calls), (ANSWER, [(2, 2)]))

    def structured() -> None:
        schema = ResponseSchema(name="answer", json_schema=json_schema(Answer))
        same(json.loads(said(response_schema=schema)), {"answer": 4})

    def seed() -> None:
        seeded(lambda number: said(seed=number, temperature=1.0, max_tokens=24))

    made = {"plain": plain, "tools": (tools, ADD), "structured": structured}
    return {**made, "seed": (seed, DRAWN)} if seeds else made


run("chat/completions", tries("openai-api/verbatim", BASE, seeds=True))
run("responses", tries("openai", BASE, seeds=False))
run("messages", tries("anthropic", ROOT, seeds=False))
