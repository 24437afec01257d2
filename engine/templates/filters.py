"""Wraps Jinja's filters, tests and methods so that they count their input before they run and their result after.

The results of those that make much of little (`center`, `replace`, `join`, `format`) are counted beforehand.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from types import BuiltinMethodType, GeneratorType
from typing import Any, Final

import jinja2
from markupsafe import soft_str

from engine.templates.budget import MOST_WIDTH, Budget, OverBudget, current

__all__ = ["CALL", "COMPARING", "OWN", "QUICK", "bounded_filter", "bounded_test", "check_format", "check_method"]

_FORMAT: Final = re.compile(r"\d+")
CALL: Final = 20  # steps: it takes about as long as so many nodes
_PER_ENTRY: Final = 4  # steps
_SHORT: Final = 1 << 16  # characters
_MOST_INDENT: Final = 64
_ENCODINGS: Final = frozenset({"utf-8", "utf8", "ascii", "latin-1"})

_FREE: Final = frozenset({"length", "count", "first", "last", "default", "d", "items", "attr", "safe", "abs", "float"})
"""Filters whose time does not depend on the length of the value."""
_PLAIN: Final = frozenset({"string", "upper", "lower", "capitalize", "e", "escape", "forceescape"})
"""Filters whose result is about as long as their text."""
_LAZY: Final = frozenset({"map", "select", "selectattr", "reject", "rejectattr", "batch", "slice"})
"""Filters that return a generator, which is counted as it is used."""
_SHALLOW: Final = _LAZY | {"list", "reverse", "join"}
"""Filters that do not look inside the values of a list."""
_SORTING: Final = frozenset({"sort", "unique", "groupby", "dictsort", "min", "max"})
_SIZED: Final = frozenset({"center", "indent", "batch", "slice", "truncate", "round", "wordwrap", "urlize"})
"""Filters whose numbers are sizes."""
_SLOW: Final = frozenset({"pprint", "striptags", "urlize", "wordwrap", "xmlattr", "wordcount", "urlencode", "title"})
"""Filters for web pages. Some take time quadratic in the text's length."""
COMPARING: Final = frozenset(
    {
        *("in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=", "<", "lt", "lessthan", "<="),
        "le",
    }
    | {"lower", "upper"}
)
QUICK: Final = frozenset({"get", "items", "keys", "values"})
"""Methods whose time does not depend on any length."""
_PLACES: Final = frozenset(
    {*("find", "rfind", "index", "rindex", "count", "startswith", "endswith", "split", "rsplit", "replace", "get")}
)
"""Methods whose numbers are places or bounds, not sizes."""


def bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that it counts its input and its result."""
    if name in _FREE:
        return function
    first = 0 if getattr(function, "jinja_pass_arg", None) is None else 1  # where its value stands
    if name in _PLAIN:
        return _bounded_text(function, first)
    before = _BEFORE.get(name)
    shallow, sized = name in _SHALLOW, name in _SIZED
    per_entry = 10 if name in _SORTING else 4
    lazy = name in _LAZY

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = current.get()
        budget.step(CALL)
        given = (*args[first:], *kwargs.values())
        for value in given:
            if isinstance(value, str):
                budget.spend(len(value))
            elif isinstance(value, list | tuple | dict | range):
                budget.step(0 if lazy else per_entry * len(value))
                if not shallow:
                    budget.spend(per_entry * budget.weight(value))
        if sized:
            _check_sizes(name, given[1:])
        if name in _SLOW and budget.weight(given[0]) > _SHORT:
            raise OverBudget(f"uses {name} on a text of more than {_SHORT} characters")
        if lazy and given[0]:  # what is left out was looked at, too
            args = (*args[:first], _counted(budget, given[0]), *args[first + 1 :])
        elif before is not None:
            args = (*args[:first], *before(budget, *args[first:], **kwargs))
        result = function(*args, **kwargs)
        if isinstance(result, GeneratorType):
            return _counted(budget, result)
        return budget.made(result)

    return bounded


def _bounded_text(function: Callable[..., Any], first: int) -> Callable[..., Any]:
    """Wrap a filter whose result is about as long as its text."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = current.get()
        value = args[first]
        budget.characters -= 2 * (len(value) if type(value) is str else budget.weight(value))
        budget.steps -= 1
        if budget.steps < 0 or budget.characters < 0:
            budget.end()
        return function(*args, **kwargs)

    return bounded


