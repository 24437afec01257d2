"""The command `verbatim serve`: its first line comes before anything heavy is imported."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.accounts.location import existing, in_use, refuse_strangers
from server.commands.early import Early, listen
from server.commands.greeting import further_lines
from server.configuration import (
    ConfigOption,
    ModelOption,
    PullOption,
    before_anything_heavy,
    read_configuration,
    rereading,
)
from server.wire.listener import address_of

if TYPE_CHECKING:
    import socket

    from engine import ModelConfig
    from server.lifecycle.reloading import Reread
    from server.settings import ServerSettings

__all__ = ["serve"]


def serve(
    context: typer.Context,
    config: ConfigOption = None,
    model: ModelOption = None,
    name: Annotated[str | None, typer.Option(help="With --model: the model's id in requests.")] = None,
    host: Annotated[str | None, typer.Option(help="Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default: 8000.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Accept requests for this host name; may be repeated. Adds to `hosts`.")
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option(help="Serve without keys on an address that others can reach.")
    ] = False,
    pull: PullOption = False,
) -> None:
    """Serve the models at http://HOST:PORT/v1 and /api/v1, and a page for browsers at http://HOST:PORT."""
    early = context.obj if isinstance(context.obj, Early) else None
    try:
        with ExitStack() as stack:
            if early is not None:
                stack.enter_context(early.listener)
            entries, settings = read_configuration(config, model, name)
            fitted = partial(
                _with_options, host=host, port=port, allow_host=allow_host, allow_anonymous=allow_anonymous
            )
            settings = fitted(settings)
            if existing(settings, config) is None:
                refuse_strangers(settings)
            if early is None:
                listener = stack.enter_context(listen(settings.host, settings.port, page=settings.ui))
            else:
                listener = early.listener
                assert (early.host, early.port) == (settings.host, settings.port), "announced elsewhere"
            _serve(entries, settings, listener, config, pull, rereading(config, model, fitted))
    except KeyboardInterrupt:  # before the server could take it
        _say("stopped.")


def _with_options(
    settings: ServerSettings,
    host: str | None,
    port: int | None,
    allow_host: list[str] | None,
    allow_anonymous: bool,
) -> ServerSettings:
    """Return the settings with the options that were given in place of the file's."""
    from engine import validate
    from server.settings import ServerSettings

    hosts = [*settings.hosts, *validate(ServerSettings, {"hosts": allow_host or []}, "--allow-host").hosts]
    flags = (("host", host), ("port", port), ("hosts", hosts), ("allow_anonymous", allow_anonymous or None))
    return settings.model_copy(update={key: value for key, value in flags if value is not None})


def _serve(
    entries: tuple[ModelConfig, ...],
    settings: ServerSettings,
    listener: socket.socket,
    config: Path | None,
    pull: bool,
    reread: Reread | None,
) -> None:
    """Load the models, import what serves them, open ledger and receipts, and serve until a signal arrives."""
    ledger = in_use(settings, config)
    before_anything_heavy(pull)
    address = address_of(listener, settings.host)
    for line in further_lines(settings, address, entries, keys=ledger is not None):
        _say(line)
    from server.lifecycle.early_load import loading
    from server.terminal import Terminal

    console = Terminal(stderr=True)
    with loading(entries, settings, pull=pull, console=console) as (registry, display):
        from server.receipts.location import open_receipts
        from server.run import run

        run(
            registry,
            display,
            settings,
            listener=listener,
            ledger=ledger,
            receipts=open_receipts(settings, config),
            console=console,
            reread=reread,
        )


def _say(text: str) -> None:
    """Print a line to standard error. rich is not imported for the first one."""
    from server.logs import printable

    print(printable(text), file=sys.stderr, flush=True)
