"""The tools that a request offers to the model, and which of them the reply must call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from engine import InvalidParameter, Tool, ToolChoice, Unsupported
from server.api.fields import MAX_TOOLS
from server.api.parsing import FLAG, LIST, OBJECT, STRING, Kind, at_most, optional, required, typed
from server.json_text import to_json

TOOL_FIELDS: Final = ("name", "description", "parameters", "strict")
MOST_NAME: Final = 128
NAME: Final = re.compile(rf"[A-Za-z0-9_./-]{{1,{MOST_NAME}}}")
"""The names of functions and of forms: those of the OpenAI API, and what frameworks make of paths and packages."""
MAX_CALL_ID: Final = 256
"""Characters of a tool call's id."""
_ARGUMENTS: Final[Kind] = ((str, dict), "a string or an object")
MEMBERS_REFUSED: Final[Mapping[str, tuple[Any, ...]]] = {
    "defer_loading": (False,),
    "async": (False,),
    "allowed_callers": (["direct"],),
}
"""Members of a flat definition that are not honoured, each with the values that ask for what happens anyway."""


def function_name(function: Mapping[str, Any], at: str) -> str:
    name: str = required(function, "name", STRING, at)
    check_name(name, f"{at}name")
    return name


def check_name(name: str, at: str) -> None:
    """Refuse a name of other characters, or of too many."""
    if not NAME.fullmatch(name):
        what = f"{name[:100]!r}" if len(name) <= MOST_NAME else f"{len(name)}"
        raise InvalidParameter(
            f"{at} must be 1 to {MOST_NAME} of the characters A-Z a-z 0-9 _ - . /, not {what}.", param=at
        )


def call_id(holder: Mapping[str, Any], name: str, at: str) -> str:
    """Read the id of a call. `at`: the path of the object that has it, with a dot at its end."""
    found: str = required(holder, name, STRING, at)
    if not 1 <= len(found) <= MAX_CALL_ID:
        raise InvalidParameter(
            f"{at}{name} must have 1 to {MAX_CALL_ID} characters, not {len(found)}.", param=f"{at}{name}"
        )
    return found


def call_arguments(holder: Mapping[str, Any], at: str) -> str:
    """Read the `arguments` of an earlier call: a text, whatever it spells, or an object. Null is none. `at`: as above.

    Models write texts that are no JSON, and a conversation with one must be able to go on.
    """
    found = optional(holder, "arguments", _ARGUMENTS, at)
    return to_json(found) if isinstance(found, dict) else found or "{}"


def check_once(names: Sequence[str], places: Sequence[str]) -> None:
    """Refuse a function that is there twice. `places`: where each name stands in the body."""
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidParameter(f"{places[i]}: {name!r} is there twice.", param=places[i])


def refuse_members(tool: Mapping[str, Any], at: str) -> None:
    """Refuse members of a flat definition that this build does not honour."""
    for name, neutral in MEMBERS_REFUSED.items():
        if tool.get(name) is not None and tool[name] not in neutral:
            raise Unsupported(f"{at}{name} is not supported by this build.", param=f"{at}{name}")


def read_tools(data: Mapping[str, Any], ignored: list[str]) -> tuple[tuple[Tool, ...], ToolChoice]:
    """Read the tools that the model may call, none with `tool_choice: none`, and whether it must call one."""
    given = optional(data, "tools", LIST) or []
    at_most(MAX_TOOLS, len(given), "tools", "definitions")
    tools = [_tool(tool, f"tools.{i}.", ignored) for i, tool in enumerate(given)]
    names = [tool.name for tool in tools]
    check_once(names, [f"tools.{i}.function.name" for i in range(len(names))])
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
        if kind == "allowed_tools":
            return _allowed(choice, names, ignored)
        if kind not in (None, "function"):
            raise Unsupported(
                f"tool_choice.type: only function and allowed_tools are supported, not {kind[:100]!r}.",
                param="tool_choice.type",
            )
        return ToolChoice("function", _named(choice, "tool_choice.", names, ignored))


def _allowed(choice: Mapping[str, Any], names: list[str], ignored: list[str]) -> ToolChoice:
    """Read the list of tools that may be called, of those that the prompt shows."""
    at = "tool_choice.allowed_tools"
    given = required(choice, "allowed_tools", OBJECT, "tool_choice.")
    ignored += [f"tool_choice.{key}" for key in choice if key not in ("type", "allowed_tools")]
    ignored += [f"{at}.{key}" for key in given if key not in ("mode", "tools")]
    mode: Any = required(given, "mode", STRING, f"{at}.")
    if mode not in ("auto", "required"):
        raise InvalidParameter(f"{at}.mode must be auto or required, not {mode[:100]!r}.", param=f"{at}.mode")
    listed = required(given, "tools", LIST, f"{at}.")
    if not listed:
        raise InvalidParameter(
            f"{at}.tools must hold at least one tool; tool_choice: none allows none.", param=f"{at}.tools"
        )
    at_most(MAX_TOOLS, len(listed), f"{at}.tools", "names")
    allowed = [_named(tool, f"{at}.tools.{i}.", names, ignored) for i, tool in enumerate(listed)]
    return ToolChoice(mode, allowed=tuple(dict.fromkeys(allowed)))


def _named(tool: Any, at: str, names: list[str], ignored: list[str]) -> str:
    """Read the name of one of the tools from an object that names it."""
    kind = optional(typed(tool, at[:-1], OBJECT), "type", STRING, at)
    if kind not in (None, "function"):
        raise Unsupported(f"{at}type: only function is supported, not {kind[:100]!r}.", param=f"{at}type")
    ignored += [f"{at}{key}" for key in tool if key not in ("type", "function")]
    function = required(tool, "function", OBJECT, at)
    ignored += [f"{at}function.{key}" for key in function if key != "name"]
    name: str = required(function, "name", STRING, f"{at}function.")
    if name not in names:
        raise InvalidParameter(f"{at}function.name: {name[:100]!r} is not among the tools.", param=f"{at}function.name")
    return name
