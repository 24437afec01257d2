"""The task of short answers for inspect-ai.

inspect eval evaluations/tasks/answers.py --model openai-api/verbatim/MODEL
"""

from __future__ import annotations

from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.scorer import includes
from inspect_ai.solver import generate


@task
def verbatim_answers() -> Task:
    """50 questions with one short answer."""
    items = Path(__file__).resolve().with_name("answers.jsonl")
    dataset = json_dataset(str(items), FieldSpec(input="question", target="answer"))
    return Task(dataset=dataset, solver=generate(), scorer=includes())
