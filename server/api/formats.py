"""The form that a reply must have: `response_format` or one of the `guided_*` fields, as a `Constraint`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from engine import Constraint, InvalidParameter
from server.api.fields import MAX_CHOICES, BodyFields
from server.api.parsing import FLAG, OBJECT, STRING, optional, required, typed
from server.json_text import load_text

FORMAT_FIELDS: Final = ("name", "description", "schema", "strict")
FORMAT_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def read_constraint(fields: BodyFields, data: Mapping[str, Any], ignored: list[str]) -> Constraint | None:
    """Read the one field that constrains the reply, if there is one. Adds names of unknown fields to `ignored`.

    Raises:
        InvalidParameter: there are two, or the value of one is wrong.
    """
    found = {name: c for name, c in _constraints(fields, data, ignored) if c is not None}
    if len(found) > 1:
        names = list(found)
        raise InvalidParameter(f"{names[0]} and {names[1]} cannot be combined.", param=names[1])
    return next(iter(found.values()), None)


def _constraints(
    fields: BodyFields, data: Mapping[str, Any], ignored: list[str]
) -> Iterator[tuple[str, Constraint | None]]:
    yield "response_format", _response_format(fields.given(data, "response_format"), ignored)
    yield "guided_json", _json(fields.given(data, "guided_json"), "guided_json")
    regex, grammar = (_text(fields.given(data, name), name) for name in ("guided_regex", "guided_grammar"))
    yield "guided_regex", None if regex is None else Constraint("regex", regex, param="guided_regex")
    yield "guided_grammar", None if grammar is None else Constraint("grammar", grammar, param="guided_grammar")
    yield "guided_choice", _choice(fields.given(data, "guided_choice"), "guided_choice")


def _json(schema: Any, name: str) -> Constraint | None:
    if isinstance(schema, str):
        try:
            schema = load_text(schema)
        except ValueError as error:
            raise InvalidParameter(f"{name} is not JSON: {error}.", param=name) from None
        typed(schema, name, OBJECT)
    return None if schema is None else Constraint("json", schema, param=name)


def _text(text: str | None, name: str) -> str | None:
    if text == "":
        raise InvalidParameter(f"{name} must not be empty.", param=name)
    return text


def _choice(choices: list[Any] | None, name: str) -> Constraint | None:
    if choices is None:
        return None
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidParameter(f"{name} takes 1 to {MAX_CHOICES} texts, not {len(choices)}.", param=name)
    texts = [typed(text, f"{name}.{i}", STRING) for i, text in enumerate(choices)]
    if "" in texts:
        raise InvalidParameter(f"{name} must not hold an empty text.", param=name)
    return Constraint("choice", texts, param=name)


def _response_format(form: Mapping[str, Any] | None, ignored: list[str]) -> Constraint | None:
    if form is None:
        return None
    at = "response_format."
    kind = required(form, "type", STRING, at)
    ignored += [f"{at}{key}" for key in form if key not in ("type", "json_schema")]
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json", {"type": "object"})
    if kind != "json_schema":
        raise InvalidParameter(
            f"response_format.type must be text, json_object or json_schema, not {kind[:100]!r}.", param=f"{at}type"
        )
    inner = required(form, "json_schema", OBJECT, at)
    at += "json_schema."
    name = required(inner, "name", STRING, at)
    if not FORMAT_NAME.fullmatch(name):
        raise InvalidParameter(
            f"{at}name must be 1 to 64 of the characters A-Z a-z 0-9 _ -, not {name[:100]!r}.", param=f"{at}name"
        )
    optional(inner, "description", STRING, at)
    schema = required(inner, "schema", OBJECT, at)
    ignored += [f"{at}{key}" for key in inner if key not in FORMAT_FIELDS]
    return Constraint("json", schema, bool(optional(inner, "strict", FLAG, at)), f"{at}schema")
