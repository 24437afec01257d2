"""The form that a reply must have, in every dialect that clients speak, as a `Constraint`.

`response_format` is OpenAI's; with a `schema` beside its `type` it is llama.cpp's and that of several services.
`guided_*` and `structured_outputs` are vLLM's, `json_schema` and `grammar` llama.cpp's, `regex` and `ebnf` SGLang's. A
request may have one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from engine import Constraint, InvalidParameter, Unsupported
from server.api.fields import MAX_CHOICES, BodyFields
from server.api.parsing import FLAG, LIST, OBJECT, STRING, Kind, optional, required, typed
from server.api.tools import check_name
from server.json_text import load_text

FORMAT_FIELDS: Final = ("name", "description", "schema", "strict")
_SCHEMA: Final[Kind] = ((dict, str), "an object, or its text")
_ANY_OBJECT: Final = {"type": "object"}

_OF_FIELDS: Final = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
    "guided_choice": "choice",
    "json_schema": "json",
    "regex": "regex",
    "grammar": "grammar",
    "ebnf": "grammar",
}
"""Fields of a body, and the form that each asks for."""
_OF_STRUCTURED: Final = {"json": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
"""Fields of `structured_outputs`, and the form that each asks for."""
_NOT_STRICT: Final = frozenset(("json_schema",))
"""Fields whose schema is enforced as far as it can be, as where they come from; the rest is checked afterwards."""
_GBNF: Final = re.compile(r"^[ \t]*[\w-]+\s*::=", re.MULTILINE)
"""The head of a rule in GBNF. No line of a grammar in Lark can begin so."""
_STRUCTURED: Final = "structured_outputs"
_STRUCTURED_REFUSED: Final = {
    "structural_tag": None,
    "disable_any_whitespace": False,
    "disable_additional_properties": False,
    "whitespace_pattern": None,
}
"""Fields of `structured_outputs` that this build cannot honour, with the value that asks for what happens anyway."""


def read_constraint(fields: BodyFields, data: Mapping[str, Any], ignored: list[str]) -> Constraint | None:
    """Read the one field that constrains the reply, if there is one. Adds names of unknown fields to `ignored`.

    Raises:
        InvalidParameter: there are two, or the value of one is wrong.
        Unsupported: a form that this build cannot honour.
    """
    found = {name: c for name, c in _constraints(fields, data, ignored) if c is not None}
    if len(found) > 1:
        names = list(found)
        raise InvalidParameter(f"{names[0]} and {names[1]} cannot be combined.", param=names[1])
    return next(iter(found.values()), None)


def _constraints(
    fields: BodyFields, data: Mapping[str, Any], ignored: list[str]
) -> Iterator[tuple[str, Constraint | None]]:
    known = fields.honoured.keys()
    if "response_format" in known:
        yield "response_format", _response_format(fields.given(data, "response_format"), ignored)
    for name, kind in _OF_FIELDS.items():
        if name in known:
            yield name, _constraint(kind, fields.given(data, name), name)
    if _STRUCTURED in known:
        yield from _structured(fields.given(data, _STRUCTURED) or {}, ignored)


def _constraint(kind: str, value: Any, name: str) -> Constraint | None:
    """Read the value of a form that was given at `name`; None asks for none."""
    if value is None:
        return None
    match kind:
        case "json":
            return Constraint("json", _schema(value, name), name not in _NOT_STRICT, name)
        case "choice":
            return Constraint("choice", _choices(typed(value, name, LIST), name), param=name)
    if typed(value, name, STRING) == "":
        raise InvalidParameter(f"{name} must not be empty.", param=name)
    if kind == "regex":
        return Constraint("regex", value, param=name)
    return Constraint("gbnf" if _GBNF.search(value) else "grammar", value, param=name)


def _schema(schema: Any, name: str) -> Any:
    """Read a JSON schema, or the text of one."""
    if not isinstance(typed(schema, name, _SCHEMA), str):
        return schema
    try:
        schema = load_text(schema)
    except ValueError as error:
        raise InvalidParameter(f"{name} is not JSON: {error}.", param=name) from None
    return typed(schema, name, OBJECT)


def _choices(choices: list[Any], name: str) -> list[str]:
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidParameter(f"{name} takes 1 to {MAX_CHOICES} texts, not {len(choices)}.", param=name)
    texts = [typed(text, f"{name}.{i}", STRING) for i, text in enumerate(choices)]
    if "" in texts:
        raise InvalidParameter(f"{name} must not hold an empty text.", param=name)
    return texts


def _structured(form: Mapping[str, Any], ignored: list[str]) -> Iterator[tuple[str, Constraint | None]]:
    """Read vLLM's `structured_outputs`: an object with one form in it."""
    for name, neutral in _STRUCTURED_REFUSED.items():
        if form.get(name) is not None and form[name] is not neutral:
            at = f"{_STRUCTURED}.{name}"
            raise Unsupported(f"{at} is not supported by this build.", param=at)
    for name, kind in _OF_STRUCTURED.items():
        at = f"{_STRUCTURED}.{name}"
        yield at, _constraint(kind, form.get(name), at)
    at = f"{_STRUCTURED}.json_object"
    wanted = optional(form, "json_object", FLAG, f"{_STRUCTURED}.")
    yield at, Constraint("json", _ANY_OBJECT, param=at) if wanted else None
    known = {*_OF_STRUCTURED, *_STRUCTURED_REFUSED, "json_object"}
    ignored += [f"{_STRUCTURED}.{key}" for key in form if key not in known]


def _response_format(form: Mapping[str, Any] | None, ignored: list[str]) -> Constraint | None:
    if form is None:
        return None
    at = "response_format."
    kind = required(form, "type", STRING, at)
    if kind not in ("text", "json_object", "json_schema"):
        raise InvalidParameter(
            f"response_format.type must be text, json_object or json_schema, not {kind[:100]!r}.", param=f"{at}type"
        )
    beside = optional(form, "schema", OBJECT, at) if kind != "text" else None
    inner = optional(form, "json_schema", OBJECT, at) if kind == "json_schema" else None
    read = {"text": ("type",), "json_object": ("type", "schema"), "json_schema": ("type", "schema", "json_schema")}[
        kind
    ]
    ignored += [f"{at}{key}" for key in form if key not in read and form[key] is not None]
    if kind == "text":
        return None
    if inner is None and beside is not None:
        return Constraint("json", beside, False, f"{at}schema")
    if kind == "json_object":
        return Constraint("json", _ANY_OBJECT)
    if beside is not None:
        raise InvalidParameter(f"{at}json_schema and {at}schema cannot be combined.", param=f"{at}schema")
    return _named_schema(required(form, "json_schema", OBJECT, at), f"{at}json_schema.", ignored)


def _named_schema(inner: Mapping[str, Any], at: str, ignored: list[str]) -> Constraint:
    """Read OpenAI's form: a schema with a name, which changes nothing and may be missing."""
    name = optional(inner, "name", STRING, at)
    if name is not None:
        check_name(name, f"{at}name")
    optional(inner, "description", STRING, at)
    schema = required(inner, "schema", OBJECT, at)
    ignored += [f"{at}{key}" for key in inner if key not in FORMAT_FIELDS]
    return Constraint("json", schema, bool(optional(inner, "strict", FLAG, at)), f"{at}schema")
