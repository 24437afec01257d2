"""The tools that a request offers to the model, and which of them the reply must call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from engine import InvalidParameter, Tool, ToolChoice, Unsupported
from server.api.fields import MAX_TOOLS
from server.api.parsing import FLAG, LIST, OBJECT, STRING, at_most, optional, required, typed
from server.api.tools import MEMBERS_REFUSED, check_once, function_name, refuse_members

__all__ = ["read_tools"]

_KNOWN: Final = ("type", "name", "description", "input_schema", "strict", "cache_control", "eager_input_streaming")
_CHOICES: Final = ("auto", "any", "tool", "none")


def read_tools(data: Mapping[str, Any], ignored: list[str]) -> tuple[tuple[Tool, ...], ToolChoice, bool]:
    """Read the tools, none with `tool_choice: none`; whether one must be called; and whether several may be.

    Adds names of unknown fields to `ignored`. `cache_control` and `eager_input_streaming` change no reply.

    Raises:
        InvalidFormat: a field is missing or of the wrong type.
        InvalidParameter: a name twice, or the choice of a tool that is not there.
        Unsupported: a tool that Anthropic defines, or a field that this build cannot honour.
    """
    given = optional(data, "tools", LIST) or []
    at_most(MAX_TOOLS, len(given), "tools", "definitions")
    tools = [_tool(tool, f"tools.{i}.", ignored) for i, tool in enumerate(given)]
    names = [tool.name for tool in tools]
    check_once(names, [f"tools.{i}.name" for i in range(len(names))])
    choice = optional(data, "tool_choice", OBJECT)
    if choice is None:
        return tuple(tools), ToolChoice(), True
    parallel = not optional(choice, "disable_parallel_tool_use", FLAG, "tool_choice.")
    kind = required(choice, "type", STRING, "tool_choice.")
    known = ("type", "disable_parallel_tool_use", *(["name"] if kind == "tool" else []))
    ignored += [f"tool_choice.{key}" for key in choice if key not in known]
    if kind == "none":
        return (), ToolChoice(), True
    return tuple(tools), _chosen(kind, choice, names), parallel


def _tool(tool: Any, at: str, ignored: list[str]) -> Tool:
    typed(tool, at[:-1], OBJECT)
    kind = optional(tool, "type", STRING, at)
    if kind not in (None, "custom"):
        raise Unsupported(
            f"{at}type: {kind[:100]!r} is a tool that Anthropic defines; this server knows only tools with an "
            "input_schema of their own.",
            param=f"{at}type",
        )
    refuse_members(tool, at)
    optional(tool, "cache_control", OBJECT, at)
    optional(tool, "eager_input_streaming", FLAG, at)
    ignored += [f"{at}{key}" for key in tool if key not in _KNOWN and key not in MEMBERS_REFUSED]
    return Tool(
        function_name(tool, at),
        optional(tool, "description", STRING, at),
        required(tool, "input_schema", OBJECT, at),
        bool(optional(tool, "strict", FLAG, at)),
    )


def _chosen(kind: str, choice: Mapping[str, Any], names: Sequence[str]) -> ToolChoice:
    if kind not in _CHOICES:
        raise InvalidParameter(
            f"tool_choice.type must be one of {', '.join(_CHOICES)}, not {kind[:100]!r}.", param="tool_choice.type"
        )
    if kind == "auto":
        return ToolChoice()
    if kind == "any":
        if not names:
            raise InvalidParameter("tool_choice: any needs at least one tool.", param="tool_choice")
        return ToolChoice("required")
    name = required(choice, "name", STRING, "tool_choice.")
    if name not in names:
        raise InvalidParameter(f"tool_choice.name: {name[:100]!r} is not among the tools.", param="tool_choice.name")
    return ToolChoice("function", name)
