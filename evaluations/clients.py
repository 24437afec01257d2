"""Runs the harnesses as child processes against a server, offline, and compares what they return. Parses no flags."""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, child_environment

PYTHON = ROOT / ".venv-evals" / "bin" / "python"
"""The environment that `make evaluations` makes for the harnesses."""

Result = dict[str, Any]
"""What `evaluations.harness` and `evaluations.inspection` return of a job: seconds, scores, samples."""


@dataclass(frozen=True, slots=True)
class Clients:
    """Starts the harnesses. `limit`: items of each task; None: all. `threads`: of a model that runs in the client."""

    limit: int | None = None
    threads: int = 1
    seconds: float = 3600.0

    def harness(self, jobs: list[dict[str, Any]]) -> list[Result]:
        """Run jobs of lm-evaluation-harness: the fields of `evaluations.harness.Job`.

        Raises:
            RuntimeError: it failed; with its last words.
        """
        return self._run("evaluations.harness", jobs)

    def inspect(self, jobs: list[dict[str, Any]]) -> list[Result]:
        """Run jobs of inspect-ai: the fields of `evaluations.inspection.Job`.

        Raises:
            RuntimeError: it failed; with its last words.
        """
        return self._run("evaluations.inspection", jobs)

    def _run(self, module: str, jobs: list[dict[str, Any]]) -> list[Result]:
        with tempfile.TemporaryDirectory() as scratch:
            given, found = Path(scratch, "jobs.json"), Path(scratch, "results.json")
            given.write_text(json.dumps([{"limit": self.limit, **job} for job in jobs]))
            environment = child_environment(
                HF_DATASETS_OFFLINE="1",
                HF_DATASETS_CACHE=f"{scratch}/datasets",
                INSPECT_LOG_LEVEL="error",
                OPENAI_API_KEY="none",
                OMP_NUM_THREADS=str(self.threads),
            )
            done = subprocess.run(
                [str(PYTHON), "-m", module, str(given), str(found)],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=self.seconds,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"{module} failed:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}")
            results: list[Result] = json.loads(found.read_text())
            return results


def completions(base_url: str, model: str, tokenizer: Path | None, concurrent: int, **more: Any) -> dict[str, Any]:
    """A job of lm-eval's `local-completions`.

    Args:
        tokenizer: a folder; None: the server's own, by its endpoints.
        more: further arguments of that class.
    """
    how = {"tokenizer_backend": "remote"} if tokenizer is None else {"tokenizer": str(tokenizer.resolve())}
    return {
        "model": "local-completions",
        "arguments": {
            "model": model,
            "base_url": f"{base_url}/completions",
            "num_concurrent": concurrent,
            "tokenizer_backend": "huggingface",
            **how,
            **more,
        },
    }


def chat(base_url: str, model: str, concurrent: int, **more: Any) -> dict[str, Any]:
    """A job of lm-eval's `local-chat-completions`, which can only generate. `more`: further fields of the job."""
    return {
        "model": "local-chat-completions",
        "arguments": {"model": model, "base_url": f"{base_url}/chat/completions", "num_concurrent": concurrent},
        "tasks": ["verbatim_answers"],
        "chat": True,
        **more,
    }


def inspection(base_url: str, model: str, connections: int, **config: Any) -> dict[str, Any]:
    """A job of inspect-ai. `config`: fields of its GenerateConfig."""
    return {"base_url": base_url, "model": model, "config": {"max_connections": connections, **config}}


def flat(result: Result, task: str) -> list[Any]:
    """What the model said on every sample of a task: a log-likelihood with its is_greedy, or a text."""
    return [answer for sample in result["samples"][task] for answer in sample]


def different(one: Result, other: Result, task: str) -> int:
    """How many of a task's answers are not the same to the last bit.

    Raises:
        RuntimeError: the two did not answer the same number of questions.
    """
    first, second = flat(one, task), flat(other, task)
    if len(first) != len(second) or not first:
        raise RuntimeError(f"{task}: {len(first)} answers, then {len(second)}")
    return sum(a != b for a, b in zip(first, second, strict=True))