def _trim(value: Any, chars: str | None = None) -> Any:
    """Do what Jinja's `trim` does, quickly: nearly every template calls it."""
    budget = current.get()
    budget.characters -= len(value) if type(value) is str else budget.weight(value)
    if budget.characters < 0:
        budget.end()
    return soft_str(value).strip(chars)


def bounded_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def bounded(*args: Any) -> Any:
        budget = current.get()
        budget.step(1)
        if not any(type(value) is str and len(value) < 64 for value in args[1:]) or len(args) < 2:
            for value in args:
                if not isinstance(value, dict) or function is not _TEST_IN:
                    budget.spend_on(value)
                if isinstance(value, range) and type(args[0]) is not int:  # it is gone through
                    budget.step(len(value))
        return function(*args)

    return bounded


def _counted(budget: Budget, values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        budget.step(_PER_ENTRY)
        yield value


def _check_sizes(what: str, values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, int | float) and not -MOST_WIDTH <= value <= MOST_WIDTH:
            raise OverBudget(f"asks {what} for {str(value)[:20]}; beyond {MOST_WIDTH} nothing is made")


def check_format(budget: Budget, text: str, values: Any, mark: str) -> None:
    """Refuse wide fields in a format, and count each value as often as it may be written.

    `mark`: the character that begins a field, `%` or `{`.
    """
    for width in _FORMAT.findall(text):
        if len(width) > 6 or int(width) > MOST_WIDTH:
            raise OverBudget(f"asks for a field of {width[:20]} characters; beyond {MOST_WIDTH} nothing is made")
    values = values if isinstance(values, tuple) else (values,)
    fields = text.count(mark)
    widths = ("*" in text) if mark == "%" else ("{" in text.partition("{")[2].partition("}")[0])
    for value in values:
        budget.spend((1 + fields) * budget.weight(value))
        if widths:
            _check_sizes("a format", (value, *(value.values() if isinstance(value, dict) else ())))
    budget.spend(len(text) + fields * sum(min(int(width), MOST_WIDTH) for width in _FORMAT.findall(text)))


def _before_replace(budget: Budget, value: Any, old: str, new: str, *rest: Any) -> tuple[Any, ...]:
    text = str(value) if not isinstance(value, str) else value
    _check_replacement(budget, text, str(old), str(new))
    return (value, old, new, *rest)


def _check_replacement(budget: Budget, text: str, old: str, new: str) -> None:
    if len(new) > len(old):
        budget.spend(text.count(old) * len(new))


def _before_indent(budget: Budget, value: Any, width: Any = 4, *rest: Any, **kwargs: Any) -> tuple[Any, ...]:
    width = kwargs.get("width", width)
    by = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
    budget.spend((str(value).count("\n") + 1) * max(by, 0))
    return (value, *([] if "width" in kwargs else [width]), *rest)


def _before_join(budget: Budget, value: Any, d: Any = "", *rest: Any, **kwargs: Any) -> tuple[Any, ...]:
    values = value if isinstance(value, str | list | tuple | dict | range) else list(value)
    budget.step(len(values))
    budget.spend(len(values) * (budget.weight(kwargs.get("d", d)) + 1))
    if not isinstance(values, str | range):
        for part in values:
            budget.spend_on(part)
    return (values, *([] if "d" in kwargs else [d]), *rest)


def _before_sum(budget: Budget, value: Any, *rest: Any, **kwargs: Any) -> tuple[Any, ...]:
    values = list(value)
    budget.step(len(values))
    if any(isinstance(part, list | tuple) for part in values):  # each sum is a new list
        budget.step(len(values) * sum(len(part) for part in values if isinstance(part, list | tuple)))
    return (values, *rest)


def _before_format(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    check_format(budget, str(value), (*args, *kwargs.values()), "%")
    return (value, *args)


_BEFORE: Final[dict[str, Callable[..., tuple[Any, ...]]]] = {
    "replace": _before_replace,
    "indent": _before_indent,
    "join": _before_join,
    "sum": _before_sum,
    "format": _before_format,
}
"""Filters that make much of little: what they will make is counted before they run."""


def _no_chance(*_: Any, **__: Any) -> None:
    raise OverBudget("asks for chance, and a reply could not be reproduced")


_TEST_IN: Final = jinja2.tests.TESTS["in"]


# -- methods ---------------------------------------------------------------------------------------------------------


def check_method(
    budget: Budget, method: BuiltinMethodType, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Count the input and the possible result of a method of a text, a list or a number. Return its arguments."""
    owner, name = method.__self__, method.__name__
    given = (*args, *kwargs.values())
    if name in ("startswith", "endswith"):  # they look at as much as they are given
        for value in given:
            budget.spend_on(value)
        return args
    for value in (owner, *given):
        if isinstance(value, str | bytes):
            budget.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            budget.step(len(value))
            budget.spend_on(value)
        elif isinstance(value, Sized):  # a range, the keys of a dictionary
            budget.step(len(value))
    if name not in _PLACES:
        _check_sizes(name, given)
    if not isinstance(owner, str):
        if isinstance(owner, bytes) and (name != "decode" or not set(given) <= _ENCODINGS):
            raise OverBudget(f"uses {name} on bytes")
        return args
    if name == "replace" and len(given) > 1:
        _check_replacement(budget, owner, str(given[0]), str(given[1]))
    elif name in ("split", "rsplit", "splitlines"):
        apart = given[0] if given and isinstance(given[0], str) and given[0] else None
        pieces = owner.count(apart) if apart else len(owner) // 2
        bound = next((value for value in given if type(value) is int and value >= 0), pieces)
        budget.spend(64 * min(pieces, bound))
    elif name == "join" and args:
        return _before_join(budget, args[0], owner)[:1]
    elif name == "expandtabs":
        budget.spend(owner.count("\t") * (given[0] if given and isinstance(given[0], int) else 8))
    elif name == "translate":
        budget.spend(len(owner) * sum(budget.weight(value) for value in given))
    elif name == "encode" and not set(given) <= _ENCODINGS:
        raise OverBudget(f"encodes a text as {str(given[0])[:20]!r}")
    elif name in ("format", "format_map"):
        check_format(budget, owner, given, "{")
    return args


# -- JSON ------------------------------------------------------------------------------------------------------------


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers' `tojson` does. Jinja's own escapes HTML, which no model was trained on."""
    budget = current.get()
    budget.spend(budget.noted(value))
    if indent is not None or separators is not None:
        given = (indent, *(separators or ()))
        if any((len(part) if isinstance(part, str) else part or 0) > _MOST_INDENT for part in given):
            raise OverBudget(f"asks tojson for more than {_MOST_INDENT} characters between two values")
    if indent is None:
        text = json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
        budget.spend(len(text))
        return text
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    written, pieces = encoder.iterencode(value), [""]
    while some := list(itertools.islice(written, 1024)):  # each line begins with as many spaces as it is deep
        pieces.append("".join(some))
        budget.spend(len(pieces[-1]))
    return "".join(pieces)


OWN: Final[Mapping[str, Callable[..., Any]]] = {"tojson": _tojson, "trim": _trim, "random": _no_chance}
"""Filters that replace Jinja's."""
