"""The command `verbatim`: finds the command that is meant, prints errors as one line, ends in order on Ctrl-C.

Only the module of that command is imported, because the first line of `serve` must not wait for what others need.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import typer

__all__ = ["COMMANDS", "application", "main"]

COMMANDS: Final = {
    "serve": "server.commands.serve:serve",
    "chat": "server.commands.chat.command:chat",
    "generate": "server.commands.generate:generate",
    "models": "server.commands.models:models",
    "fingerprint": "server.commands.fingerprint:fingerprint",
    "doctor": "server.commands.doctor.command:doctor",
    "bench": "server.commands.bench.command:bench",
    "batch": "server.batch.commands:batch",
    "verify": "server.receipts.commands:verify",
    "replay": "server.receipts.commands:replay",
    "diff": "server.receipts.commands:diff",
    "receipts": "server.receipts.keeping_commands:receipts",
    "keys": "server.accounts.commands:keys",
    "usage": "server.accounts.commands:usage",
    "bundle": "server.bundle.commands:bundle",
    "gpu-probe": "server.gpu_probe:gpu_probe",
}
"""Every command, in the order of the help: the module, and the function or the group of commands in it."""

_VERSION: Final = (["--version"], ["-V"])
_INTERRUPTED: Final = 130  # as shells have it: 128 + SIGINT


def main() -> None:
    """Run the command. An expected error is printed as one line, and the exit code is 1."""
    try:
        _main(sys.argv[1:])
    except KeyboardInterrupt:  # at any moment: while modules are imported, too
        print("interrupted.", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _main(arguments: list[str]) -> None:
    from engine import PROJECT_VERSION, VerbatimError
    from server.commands.early import greet_early

    if arguments in _VERSION:  # before typer is imported
        print(f"verbatim {PROJECT_VERSION}")
        sys.exit(0)
    try:
        early = greet_early(arguments[1:]) if arguments[:1] == ["serve"] else None
        application(*(name for name in arguments[:1] if name in COMMANDS))(obj=early)
    except VerbatimError as error:
        _fail(error.message)
    except MemoryError:
        _fail("there is not enough memory for this.")


def application(*names: str) -> typer.Typer:
    """Build the application with the named commands; without names, with all."""
    import typer

    app = typer.Typer(
        help="A local inference server whose every reply can be reproduced, word for word.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def verbatim(version: bool = typer.Option(False, "--version", "-V", help="Print the version.")) -> None:
        """A local inference server whose every reply can be reproduced, word for word."""

    for name in names or COMMANDS:
        module, _, attribute = COMMANDS[name].partition(":")
        found: Any = getattr(import_module(module), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    return app


def __getattr__(name: str) -> typer.Typer:
    """Build `app`, the application with all commands, for documents and tests."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return application()


def _fail(message: str) -> None:
    from server.terminal import Terminal, one_line

    Terminal(stderr=True).print(f"[bold red]error:[/] {one_line(message)}", highlight=False, soft_wrap=True)
    sys.exit(1)
