"""The tools that a model may call, and whether it must call one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from engine.errors import InvalidFormat, InvalidParameter


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call. Its members are not changed after construction."""

    name: str
    description: str | None = None
    """What the function does, for the model. None is left out of the prompt; an empty text is not."""
    parameters: Mapping[str, Any] | None = None
    """The JSON schema of its arguments, an object's. None is left out of the prompt and allows any object."""
    strict: bool = False
    """Whether calls must satisfy `parameters` in full: a schema that cannot be enforced is refused."""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model must call a tool: it decides (`auto`), some tool (`required`), or the one `name`d (`function`).

    Raises:
        InvalidParameter: another kind, a name with any kind but `function`, or `allowed` with that.
    """

    kind: Literal["auto", "required", "function"] = "auto"
    name: str | None = None
    allowed: tuple[str, ...] = ()
    """Names of the tools that may be called, of those that the prompt shows; empty: all of them."""

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "required", "function"):
            raise InvalidParameter(
                f"tool_choice must be auto, required or function, not {self.kind!r:.100}.", param="tool_choice"
            )
        if (self.name is not None) != (self.kind == "function"):
            raise InvalidParameter(
                f"tool_choice: {self.kind} takes {'the name of a function' if self.name is None else 'no name'}.",
                param="tool_choice",
            )
        if self.allowed and self.kind == "function":
            raise InvalidParameter("tool_choice: function takes no list of allowed tools.", param="tool_choice")

    def allows(self, name: str) -> bool:
        """Return whether the tool of this name may be called."""
        return name == self.name if self.kind == "function" else not self.allowed or name in self.allowed


AUTO: Final = ToolChoice()
"""The default: the model decides whether it calls a tool."""


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Refuse tools of another type (the dicts of an OpenAI client, say), and a choice of a tool that is not offered.

    Raises:
        InvalidFormat: a value of another type.
        InvalidParameter: a name that no tool has.
    """
    for i, tool in enumerate(tools):
        if not isinstance(tool, Tool):
            raise InvalidFormat(f"tools.{i} must be a Tool, not {type(tool).__name__}.", param=f"tools.{i}")
    if not isinstance(choice, ToolChoice):
        raise InvalidFormat(f"tool_choice must be a ToolChoice, not {type(choice).__name__}.", param="tool_choice")
    names = {tool.name for tool in tools}
    for name in (*([] if choice.name is None else [choice.name]), *choice.allowed):
        if name not in names:
            raise InvalidParameter(f"tool_choice: there is no tool {name!r}.", param="tool_choice")
