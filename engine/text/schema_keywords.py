"""The keywords of JSON schemas: what the value of each must be, and which values say nothing.

Draft 2020-12, the older drafts from 3 on, and OpenAPI 3.0. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = [
    "ANNOTATIONS", "HINTS", "INTEGER_FORMATS", "KEYWORDS", "LISTS", "MAPS", "SCHEMAS", "fault", "is_count",
    "says_nothing",
]  # fmt: skip

TYPES: Final = ("string", "number", "integer", "boolean", "object", "array", "null")

SCHEMAS: Final = frozenset(
    {
        "items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems",
        "unevaluatedProperties", "additionalItems",
    }
)  # fmt: skip
MAPS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
LISTS: Final = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})

HINTS: Final = frozenset({"password", "binary", "path", "file-path", "directory-path", "float", "double"})
"""Formats that neither allow nor forbid a value: OpenAPI's and pydantic's."""
INTEGER_FORMATS: Final = {
    **{f"int{n}": (-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in (8, 16, 32, 64)},
    **{f"uint{n}": (0, 2**n - 1) for n in (8, 16, 32, 64)},
}
"""Least and greatest value of an integer by its format. https://spec.openapis.org/registry/format/"""

ANNOTATIONS: Final = frozenset(
    {
        "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
        "contentEncoding", "contentMediaType", "contentSchema", "discriminator", "externalDocs", "xml", "nullable",
        "$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary",
        "propertyOrdering", "markdownDescription", "enumNames", "enumDescriptions",
        "errorMessage", "components",
    }
)  # fmt: skip
"""Keywords that neither allow nor forbid a value, and names and dialects, which are read elsewhere."""


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on; 2.0 is one."""
    return _is_number(value) and value >= 0 and (isinstance(value, int) or value.is_integer())


def _is_number(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_type(value: Any) -> bool:
    return all(isinstance(name, str) and name in TYPES for name in (value if isinstance(value, list) else [value]))


_SHAPES: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    **dict.fromkeys(SCHEMAS, (lambda v: isinstance(v, Mapping | bool), "a schema")),
    **dict.fromkeys(MAPS, (lambda v: isinstance(v, Mapping), "an object of schemas")),
    **dict.fromkeys(LISTS, (lambda v: isinstance(v, list) and bool(v), "a list of schemas, not empty")),
    **dict.fromkeys(
        (
            "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains",
            "maxContains",
        ),
        (is_count, "a whole number from 0 on"),
    ),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (_is_number, "a number")),
    **dict.fromkeys(
        ("pattern", "format", "$ref", "$dynamicRef", "$recursiveRef"), (lambda v: isinstance(v, str), "a string")
    ),
    "multipleOf": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "uniqueItems": (lambda v: isinstance(v, bool), "true or false"),
    "required": (_is_names, "a list of names"),
    "enum": (lambda v: isinstance(v, list), "a list"),
    "type": (_is_type, f"one of {', '.join(TYPES)}, or a list of them"),
    "dependentRequired": (
        lambda v: isinstance(v, Mapping) and all(_is_names(names) for names in v.values()), "an object of names"
    ),
}  # fmt: skip


def fault(keyword: str, value: Any) -> str | None:
    """Return what a keyword's value must be, if it is not; None if it is, or if the keyword has no shape."""
    fits, wanted = _SHAPES.get(keyword, (lambda _: True, ""))
    return None if fits(value) else wanted


def says_nothing(keyword: str, value: Any) -> bool:
    """Whether the value of a keyword is wrong and can mean nothing but that the keyword is absent.

    `null`; the empty list or object of a language that cannot tell the two; a list of no types; `required: true` of an
    older draft, where no object lists it as its member.
    """
    if keyword not in _SHAPES:
        return False
    if value is None or (keyword == "required" and isinstance(value, bool)):
        return True
    if keyword in ("type", "allOf"):
        return bool(value == [])
    wrong = [] if keyword in MAPS or keyword == "dependentRequired" else {} if keyword == "required" else ""
    return bool(value == wrong) and keyword not in ("pattern", "$ref", "$dynamicRef", "$recursiveRef")


KEYWORDS: Final = frozenset(_SHAPES) | {"const", "dependencies"}
"""Keywords that may allow or forbid a value."""
