"""The command `verbatim doctor`."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from server.configuration import ConfigOption

__all__ = ["doctor"]

_MARKS: Final = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fault": "[bold red]fault[/]"}


def doctor(
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Look at this machine and the configuration, and say what is well, what is not, and the cure. Loads no model.

    Exits with 0 if nothing is a fault, else with 1.
    """
    import dataclasses
    import json

    from rich.table import Table

    from server.commands.doctor.machine import look_at_machine
    from server.commands.doctor.setup import look_at_setup
    from server.terminal import Terminal, one_line

    with Terminal(stderr=True).status("looking") as status:
        found = [*look_at_machine(lambda text: status.update(one_line(text))), *look_at_setup(config)]
    faults = [one for one in found if one.state == "fault"]
    if as_json:
        print(json.dumps({"well": not faults, "findings": [dataclasses.asdict(one) for one in found]}))
        raise typer.Exit(1 if faults else 0)
    table = Table.grid(padding=(0, 2))
    for one in found:
        table.add_row(one_line(one.name), _MARKS[one.state], one_line(one.detail))
        if one.cure:
            table.add_row("", "", f"→ {one_line(one.cure)}")
    out = Terminal()
    out.print(table)
    warnings = sum(one.state == "warn" for one in found)
    told = (
        "All is well."
        if not faults and not warnings
        else f"{_many(len(faults), 'fault')}, {_many(warnings, 'warning')}."
    )
    out.print(told, highlight=False)
    raise typer.Exit(1 if faults else 0)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
