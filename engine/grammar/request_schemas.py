"""`read_schemas`: reads the schemas of a request, of its answer's form and of its tools, before anything uses them.

All tools are read alike, whether a grammar will hold their calls or not: so what is refused or left out of a tool does
not depend on the tools beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine.errors import InvalidParameter
from engine.grammar.answer_grammar import names_of
from engine.grammar.diagnosis import check_length
from engine.text.json_schema import types_of
from engine.text.schema_reading import read_schema
from engine.types.requests import Constraint
from engine.types.tools import Tool

__all__ = ["RequestSchemas", "read_schemas"]

_MOST: Final = 1_000_000  # characters of all schemas of a request together


@dataclass(frozen=True, slots=True)
class RequestSchemas:
    """A request's constraint and tools, with their schemas in draft 2020-12."""

    constraint: Constraint | None
    tools: tuple[Tool, ...]
    left_out: tuple[str, ...]
    """Dotted names of keywords that say nothing or that nobody knows, and of bounds that no reply reaches."""


def read_schemas(constraint: Constraint | None, tools: Sequence[Tool]) -> RequestSchemas:
    """Read the schemas of a request.

    Raises:
        InvalidParameter: one is too large, or no schema; that of a tool is not an object's; all together are too large.
    """
    _check_lengths(constraint, tools)
    left_out: list[str] = []
    if constraint is not None and constraint.kind == "json" and constraint.value is not True:
        found = read_schema(constraint.value, constraint.param)
        left_out += names_of(constraint.param, found.left_out)
        constraint = dataclasses.replace(constraint, value=found.schema)
    read = []
    for i, tool in enumerate(tools):
        if tool.parameters is None:
            read.append(tool)
            continue
        param = _param(i)
        if not isinstance(tool.parameters, dict):
            raise InvalidParameter(
                f"{param} must be a JSON schema of an object, not {str(tool.parameters)[:100]}.", param=param
            )
        found = read_schema(tool.parameters, param)
        kinds = types_of(found.schema, found.schema)
        if "object" not in kinds:
            said = f"one of {', '.join(sorted(kinds))}" if kinds else "nothing at all"
            raise InvalidParameter(f"{param} must describe an object; it describes {said}.", param=param)
        left_out += names_of(param, found.left_out)
        read.append(dataclasses.replace(tool, parameters=found.schema))
    return RequestSchemas(constraint, tuple(read), tuple(left_out))


def _check_lengths(constraint: Constraint | None, tools: Sequence[Tool]) -> None:
    """Refuse what is too large before any of it is read: to read a schema takes many times its size."""
    size = 0
    if constraint is not None and constraint.kind == "json":
        size += check_length(constraint.value, constraint.param)
    for i, tool in enumerate(tools):
        size += 0 if tool.parameters is None else check_length(tool.parameters, _param(i))
        if size > _MOST:
            raise InvalidParameter(
                f"tools: {size:,} characters of schemas, with that of tools.{i}; at most {_MOST:,} are allowed.",
                param="tools",
            )


def _param(number: int) -> str:
    return f"tools.{number}.function.parameters"
