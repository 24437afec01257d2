"""The command `verbatim batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from engine import VerbatimError
from server.configuration import ConfigOption, ModelOption, PullOption, before_anything_heavy, read_configuration
from server.terminal import Terminal

__all__ = ["batch"]

err = Terminal(stderr=True)

_AGAIN = "The same command goes on behind the last line."


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests, one per line: OpenAI's batch format.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Answers, in the order of the requests.")],
    model: ModelOption = None,
    config: ConfigOption = None,
    name: Annotated[str | None, typer.Option(help="With --model: the model's id in requests.")] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1, max=4096, help="Requests at once, as far as the queue holds them. Default: twice max_sequences."
        ),
    ] = None,
    receipts: Annotated[bool, typer.Option("--receipts", help="Ask for a receipt in every answer.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Drop what OUT holds instead of resuming it.")] = False,
    pull: PullOption = False,
) -> None:
    """Answer a file of requests without a server, and resume where an earlier run stopped.

    Exits with 0 if every line was answered with status 200, 1 if some were not, 2 if the run could not be completed.
    """
    try:
        entries, settings = read_configuration(config, model, name)
        before_anything_heavy(pull)
        from server.batch.answering import Stopped
        from server.batch.run import BatchJob, run_batch

        job = BatchJob(source, target, entries, settings, concurrency, receipts, overwrite, pull)
        try:
            counts = run_batch(job, err)
        except Stopped as error:
            _say(f"[bold red]stopped:[/] {escape(str(error).rstrip('.'))}. {_AGAIN}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _say(f"[bold red]interrupted.[/] {_AGAIN}")
            raise typer.Exit(130) from None
    except VerbatimError as error:
        _say(f"[bold red]error:[/] {escape(error.message)}")
        raise typer.Exit(2) from None
    if counts.kept == counts.lines and counts.lines:
        _say(escape(f"{target} was complete already: {counts}."))
    else:
        kept = f" ({counts.kept} were there already)" if counts.kept else ""
        _say(escape(f"{counts}{kept}: {target}"))
    raise typer.Exit(1 if counts.failed else 0)


def _say(text: str) -> None:
    err.print(text, highlight=False, soft_wrap=True)
