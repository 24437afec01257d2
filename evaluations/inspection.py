"""inspect-ai's side: runs its task and returns every sample's raw numbers.

    python -m evaluations.inspection JOBS.json RESULTS.json

Runs in the environment that has inspect-ai in it (`make evaluations` makes it), from the root of the repository.
`JOBS.json` is a list of jobs, the fields of `Job`; `RESULTS.json` a list of results in the same order.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inspect_ai import eval
from inspect_ai.model import get_model

from evaluations.tasks.answers import verbatim_answers


@dataclass(slots=True)
class Job:
    """One run of the task: `config` holds fields of inspect-ai's GenerateConfig; `limit` is the number of items."""

    model: str
    base_url: str
    config: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None


def run(job: Job) -> dict[str, Any]:
    """Run one job.

    Returns:
        `seconds`; `scores` and `samples` by task: for each item the text and its tokens' log-probabilities, `[token,
        log-probability, alternatives]`, as far as the server tells them.

    Raises:
        RuntimeError: the run failed.
    """
    start = time.perf_counter()
    model = get_model(f"openai-api/verbatim/{job.model}", base_url=job.base_url, api_key="none", memoize=False)
    name = "verbatim_answers"
    with tempfile.TemporaryDirectory() as logs:  # the log is read when its parts are asked for
        (log,) = eval(
            verbatim_answers(), model=model, limit=job.limit, display="none", log_dir=logs, score=True, **job.config
        )
        if log.status != "success" or log.results is None or log.samples is None:
            raise RuntimeError(f"inspect-ai's run ended with {log.status}: {log.error}")
        samples = [_sample(sample) for sample in sorted(log.samples, key=lambda sample: int(sample.id))]
        score = log.results.scores[0].metrics["accuracy"].value
    return {"seconds": time.perf_counter() - start, "scores": {name: score}, "samples": {name: samples}}


def _sample(sample: Any) -> list[Any]:
    choice = sample.output.choices[0]
    content = choice.logprobs.content if choice.logprobs is not None else []
    return [[choice.message.text, [_entry(token) for token in content]]]


def _entry(token: Any) -> list[Any]:
    return [token.token, token.logprob, [[top.token, top.logprob] for top in token.top_logprobs or []]]


def main() -> None:
    jobs = [Job(**job) for job in json.loads(Path(sys.argv[1]).read_text())]
    Path(sys.argv[2]).write_text(json.dumps([run(job) for job in jobs]))


if __name__ == "__main__":
    main()
