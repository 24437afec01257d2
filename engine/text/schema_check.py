"""Checks a finished text against a JSON schema: `unenforced_errors`.

Schemas come from requests. A check is bounded by a count, not by a clock, so that the answer depends only on the input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, Final

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend
from referencing import Registry

from engine.errors import one_line, panicked
from engine.text.bounded_json import parse
from engine.text.json_schema import subschemas

__all__ = ["unenforced_errors"]

_CHECKS: Final = 20_000  # keywords that are evaluated for one text
_LEVELS: Final = 100
"""Keywords that are evaluated one inside the other, and levels of a text. Python's own limit counts the caller's stack,
too, so that it is reached sooner or later; and the library's maps in Rust make a panic of it, no `Exception`."""


class _TooMuchError(Exception):
    """A validation evaluated more keywords than allowed, or more of them one inside the other; the message tells."""


def unenforced_errors(text: str, schema: Any) -> str | None:
    """Validate a finished text; return why it does not satisfy a schema, None if it does.

    Expressions are not run: the grammar enforces those it can, and Python's could run for ever. Nothing is fetched: a
    reference to another document is an error. A validation of too many steps, or of too many one inside the other, ends
    with an error that says so: references in a circle are such a one.
    """
    schema = deepcopy(schema)
    for part in subschemas(schema):
        if isinstance(part, dict):
            part.pop("pattern", None)
            if part.pop("patternProperties", None):
                part.pop("additionalProperties", None)
                part.pop("unevaluatedProperties", None)
    try:
        return _first_error(parse(text.encode(), _LEVELS), schema)
    except _TooMuchError as problem:
        return f"it cannot be checked: {problem}"
    except BaseException as problem:
        # An invalid schema can make the validator raise anything. The error says that the text is unchecked; other
        # replies must not end because of it.
        if not isinstance(problem, Exception) and not panicked(problem):
            raise
        return one_line(f"it cannot be checked: {type(problem).__name__}: {problem}")


def _first_error(value: Any, schema: Any) -> str | None:
    left, level = _CHECKS, 0

    def counted(check: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
            nonlocal left, level
            # An enum is gone through, and so are the items of a list.
            left -= 1 + sum(len(part) // 8 for part in (wanted, instance) if isinstance(part, list | dict))
            if check is _unique and isinstance(instance, list):
                left -= len(instance)
            if left < 0:
                raise _TooMuchError(f"more than {_CHECKS:,} keywords would have to be evaluated")
            if level >= _LEVELS:
                raise _TooMuchError(f"more than {_LEVELS} keywords would have to be evaluated one inside the other")
            level += 1
            try:
                yield from check(validator, wanted, instance, schema) or ()
            finally:
                level -= 1

        return evaluate

    checks = {**Draft202012Validator.VALIDATORS, "uniqueItems": _unique}
    validator: Any = extend(  # type: ignore[no-untyped-call]
        Draft202012Validator, {name: counted(check) for name, check in checks.items()}
    )
    error = next(iter(validator(schema, registry=Registry()).iter_errors(value)), None)
    return None if error is None else f"{error.json_path}: {error.message}"[:500]


def _unique(_: Any, wanted: Any, instance: Any, __: Any) -> Iterator[ValidationError]:
    """Check `uniqueItems` in one pass; jsonschema compares each item with each other."""
    if wanted and isinstance(instance, list):
        seen = {json.dumps(_canonical(item), sort_keys=True) for item in instance}
        if len(seen) < len(instance):
            yield ValidationError("its items are not unique")


def _canonical(value: Any) -> Any:
    """Return JSON in which equal values have one spelling: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(value, dict):
        return {key: _canonical(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_canonical(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
