"""The fields of a body that are objects of options: `text`, `reasoning`, `include`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine import Constraint, InvalidParameter, Unsupported
from server.api.fields import CHAT, SHARED, BodyFields
from server.api.formats import FORMAT_FIELDS, read_constraint
from server.api.parsing import FLAG, OBJECT, STRING, at_most, optional, required, typed
from server.api.responses.fields import INCLUDABLE, RESPONSES
from server.api.tools import check_name

__all__ = ["read_effort", "read_form", "read_include"]

_FORMS = BodyFields(SHARED)
_MOST_INCLUDED = 100
_EFFORTS: tuple[str, ...] = tuple(CHAT.honoured["reasoning_effort"].schema["enum"])


def read_form(data: Mapping[str, Any], ignored: list[str]) -> Constraint | None:
    """Read what the answer must be: `text.format`, or an extension that constrains it. Adds unknown names to `ignored`.

    Raises:
        InvalidFormat, InvalidParameter: there are two, or one is wrong.
        Unsupported: a `text.verbosity` other than medium.
    """
    others = {name: value for name, value in data.items() if name in RESPONSES.honoured}
    constraint = read_constraint(_FORMS, others, ignored)
    text = RESPONSES.given(data, "text") or {}
    verbosity = optional(text, "verbosity", STRING, "text.")
    if verbosity not in (None, "medium"):
        raise Unsupported(
            f"text.verbosity: {verbosity[:100]!r} is not supported by this build, which leaves the length of answers "
            "to the model.",
            param="text.verbosity",
        )
    ignored += [f"text.{key}" for key in text if key not in ("format", "verbosity")]
    form = optional(text, "format", OBJECT, "text.")
    asked = None if form is None else _format(form, ignored)
    if asked is not None and constraint is not None:
        raise InvalidParameter(f"text.format and {constraint.param} cannot be combined.", param=constraint.param)
    return asked or constraint


def _format(form: Mapping[str, Any], ignored: list[str]) -> Constraint | None:
    at = "text.format."
    kind = required(form, "type", STRING, at)
    known = ("type", *FORMAT_FIELDS) if kind == "json_schema" else ("type",)
    ignored += [f"{at}{key}" for key in form if key not in known]
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json", {"type": "object"}, param="text.format")
    if kind != "json_schema":
        raise InvalidParameter(
            f"{at}type must be text, json_object or json_schema, not {kind[:100]!r}.", param=f"{at}type"
        )
    name = optional(form, "name", STRING, at)
    if name is not None:
        check_name(name, f"{at}name")
    optional(form, "description", STRING, at)
    schema = required(form, "schema", OBJECT, at)
    return Constraint("json", schema, bool(optional(form, "strict", FLAG, at)), f"{at}schema")


def read_effort(data: Mapping[str, Any], ignored: list[str]) -> str | None:
    """Read `reasoning`, of which the effort is left. Adds names of unknown fields to `ignored`.

    Raises:
        InvalidFormat: a member of the wrong type.
        InvalidParameter: an effort that nobody knows; Unsupported: a member that this build cannot honour.
    """
    given = RESPONSES.given(data, "reasoning") or {}
    neutral = {"summary": "auto", "generate_summary": "auto", "context": "auto", "mode": "standard"}
    for name, value in neutral.items():
        found = optional(given, name, STRING, "reasoning.")
        if found not in (None, value):
            why = "; thoughts come whole, without a summary" if "summary" in name else ""
            raise Unsupported(
                f"reasoning.{name}: {found[:100]!r} is not supported by this build{why}.", param=f"reasoning.{name}"
            )
    ignored += [f"reasoning.{key}" for key in given if key != "effort" and key not in neutral]
    effort: str | None = optional(given, "effort", STRING, "reasoning.")
    if effort is not None and effort not in _EFFORTS:
        raise InvalidParameter(
            f"reasoning.effort must be one of {', '.join(_EFFORTS)}, not {effort[:100]!r}.", param="reasoning.effort"
        )
    return effort


def read_include(data: Mapping[str, Any]) -> frozenset[str]:
    """Read which details the response is to hold.

    Raises:
        InvalidFormat: not a list of strings.
        InvalidParameter: one that nobody knows.
    """
    given = RESPONSES.given(data, "include") or []
    at_most(_MOST_INCLUDED, len(given), "include", "names")
    for i, name in enumerate(given):
        if typed(name, f"include.{i}", STRING) not in INCLUDABLE:
            raise InvalidParameter(
                f"include.{i} must be one of {', '.join(INCLUDABLE)}, not {name[:100]!r}.", param=f"include.{i}"
            )
    return frozenset(given)
