"""Show reports and differences in tables, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from server.terminal import one_line

__all__ = ["report_table"]

_STYLES = {"identical": "green", "reproduced": "green", "consistent": "yellow", "refuted": "bold red"}


def report_table(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Return a table with a row for each choice. `reports`: where the receipt was, and its report or `error`."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("receipt", "verdict", "same tokens", "largest difference", "first other token"):
        table.add_column(name, overflow="fold")
    for where, report in reports:
        verdict = report.get("verdict", "not_checkable")
        choices = report.get("choices") or [{}]
        for choice in choices:
            told = choice.get("verdict", verdict)
            name = where if len(choices) == 1 else f"{where} [{choice.get('index')}]"
            style = _STYLES.get(told, "bold yellow")
            shown = f"[{style}]{one_line(told.replace('_', ' '))}[/]"
            table.add_row(one_line(name), shown, _share(choice), _number(choice), one_line(_first(choice)))
    return table


def _share(choice: Mapping[str, Any]) -> str:
    drawn = choice.get("drawn")
    return f"{drawn - choice['different']}/{drawn}" if drawn else ""


def _number(choice: Mapping[str, Any]) -> str:
    largest = choice.get("largest_difference")
    return "" if largest is None else f"{largest:.3g}"


def _first(choice: Mapping[str, Any]) -> str:
    first = choice.get("first")
    if not first:
        return ""
    texts = [_token(first, name) for name in ("expected", "drawn")]
    return f"{first['position']}: {texts[0]} → {texts[1]}"


def _token(first: Mapping[str, Any], name: str) -> str:
    if (text := first.get(f"{name}_text")) is not None:
        return repr(text)
    return "end" if first.get(name) is None else str(first[name])
