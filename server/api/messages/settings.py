"""How much the model thinks, which form its answer has, and edits of the context: fields that are objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine import SAMPLING_FIELDS, Constraint, InvalidParameter, Unsupported
from server.api.messages.fields import EFFORTS
from server.api.parsing import INTEGER, LIST, OBJECT, STRING, optional, required, typed

__all__ = ["Thoughts", "check_context_management", "read_format", "read_thoughts"]

_KINDS: Final = ("disabled", "enabled", "adaptive")
_KEPT: Final = ("all", {"type": "all"})
"""The values of `keep` that leave all thoughts in the prompt."""


@dataclass(frozen=True, slots=True)
class Thoughts:
    """How much the model thinks.

    Attributes:
        effort: the engine's `reasoning_effort`.
        budget: tokens of thought at most.
        place: the field of the body that asks for the effort.
    """

    effort: str | None = None
    budget: int | None = None
    place: str = "thinking"


def read_thoughts(data: Mapping[str, Any], ignored: list[str]) -> Thoughts:
    """Read `thinking` and `output_config.effort`. Adds names of fields without effect to `ignored`.

    To think without an effort is to think as much as templates do by themselves: `medium`.

    Raises:
        InvalidFormat, InvalidParameter: a wrong type or value.
        Unsupported: a kind of thinking, or a display, that this build cannot honour.
    """
    effort = _effort(data)
    given = optional(data, "thinking", OBJECT)
    if given is None:
        return Thoughts(effort, place="thinking" if effort is None else "output_config.effort")
    kind, budget = required(given, "type", STRING, "thinking."), optional(given, "budget_tokens", INTEGER, "thinking.")
    if kind not in _KINDS:
        raise Unsupported(
            f"thinking.type must be one of {', '.join(_KINDS)}, not {kind[:100]!r}.", param="thinking.type"
        )
    display = optional(given, "display", STRING, "thinking.")
    if display not in (None, "summarized"):
        raise Unsupported(
            f"thinking.display: thoughts are shown as they are, never {display[:100]!r}.", param="thinking.display"
        )
    known = ("type", "display", *(["budget_tokens"] if kind == "enabled" else []))
    ignored += [f"thinking.{key}" for key in given if key not in known]
    if kind == "disabled":
        if effort is not None:
            ignored.append("output_config.effort")
        return Thoughts("none")
    if kind == "adaptive" or budget is None:
        return Thoughts(effort or "medium")
    return Thoughts(effort or "medium", SAMPLING_FIELDS["thinking_budget"].checked("thinking.budget_tokens", budget))


def _effort(data: Mapping[str, Any]) -> str | None:
    config = optional(data, "output_config", OBJECT) or {}
    effort = optional(config, "effort", STRING, "output_config.")
    if effort is not None and effort not in EFFORTS:
        raise InvalidParameter(
            f"output_config.effort must be one of {', '.join(EFFORTS)}, not {effort[:100]!r}.",
            param="output_config.effort",
        )
    return EFFORTS[effort] if effort is not None else None


def read_format(data: Mapping[str, Any], ignored: list[str]) -> Constraint | None:
    """Read the form of the answer: `output_config.format`, or `output_format`, its older name.

    Adds names of unknown fields to `ignored`. What is asked for is promised, so it is enforced whole or refused.

    Raises:
        InvalidFormat: a field is missing or of the wrong type.
        InvalidParameter: both are given; Unsupported: a form that is not a JSON schema.
    """
    config = optional(data, "output_config", OBJECT) or {}
    ignored += [f"output_config.{key}" for key in config if key not in ("effort", "format")]
    forms = {
        "output_config.format": optional(config, "format", OBJECT, "output_config."),
        "output_format": optional(data, "output_format", OBJECT),
    }
    given = {at: form for at, form in forms.items() if form is not None}
    if len(given) > 1:
        raise InvalidParameter("output_config.format and output_format cannot be combined.", param="output_format")
    for at, form in given.items():
        kind = required(form, "type", STRING, f"{at}.")
        if kind != "json_schema":
            raise Unsupported(f"{at}.type must be json_schema, not {kind[:100]!r}.", param=f"{at}.type")
        ignored += [f"{at}.{key}" for key in form if key not in ("type", "schema")]
        return Constraint("json", required(form, "schema", OBJECT, f"{at}."), param=f"{at}.schema")
    return None


def check_context_management(data: Mapping[str, Any], ignored: list[str]) -> None:
    """Refuse edits of the context, except one that edits nothing: to keep all thoughts.

    Raises:
        Unsupported: an edit that would change the prompt.
    """
    given = optional(data, "context_management", OBJECT) or {}
    ignored += [f"context_management.{key}" for key in given if key != "edits"]
    for i, edit in enumerate(optional(given, "edits", LIST, "context_management.") or []):
        at = f"context_management.edits.{i}"
        kind = required(typed(edit, at, OBJECT), "type", STRING, f"{at}.")
        if kind != "clear_thinking_20251015":
            raise Unsupported(f"{at}.type: {kind[:100]!r} is not supported by this build.", param=f"{at}.type")
        if edit.get("keep") not in _KEPT:
            raise Unsupported(f"{at}.keep: only all is supported by this build.", param=f"{at}.keep")
        ignored += [f"{at}.{key}" for key in edit if key not in ("type", "keep")]
