"""Markdown that several pages are made of."""

from __future__ import annotations

import json
import types
import typing
from datetime import datetime
from pathlib import Path
from typing import Any

NOTE = "<!-- Written by docs/generate.py from the code. Do not edit. -->\n"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; bars and line ends inside cells are escaped."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]) + "\n"


def type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(type_name(part) for part in typing.get_args(hint) if part is not type(None))
    origin = typing.get_origin(hint)
    if origin is tuple:
        return "list, or mapping by name"
    if origin is list:
        return f"{type_name(typing.get_args(hint)[0])}, may be repeated"
    plain: dict[Any, str] = {datetime: "date or date and time"}
    plain |= {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", dict: "mapping"}
    return plain.get(origin or hint, getattr(hint, "__name__", str(hint)))


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return f"`{json.dumps(value)}`"
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{str(value).lower()}`"


def listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def code(text: str) -> str:
    """Inline code, also of a text with back-quotes."""
    return f"```` {text} ````" if "`" in text else f"`{text}`"
