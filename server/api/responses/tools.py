"""The `tools` of a body, flat functions and namespaces of them, and `tool_choice`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine import InvalidParameter, Tool, ToolChoice, Unsupported
from server.api.fields import MAX_TOOLS
from server.api.parsing import FLAG, LIST, OBJECT, STRING, at_most, optional, required, typed
from server.api.responses.fields import RESPONSES
from server.api.tools import MEMBERS_REFUSED, check_once, function_name, refuse_members

__all__ = ["OfferedTools", "called_name", "read_tools", "shown_tool"]

_FIELDS: Final = ("type", "name", "description", "parameters", "strict")


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """What a request offers to the model.

    Attributes:
        tools: none with `tool_choice: none`.
        choice: which of them the reply must or may call.
        names: of the functions in namespaces: the model's name → the namespace and the name in it.
        places: the engine's path of each tool → its own.
    """

    tools: tuple[Tool, ...]
    choice: ToolChoice
    names: Mapping[str, tuple[str, str]]
    places: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Found:
    tool: Tool
    at: str
    namespace: str | None
    name: str


def shown_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a definition that was read as a response repeats it, with what it may leave out."""
    if tool["type"] == "namespace":
        inner = [shown_tool(one) for one in tool["tools"]]
        return {
            "type": "namespace",
            "name": tool["name"],
            "description": tool.get("description") or "",
            "tools": inner,
        }
    return {name: tool.get(name) for name in _FIELDS}


def called_name(call: Mapping[str, Any], at: str) -> str:
    """Return the name by which the model knows the function of a call, of a tool, or of a choice.

    `at`: the path of the object that has `name` and perhaps `namespace`, with a dot at its end.
    """
    name, namespace = function_name(call, at), optional(call, "namespace", STRING, at)
    if namespace is None:
        return name
    try:
        return f"{function_name({'name': namespace}, '')}.{name}"
    except InvalidParameter as error:
        at += "namespace"
        raise InvalidParameter(at + error.message.removeprefix("name"), param=at) from None


def read_tools(data: Mapping[str, Any], ignored: list[str]) -> OfferedTools:
    """Read the tools, and whether the model must call one. Adds names of unknown fields to `ignored`.

    Raises:
        InvalidFormat, InvalidParameter: a definition or the choice is wrong.
        Unsupported: a tool that is no function: this server runs none itself.
    """
    given = RESPONSES.given(data, "tools") or []
    at_most(MAX_TOOLS, len(given), "tools", "definitions")
    found = [one for i, tool in enumerate(given) for one in _tools(tool, f"tools.{i}.", ignored)]
    at_most(MAX_TOOLS, len(found), "tools", "functions")
    check_once([one.tool.name for one in found], [f"{one.at}name" for one in found])
    by_name = {one.tool.name: one for one in found}
    RESPONSES.given(data, "parallel_tool_calls")
    offered, choice = _chosen(RESPONSES.given(data, "tool_choice"), by_name, ignored)
    names = {one.tool.name: (one.namespace, one.name) for one in found if one.namespace is not None}
    places = {f"tools.{i}.function": one.at[:-1] for i, one in enumerate(offered)}
    return OfferedTools(tuple(one.tool for one in offered), choice, names, places)


def _tools(tool: Any, at: str, ignored: list[str]) -> Iterator[_Found]:
    """Yield the function that a definition describes, or those of a namespace."""
    kind = required(typed(tool, at[:-1], OBJECT), "type", STRING, at)
    if kind == "namespace":
        namespace = function_name(tool, at)
        if optional(tool, "description", STRING, at):  # no template has a place for it
            ignored.append(f"{at}description")
        ignored += [f"{at}{key}" for key in tool if key not in ("type", "name", "description", "tools")]
        for i, inner in enumerate(required(tool, "tools", LIST, at)):
            here = f"{at}tools.{i}."
            if required(typed(inner, here[:-1], OBJECT), "type", STRING, here) != "function":
                raise _unsupported(inner["type"], here)
            yield _function(inner, here, namespace, ignored)
    elif kind == "function":
        yield _function(tool, at, None, ignored)
    else:
        raise _unsupported(kind, at)


