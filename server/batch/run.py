"""Runs a batch from the command line: loads the models, goes on where the output ends, shows how far it is."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from engine import ConfigError, ModelConfig, ModelInfo, Registry
from server import logs
from server.app import create_app
from server.batch.answering import Batch, Stopped
from server.batch.input import InputFile
from server.batch.output import OutputFile, WrittenLine
from server.settings import ReceiptSettings, ServerSettings

__all__ = ["BatchJob", "Counts", "basis", "resume", "run_batch"]

_LAST = 60.0
"""Seconds that the last step may take to end."""


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What to run. `concurrency`: requests at once; None for twice as many as run at once in a model."""

    source: Path
    target: Path
    entries: tuple[ModelConfig, ...]
    settings: ServerSettings
    concurrency: int | None = None
    receipts: bool = False
    overwrite: bool = False
    pull: bool = False


@dataclass(slots=True)
class Counts:
    """Lines of the output, how many of them an earlier run wrote, and how many are no answers with status 200."""

    lines: int = 0
    kept: int = 0
    failed: int = 0

    def add(self, *, good: bool) -> None:
        self.lines += 1
        self.failed += not good

    def __str__(self) -> str:
        failed = f", {self.failed} of them failed" if self.failed else ""
        return f"{self.lines} lines{failed}"


def run_batch(job: BatchJob, console: Console) -> Counts:
    """Run a batch to its end.

    Raises:
        ConfigError: it cannot be started, or the output belongs to something else.
        Stopped: it ended early; the same call goes on.
    """
    wanted = job.concurrency or 2 * max(entry.max_sequences for entry in job.entries)
    concurrency = min(wanted, *(entry.max_sequences + entry.max_queue for entry in job.entries))
    limit = job.settings.max_body_bytes
    # Nothing is refused because of the load: there is room for every body, and time for every request. The queue stays
    # as it is, since its length limits the prompts that one request may hold. What a server keeps and signs is not for
    # a batch: only --receipts and the lines say what gets a receipt.
    bodies = 2 * (concurrency + 1) * limit
    room = job.settings.model_copy(update={"max_bodies_bytes": bodies, "receipts": ReceiptSettings()})
    # Every model is loaded and stays: what an answer is depends on the fingerprints, which are known then.
    lasting = {"max_queue_seconds": None, "load": "at_start", "idle_seconds": None}
    entries = [entry.model_copy(update=lasting) for entry in job.entries]
    logs.configure(job.settings.log_format, access_log=False)
    with InputFile(job.source, limit) as source, OutputFile(job.target) as target:
        if target.same_as(source.fileno()):
            raise ConfigError(f"{job.source} and {job.target} are one file.")
        if job.overwrite:
            target.clear()
        registry = _loaded(entries, job.pull, console)
        try:
            fingerprints = {m.id: basis(m.info, room) for m in registry.list() if m.info}
            app = create_app(registry, room)
            batch = Batch(app, fingerprints, concurrency=concurrency, receipts=job.receipts)
            counts = resume(job, batch, source, target)
            asyncio.run(_write(job, app, batch, source, target, counts, console))
        finally:
            _close(registry)
    return counts


def basis(info: ModelInfo, settings: ServerSettings) -> str:
    """Name all that an answer depends on beside its line: what computes, the defaults, and what is refused."""
    refused = f"{info.max_requests} {settings.strict_params}"
    return f"{info.system_fingerprint} {info.defaults_fingerprint} {refused}"


def _loaded(entries: list[ModelConfig], pull: bool, console: Console) -> Registry:
    """Load all models.

    Raises:
        ConfigError: one cannot be loaded.
    """
    with console.status("loading") as status:
        registry = Registry(entries, pull=pull, on_progress=lambda text: status.update(escape(text)))
        registry.start()
        registry.wait()
    failed = next((model for model in registry.list() if model.state == "failed"), None)
    if failed is not None:
        registry.close()
        raise ConfigError(failed.detail)
    return registry


def _close(registry: Registry) -> None:
    """Close all engines. A step under way is waited for: the interpreter must not end while it computes."""
    deadline = time.monotonic() + _LAST
    while not registry.close() and time.monotonic() < deadline:
        time.sleep(0.1)


def resume(job: BatchJob, batch: Batch, source: InputFile, target: OutputFile) -> Counts:
    """Compare what is written with the input, line by line, and leave both files where the next line belongs.

    Raises:
        ConfigError: the output belongs to another input, another model or other options.
    """
    counts, lines = Counts(), iter(source)
    otherwise = "Name another file, or write over this one with --overwrite."

    def check(number: int, written: WrittenLine) -> None:
        line = next(lines, None)
        if line is None:
            raise ConfigError(f"{job.target} has more lines than {job.source}, so it is not its output. {otherwise}")
        if line.custom_id != written.custom_id:
            raise ConfigError(
                f"line {number} of {job.target} answers {written.custom_id!r}, where {job.source} has "
                f"{line.custom_id!r}: it belongs to another input. {otherwise}"
            )
        if written.id != batch.id_of(line):
            raise ConfigError(
                f"line {number} of {job.target} answers another request, or is of a model with another fingerprint, or "
                f"of a run with other options. {otherwise}"
            )
        counts.add(good=written.good)

    counts.kept = target.resume(check)
    return counts


async def _write(
    job: BatchJob,
    app: FastAPI,
    batch: Batch,
    source: InputFile,
    target: OutputFile,
    counts: Counts,
    console: Console,
) -> None:
    """Answer the lines that are left, and write each as soon as those before it are written.

    Raises:
        Stopped: the output cannot be written, or the engine has ended.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(str(counts), total=source.size, completed=source.position)
        async with app.router.lifespan_context(app), aclosing(batch.answers(source)) as answers:
            async for line in answers:
                try:
                    target.append(line.data)
                except OSError as error:
                    raise Stopped(f"cannot write {job.target}: {error.strerror}") from None
                counts.add(good=line.good)
                progress.update(task, description=str(counts), completed=line.position)
        target.sync()
