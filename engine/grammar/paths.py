"""Measures how deeply a compiler recurses: the longest path through schemas, references and rules. Pure.

llguidance compiles what a schema or a rule refers to while it compiles that one. Each step takes some of the thread's
stack, and a stack overflow ends the process, so paths are measured before anything is compiled. Measured with
llguidance 1.9.1, bytes of stack a step: 5,100 through object properties, `prefixItems` and `anyOf`, 3,600 through
`$ref` alone, 3,400 through the rules of a Lark grammar. `MAX_PATH` steps fit a stack of 1.25 MiB; the smallest stack
that a thread of the server has is one of 2 MiB.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, TypeVar

from engine.errors import InvalidParameter
from engine.text.json_schema import inner, target_of

__all__ = ["MAX_PATH", "check_rules", "check_schema_path", "longest_path", "rules_of", "schema_path"]

MAX_PATH: Final = 250
"""Steps of a path at most. A step is a schema inside another, a reference, or a rule inside another."""

_Node = TypeVar("_Node", bound=Hashable)

_LARK: Final = re.compile(
    r"""
    (?P<text>"(?:\\.|[^"\\\n])*"[i]?)
    | (?P<comment>(?://|\#)[^\n]*)
    | (?P<expression>/(?!/)(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n\[])*/[imslux]*)
    | (?P<name>[A-Za-z_][A-Za-z0-9_\-]*)
    | (?P<colon>:)
    | (?P<other>.|\n)
    """,
    re.VERBOSE,
)
"""The tokens of a Lark grammar, as far as needed to find its names."""


def longest_path(edges: Mapping[_Node, Sequence[_Node]], start: _Node) -> int:
    """Return the number of steps of the longest path from a node. An edge back to the path itself is no step.

    The number is exact for a graph without cycles. With cycles it is that of a depth-first walk in the order given.
    """
    found: dict[_Node, int] = {}
    open_ = {start}
    waiting = [(start, iter(edges.get(start, ())))]
    lengths = [0]
    while waiting:
        node, others = waiting[-1]
        for other in others:
            if other in open_:
                continue
            if other in found:
                lengths[-1] = max(lengths[-1], 1 + found[other])
                continue
            open_.add(other)
            waiting.append((other, iter(edges.get(other, ()))))
            lengths.append(0)
            break
        else:
            waiting.pop()
            open_.discard(node)
            found[node] = lengths.pop()
            if lengths:
                lengths[-1] = max(lengths[-1], 1 + found[node])
    return found[start]


def schema_path(schema: Any) -> int:
    """Return the steps of the longest path through a schema, into its parts and along references inside it."""
    edges: dict[int, list[int]] = {}
    named: dict[str, Any] | None = None
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if id(part) in edges or not isinstance(part, Mapping):
            continue
        others = [one for one in inner(part) if isinstance(one, Mapping)]
        for keyword in ("$ref", "$dynamicRef"):
            reference = part.get(keyword)
            if isinstance(reference, str):
                target = target_of(reference, schema)
                if target is None:
                    named = _names(schema) if named is None else named
                    target = named.get(reference)
                others += [target] if isinstance(target, Mapping) else []
        edges[id(part)] = [id(one) for one in others]
        waiting += others
    return longest_path(edges, id(schema))


def _names(schema: Any) -> dict[str, Any]:
    """The parts that a reference may name other than by a pointer, by `#anchor` or `$id`."""
    found: dict[str, Any] = {}
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, Mapping):
            for keyword, prefix in (("$anchor", "#"), ("$dynamicAnchor", "#"), ("$id", ""), ("id", "")):
                if isinstance(part.get(keyword), str):
                    found.setdefault(prefix + part[keyword], part)
            waiting += part.values()
    return found


def rules_of(lark: str) -> dict[str, list[str]]:
    """Return the names used in each rule or terminal of a Lark grammar, in order of appearance."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    last = ""  # the name that a colon would make a rule's
    depth = 0
    for match in _LARK.finditer(lark):
        kind, text = match.lastgroup, match[0]
        if kind == "name":
            current.append(text)
            last = text if depth <= 0 else last
        elif kind == "colon" and depth <= 0 and last:
            while current and current.pop() != last:  # its attributes are no part of the rule before it, either
                pass
            current, last = found.setdefault(last, []), ""
        elif kind == "other":
            depth += (text in "[{(") - (text in "]})")
    return found


def check_schema_path(schema: Any, param: str) -> None:
    """Raise `InvalidParameter` for a schema that leads through more than `MAX_PATH` parts and references."""
    _check(schema_path(schema), "parts and references", param)


def check_rules(lark: str, param: str) -> None:
    """Raise `InvalidParameter` for a Lark grammar whose rules lead through more than `MAX_PATH` others."""
    _check(longest_path(rules_of(lark), "start"), "rules", param)


def _check(length: int, what: str, param: str) -> None:
    if length > MAX_PATH:
        raise InvalidParameter(
            f"{param}: its longest path leads through {length:,} {what}, one inside another; at most {MAX_PATH} are "
            "allowed.",
            param=param,
            code="grammar_too_deep",
            path_length=length,
            limit=MAX_PATH,
        )
