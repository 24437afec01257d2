"""What is wrong with a grammar or a schema: refuses what is too large, and names the keyword that is at fault.

llguidance says in words that a schema cannot be compiled, not where the fault is. To find it, parts of the schema are
compiled alone, within a count of characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Final

from llguidance import LLMatcher

from engine.errors import InvalidParameter, one_line
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.lark import json_rule
from engine.grammar.paths import check_rules, check_schema_path
from engine.text.json_schema import at, check_depth, parts
from engine.types.requests import Constraint

__all__ = ["check_bounds", "enforceable", "schema_rule"]

MAX_BYTES: Final = 256 * 1024
"""Of a schema, an expression or a grammar as JSON."""
_BLAMED: Final = 400  # parts of a schema that are compiled alone to find the one at fault
_RELAXED: Final = 64  # keywords that are left out of a schema one by one
_COMPILED: Final = 20_000_000  # characters of schemas that are compiled to find the fault in one

_KEYWORD_OF: Final = (
    # what a complaint of llguidance begins with, the keyword that it is about
    ("oneOf", "oneOf"), ("Unknown format", "format"), ("regex parse error", "pattern"), ("Invalid type", "type"),
    ("Expected positive integer for '", None), ("Unsatisfiable", None), ("Pointer", "$ref"), ("Resource", "$ref"),
)  # fmt: skip


def check_bounds(constraint: Constraint) -> None:
    """Raise `InvalidParameter` for a constraint that is nested too deeply, too large, or refers along too long a path.

    Nothing may look further into a constraint before this.
    """
    value, param = constraint.value, constraint.param
    check_depth(value, param)
    size = len(value if isinstance(value, str) else json.dumps(value))
    if size > MAX_BYTES:
        raise InvalidParameter(f"{param} has {size} characters; at most {MAX_BYTES} are allowed.", param=param)
    if constraint.kind == "json":
        check_schema_path(value, param)
    elif constraint.kind == "grammar":
        check_rules(str(value), param)


def schema_rule(compiler: GrammarCompiler, constraint: Constraint) -> tuple[str, tuple[str, ...]]:
    """Write the right side of a Lark rule for a JSON schema; return it with pointers to the unenforced keywords.

    Raises: what `enforceable` raises.
    """
    schema, dropped = enforceable(compiler, constraint)
    return json_rule(schema), dropped


def enforceable(compiler: GrammarCompiler, constraint: Constraint) -> tuple[Any, tuple[str, ...]]:
    """Return a JSON schema without the keywords that cannot be enforced, and pointers to those.

    Raises:
        InvalidParameter: it is no schema; with `strict`, it cannot be enforced whole.
    """
    return _Diagnosis(compiler, constraint.param).enforceable(constraint)


class _Diagnosis:
    """The search for the faults of one schema."""

    def __init__(self, compiler: GrammarCompiler, param: str) -> None:
        self._compiler = compiler
        self._param = param
        self._left = _COMPILED  # characters that may still be compiled

    def enforceable(self, constraint: Constraint) -> tuple[Any, tuple[str, ...]]:
        schema = {} if constraint.value is True else constraint.value
        complaint = self._complaint(schema)
        if complaint is None:
            return schema, ()
        if constraint.strict:
            raise self._refusal(schema, complaint)
        schema = deepcopy(schema)
        dropped: list[str] = []
        for _ in range(_RELAXED):
            where, keyword = self._blame(schema, complaint)
            if keyword is None or self._left <= 0:
                break
            dropped += _without(schema, where, keyword, complaint)
            complaint = self._complaint(schema)
            if complaint is None:
                return schema, tuple(dropped)
        raise self._refusal(schema, complaint)

    def _complaint(self, schema: Any) -> str | None:
        """What is wrong with a schema, in llguidance's words; None if it can be enforced whole."""
        try:
            text = json.dumps(schema)
            self._left -= len(text)
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"lenient": False})
        except ValueError as error:
            return str(error)
        return self._compiler.complaint(grammar)

    def _blame(self, schema: Any, complaint: str) -> tuple[str, str | None]:
        """Find the fault: the pointer of the part of the schema that has it, and its keyword if that is known."""
        named = re.match(r"Unimplemented keys: (\[.*\])", complaint)
        if named:
            keys = json.loads(named[1])
            for pointer, part in parts(schema):
                for key in keys:
                    if isinstance(part, Mapping) and key in part:
                        return pointer, key
        deepest = ""
        root = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, dict) and key in schema}
        for count, (pointer, part) in enumerate(parts(schema)):
            if count == _BLAMED or self._left <= 0:
                break
            alone = {**root, **part} if isinstance(part, dict) else part
            found = self._complaint(alone) if pointer.startswith(deepest) else None
            if found and found.split(":")[0] == complaint.split(":")[0]:
                deepest = pointer
        part = at(schema, deepest)
        for beginning, keyword in _KEYWORD_OF:
            if complaint.startswith(beginning):
                if keyword is None:
                    quoted = re.search(r"'(\w+)'", complaint)
                    keyword = quoted[1] if quoted else None
                return deepest, keyword if isinstance(part, dict) and keyword in part else None
        return deepest, None

    def _refusal(self, schema: Any, complaint: str) -> InvalidParameter:
        where, keyword = self._blame(schema, complaint)
        pointer = f"{where}/{keyword}" if keyword else where
        return InvalidParameter(
            f"{self._param}: at {pointer or 'the root'}: {one_line(complaint)}. "
            "With strict: false what can be enforced is, and the rest is checked afterwards.",
            param=self._param,
            code="schema_not_enforceable",
            pointer=pointer,
        )


def _without(schema: Any, where: str, keyword: str, complaint: str) -> list[str]:
    """Delete a keyword at a pointer, and wherever else the same complaint applies; return the pointers to it."""
    dropped = []
    value = at(schema, where)[keyword]
    everywhere = complaint.startswith(("Unimplemented", "Unknown"))
    for pointer, part in list(parts(schema)):
        if not isinstance(part, dict) or keyword not in part or (keyword == "format" and part[keyword] != value):
            continue
        if pointer != where and not everywhere:
            continue
        if keyword == "oneOf" and "anyOf" not in part:
            part["anyOf"] = part.pop("oneOf")  # at least one, instead of exactly one
        else:
            del part[keyword]
        dropped.append(f"{pointer}/{keyword}")
    return dropped
