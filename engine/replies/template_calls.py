"""Tool calls in a region of a response template: its text → names and arguments. No tokens, no torch, no HTTP.

transformers reads the region as its template says. Values in tags are read here instead: without quotes only a tool's
schema can tell a number from a string.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Final

import regex  # type: ignore[import-untyped]

from engine.errors import ReplyFault
from engine.text.json_schema import properties_of, read_value
from engine.types.tools import Tool

__all__ = ["PATIENCE", "read_calls", "too_slow"]

PATIENCE: Final = 1.0
"""Seconds of processor time for one search, which keeps all other threads waiting. An expression that takes longer
ends the request with an error, never with another text: a reply must be the same on a slow machine. Loading refuses
the expressions that would on texts of their own letters (`engine/replies/expression_trial.py`)."""


def read_calls(region: Any, body: str, captures: Mapping[str, str], tools: Mapping[str, Tool]) -> list[tuple[str, str]]:
    """Read the calls in a region's text; none if it cannot be read or names an unknown tool.

    Args:
        region: the template's field.
        body: the text between its delimiters.
        captures: what the expression of its opening delimiter captured.
        tools: the request's tools by name.

    Raises:
        ReplyFault: reading takes too long.
    """
    from transformers.utils.chat_parsing.content_parsers import process_field

    try:
        raw = region.content == "xml-inline" and _is_plain(region.content_args.get("value_parser"))
        if raw:
            body = json.dumps(_tags(body, region.content_args))
            region = dataclasses.replace(region, content="json", content_args={})
        elif region.content == "xml-inline":
            _check_tags(body, region.content_args)
        value = process_field(body, region, captures)
        return [_call(item, raw, tools) for item in (value if isinstance(value, list) else [value])]
    except TimeoutError:
        raise too_slow(region.name) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, regex.error):
        return []  # whatever the model wrote, it is no call


def too_slow(field: str) -> ReplyFault:
    """The error of a reply on which an expression of the template takes too long."""
    return ReplyFault(
        f"this reply could not be read: the response template's {field} takes longer than {PATIENCE:g} second on it; "
        "another response_template in models.yaml may not."
    )


def _call(item: Any, raw: bool, tools: Mapping[str, Tool]) -> tuple[str, str]:
    """The name and arguments of one call. `raw`: strings are as the model wrote them, and schemas give their types."""
    function = item.get("function", item)
    name, arguments = function["name"], function.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if name not in tools or not isinstance(arguments, dict | None):
        raise ValueError("no call of these tools")
    schema = tools[name].parameters or {}
    known = properties_of(schema)
    members = []
    for key, value in (arguments or {}).items():
        part = known.get(key, True)
        if raw and isinstance(value, str):
            written = read_value(value, part, schema)
        else:
            written = json.dumps(_typed(value, part), ensure_ascii=False, allow_nan=False)
        members.append(f"{json.dumps(key, ensure_ascii=False)}: {written}")
    whole = f"{{{', '.join(members)}}}"
    whole.encode()  # half a surrogate pair is no text: ValueError
    return name, whole


def _is_plain(value_parser: Any) -> bool:
    """Whether values are JSON where they can be and otherwise strings: then their schemas know better."""
    if value_parser is None:
        return True
    given = value_parser.get("args") or {}
    return value_parser.get("name", "text") == "json" and set(given) <= {"allow_non_json"}


def _check_tags(body: str, given: Mapping[str, Any]) -> None:
    """Search for tags, and for those inside them, as transformers will without a time limit.

    Raises:
        TimeoutError: it takes too long.
    """
    inner = given.get("value_parser") or {}
    for match in regex.finditer(given["tag_pattern"], body, flags=regex.DOTALL, timeout=PATIENCE):
        if inner.get("name") == "xml-inline":
            _check_tags(match.groupdict().get("value") or "", inner.get("args") or {})


def _tags(body: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values in tags as they were written, by their keys."""
    found: dict[str, Any] = {}
    for match in regex.finditer(given["tag_pattern"], body, flags=regex.DOTALL, timeout=PATIENCE):
        key, value = match["key"], match.groupdict().get("value") or ""
        if key in found and given.get("merge_duplicates"):
            found[key] = [*(found[key] if isinstance(found[key], list) else [found[key]]), value]
        else:
            found[key] = value
    return found


def _typed(value: Any, schema: Any) -> Any:
    """Convert a value to the type in its schema: formats without quotes cannot tell a number from a string."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string" and isinstance(value, bool | int | float):
        return json.dumps(value)
    if kind in ("integer", "number", "boolean", "object", "array", "null") and isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