def _unsupported(kind: str, at: str) -> Unsupported:
    return Unsupported(
        f"{at}type: a tool of type {kind[:100]!r} is not supported; this server runs no tools itself, and the model "
        "calls functions only. Leave it out, or switch it off in the client.",
        param=f"{at}type",
    )


def _function(tool: Mapping[str, Any], at: str, namespace: str | None, ignored: list[str]) -> _Found:
    refuse_members(tool, at)
    name = function_name(tool, at)
    found = Tool(
        name if namespace is None else f"{namespace}.{name}",
        optional(tool, "description", STRING, at),
        optional(tool, "parameters", OBJECT, at),
        bool(optional(tool, "strict", FLAG, at)),
    )
    ignored += [f"{at}{key}" for key in tool if key not in (*_FIELDS, *MEMBERS_REFUSED)]
    return _Found(found, at, namespace, name)


def _chosen(choice: Any, tools: Mapping[str, _Found], ignored: list[str]) -> tuple[list[_Found], ToolChoice]:
    """Return the tools that the model sees, and what is demanded of it."""
    offered = list(tools.values())
    if choice is None or choice == "auto":
        return offered, ToolChoice()
    if choice == "none":
        return [], ToolChoice()
    if isinstance(choice, str):
        if choice != "required":
            raise InvalidParameter(
                f"tool_choice must be none, auto, required or an object, not {choice[:100]!r}.", param="tool_choice"
            )
        if not tools:
            raise InvalidParameter("tool_choice: required needs at least one tool.", param="tool_choice")
        return offered, ToolChoice("required")
    kind = required(choice, "type", STRING, "tool_choice.")
    if kind == "allowed_tools":
        return offered, _allowed(choice, tools, ignored)
    ignored += [f"tool_choice.{key}" for key in choice if key not in ("type", "name", "namespace")]
    return offered, ToolChoice("function", _named(choice, "tool_choice.", tools).tool.name)


def _allowed(choice: Mapping[str, Any], tools: Mapping[str, _Found], ignored: list[str]) -> ToolChoice:
    """Read which of the tools may be called. As in a chat, the prompt shows all of them."""
    mode: Any = required(choice, "mode", STRING, "tool_choice.")
    if mode not in ("auto", "required"):
        raise InvalidParameter(
            f"tool_choice.mode must be auto or required, not {mode[:100]!r}.", param="tool_choice.mode"
        )
    given = required(choice, "tools", LIST, "tool_choice.")
    ignored += [f"tool_choice.{key}" for key in choice if key not in ("type", "mode", "tools")]
    if not given:
        raise InvalidParameter(
            "tool_choice.tools must hold at least one tool; tool_choice: none allows none.", param="tool_choice.tools"
        )
    at_most(MAX_TOOLS, len(given), "tool_choice.tools", "tools")
    places = [f"tool_choice.tools.{i}." for i in range(len(given))]
    wanted = [_named(typed(one, at[:-1], OBJECT), at, tools).tool.name for at, one in zip(places, given, strict=True)]
    return ToolChoice(mode, allowed=tuple(dict.fromkeys(wanted)))


def _named(holder: Mapping[str, Any], at: str, tools: Mapping[str, _Found]) -> _Found:
    """Return the function that an object names."""
    kind = required(holder, "type", STRING, at)
    if kind != "function":
        raise Unsupported(f"{at}type: only function is supported, not {kind[:100]!r}.", param=f"{at}type")
    name = called_name(holder, at)
    if name not in tools:
        raise InvalidParameter(f"{at}name: {name[:100]!r} is not among the tools.", param=f"{at}name")
    return tools[name]
