"""The harness's side: runs lm-evaluation-harness on the tasks here and returns every sample's raw numbers.

    python -m evaluations.harness JOBS.json RESULTS.json

Runs in the environment that has lm-eval in it (`make evaluations` makes it), from the root of the repository, and knows
of this project no more than the tasks. `JOBS.json` is a list of jobs, the fields of `Job`; `RESULTS.json` a list of
results in the same order.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TASKS = Path("evaluations/tasks")
FACTS, ANSWERS = "verbatim_facts", "verbatim_answers"


@dataclass(slots=True)
class Job:
    """One run of the harness.

    Attributes:
        model: a class of models in lm-eval: `local-completions`, `local-chat-completions`, `hf`.
        arguments: what its constructor takes.
        tasks: names of tasks; chat: whether the questions become messages.
        batch_size: prompts of one request, or rows of one pass of `hf`.
        limit: items of each task; None: all.
        generation: fields of the requests that generate, beside the task's own.
        system: what the system message says, of chats.
    """

    model: str
    arguments: dict[str, Any]
    tasks: list[str] = field(default_factory=lambda: [FACTS, ANSWERS])
    chat: bool = False
    batch_size: int = 1
    limit: int | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    system: str | None = None


def run(job: Job) -> dict[str, Any]:
    """Run one job.

    Returns:
        `seconds`; `scores` by task; `samples` by task: for each item what the model said, `[log-likelihood, is_greedy]`
        for every choice of a multiple choice, or the text.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    start = time.perf_counter()
    found = lm_eval.simple_evaluate(
        model=job.model,
        model_args=job.arguments,
        batch_size=job.batch_size,
        tasks=job.tasks,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        limit=job.limit,
        apply_chat_template=job.chat,
        gen_kwargs=job.generation or None,
        system_instruction=job.system,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = {
        task: [[answer[0] for answer in sample["resps"]] for sample in sorted(of_task, key=lambda s: s["doc_id"])]
        for task, of_task in found["samples"].items()
    }
    scores = {
        task: next(value for name, value in values.items() if name.startswith(("acc,", "exact_match,")))
        for task, values in found["results"].items()
    }
    return {"seconds": time.perf_counter() - start, "scores": scores, "samples": samples}


def main() -> None:
    jobs = [Job(**job) for job in json.loads(Path(sys.argv[1]).read_text())]
    Path(sys.argv[2]).write_text(json.dumps([run(job) for job in jobs]))


if __name__ == "__main__":
    main()
