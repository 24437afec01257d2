"""The page of the command line: every command and option."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

import typer

from docs.pages.markdown import NOTE, shown, table, type_name
from server.cli import app


def cli() -> str:
    group: Any = typer.main.get_command(app)
    parts = [NOTE + "# The command line\n", f"{group.help}\n"]
    for path, command in _commands(group, "verbatim"):
        hints = typing.get_type_hints(command.callback)
        rows = [_parameter(p, hints[p.name]) for p in command.params]
        parts += [f"## {path}\n", f"{inspect.cleandoc(command.help)}\n"]
        parts.append(table(("option", "type", "default", "meaning"), rows))
    parts.append(
        "Every error that was raised on purpose is one line on standard error and exit code 1; wrong usage is "
        "exit code 2.\n"
    )
    return "\n".join(parts)


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _parameter(parameter: Any, hint: Any) -> tuple[str, ...]:
    option = parameter.param_type_name == "option"
    names = ", ".join(f"`{n}`" for n in sorted([*parameter.opts, *parameter.secondary_opts], key=len, reverse=True))
    default = "required" if parameter.required else shown(parameter.default)
    argument = parameter.metavar or parameter.name.upper()
    return (names if option else f"`{argument}`"), type_name(hint), default, parameter.help or ""
