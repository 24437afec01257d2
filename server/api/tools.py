"""The tools that a request offers to the model, and which of them the reply must call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from engine import InvalidParameter, Tool, ToolChoice, Unsupported
from server.api.fields import MAX_TOOLS
from server.api.parsing import FLAG, LIST, OBJECT, STRING, at_most, optional, required, typed

TOOL_FIELDS: Final = ("name", "description", "parameters", "strict")
TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def function_name(function: Mapping[str, Any], at: str) -> str:
    name: str = required(function, "name", STRING, at)
    if not TOOL_NAME.fullmatch(name):
        raise InvalidParameter(
            f"{at}name must be 1 to 64 of the characters A-Z a-z 0-9 _ -, not {name[:100]!r}.", param=f"{at}name"
        )
    return name


def read_tools(data: Mapping[str, Any], ignored: list[str]) -> tuple[tuple[Tool, ...], ToolChoice]:
    """Read the tools that the model may call, none with `tool_choice: none`, and whether it must call one."""
    given = optional(data, "tools", LIST) or []
    at_most(MAX_TOOLS, len(given), "tools", "definitions")
    tools = [_tool(tool, f"tools.{i}.", ignored) for i, tool in enumerate(given)]
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidParameter(
                f"tools.{i}.function.name: {name!r} is there twice.", param=f"tools.{i}.function.name"
            )
    optional(data, "parallel_tool_calls", FLAG)
    choice = data.get("tool_choice")
    if choice is None or choice == "auto":
        return tuple(tools), ToolChoice()
    if choice == "none":
        return (), ToolChoice()
    return tuple(tools), _chosen(choice, names, ignored)


def _tool(tool: Any, at: str, ignored: list[str]) -> Tool:
    typed(tool, at[:-1], OBJECT)
    kind = required(tool, "type", STRING, at)
    if kind != "function":
        raise Unsupported(f"{at}type: only function is supported, not {kind[:100]!r}.", param=f"{at}type")
    function = required(tool, "function", OBJECT, at)
    here = f"{at}function."
    found = Tool(
        function_name(function, here),
        optional(function, "description", STRING, here),
        optional(function, "parameters", OBJECT, here),
        bool(optional(function, "strict", FLAG, here)),
    )
    ignored += [f"{at}{key}" for key in tool if key not in ("type", "function")]
    ignored += [f"{here}{key}" for key in function if key not in TOOL_FIELDS]
    return found


def _chosen(choice: Any, names: list[str], ignored: list[str]) -> ToolChoice:
    """Read a `tool_choice` that demands a call: `required`, or an object that names the function."""
    typed(choice, "tool_choice", ((str, dict), "a string or an object"))
    if isinstance(choice, str):
        if choice != "required":
            raise InvalidParameter(
                f"tool_choice must be none, auto, required or a function, not {choice[:100]!r}.", param="tool_choice"
            )
        if not names:
            raise InvalidParameter("tool_choice: required needs at least one tool.", param="tool_choice")
        return ToolChoice("required")
    else:
        kind = optional(choice, "type", STRING, "tool_choice.")
        if kind not in (None, "function"):
            raise Unsupported(
                f"tool_choice.type: only function is supported, not {kind[:100]!r}.", param="tool_choice.type"
            )
        ignored += [f"tool_choice.{key}" for key in choice if key not in ("type", "function")]
        function = required(choice, "function", OBJECT, "tool_choice.")
        ignored += [f"tool_choice.function.{key}" for key in function if key != "name"]
        name = required(function, "name", STRING, "tool_choice.function.")
        if name not in names:
            at = "tool_choice.function.name"
            raise InvalidParameter(f"{at}: {name[:100]!r} is not among the tools.", param=at)
        return ToolChoice("function", name)
