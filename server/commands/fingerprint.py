"""The command `verbatim fingerprint`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from server.configuration import ConfigOption, ModelOption, PullOption, read_configuration

__all__ = ["fingerprint"]


def fingerprint(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Two files, written with --json or by GET /v1/models/ID: print what differs."),
    ] = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of lines.")] = False,
    pull: PullOption = False,
) -> None:
    """Load every model and print its fingerprint, part by part; or compare two files and load none.

    A comparison exits with 0 if the fingerprints are the same, 1 if they differ, 2 if a file could not be read.
    """
    from server import fingerprints
    from server.commands import opening

    if files:
        if len(files) != 2 or model is not None or config is not None or as_json:
            raise typer.BadParameter("to compare, give two files and no option; else give no file.")
        code, lines = fingerprints.compare(*files)
        print(*lines, sep="\n", file=sys.stderr if code == fingerprints.UNREADABLE else sys.stdout)
        raise typer.Exit(code)
    entries, _ = read_configuration(config, model, None)
    found = [opening.open_model(entry, pull).info for entry in entries]
    lines = [fingerprints.as_json(found)] if as_json else [line for i in found for line in fingerprints.lines_of(i)]
    print(*lines, sep="\n")
