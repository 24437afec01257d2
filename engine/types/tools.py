"""The tools that a model may call, and whether it must call one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from engine.errors import InvalidParameter


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
        InvalidParameter: another kind, or a name with any kind but `function`.
    """

    kind: Literal["auto", "required", "function"] = "auto"
    name: str | None = None

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


AUTO: Final = ToolChoice()
"""The default: the model decides whether it calls a tool."""
