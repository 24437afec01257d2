"""Arguments written one by one as rules: strings without quotes become expressions, all other values JSON.

The expressions exclude what would end the value or the call, so whatever the grammar allows is read back as written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from llguidance import regex_to_lark

from engine.errors import InvalidParameter
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.diagnosis import MOST_LETTERS, schema_rule
from engine.grammar.lark import ANY, literal, quoted
from engine.replies.tool_format import ToolFormat
from engine.text.json_schema import (
    ANNOTATIONS,
    alternatives,
    bundled,
    choices_of,
    object_of,
    properties_of,
    types_of,
)
from engine.types.requests import Constraint
from engine.types.tools import Tool

__all__ = ["JsonValues", "PairArguments"]

_MOST: Final = 1_000_000  # characters of all rules for values that are JSON
_UNQUOTED: Final = (
    "it cannot be enforced in the form in which this model writes arguments, one by one and without quotes"
)
_NUMBERS: Final = {
    "integer": r"/-?(0|[1-9][0-9]{0,18})/",
    "number": r"/-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,18})?/",
    "boolean": '"true" | "false"',
    "null": '"null"',
}
"""How other values are written where a string is allowed, too."""


@dataclass(slots=True)
class JsonValues:
    """The rules for arguments whose values are JSON. Equal parts of one tool's schema share a rule."""

    compiler: GrammarCompiler
    lines: list[str]
    """The grammar's lines, to which the rules are added."""
    _size: int = 0
    _known: dict[tuple[int, str], tuple[str, bool]] = field(default_factory=dict)  # by tool and part

    def rule(self, number: int, part: Any, root: Any, strict: bool, param: str) -> tuple[str, bool]:
        """Return the name of the rule for a part of the schema `root`, and whether it leaves out a keyword."""
        said = {key: value for key, value in part.items() if key not in ANNOTATIONS} if isinstance(part, dict) else part
        key = (number, json.dumps(said, sort_keys=True))
        if key not in self._known:
            rule, dropped = schema_rule(self.compiler, Constraint("json", bundled(part, root), strict, param))
            self._size += len(rule)
            if self._size > _MOST:
                raise InvalidParameter(f"{param}: these schemas are too large together.", param=param)
            name = f"json_{len(self._known)}"
            self.lines.append(f"{name}: {rule}")
            self._known[key] = name, bool(dropped)
        return self._known[key]


@dataclass(slots=True)
class PairArguments:
    """The arguments of one tool as rules: in the schema's order, and those not required may be left out."""

    compiler: GrammarCompiler
    tool_format: ToolFormat
    tool: Tool
    number: int
    param: str
    """The request's field that holds the schema."""
    json_values: JsonValues
    unenforced: bool = False
    """Whether the rules leave out a keyword of the schema."""
    left_out: list[str] = field(default_factory=list)
    """JSON pointers to keywords that cannot be enforced without quotes."""

    @property
    def schema(self) -> Mapping[str, Any]:
        return self.tool.parameters or {}

    def terms(self) -> list[str]:
        """Write a rule for each argument; return the terms that a call consists of.

        Raises:
            InvalidParameter: nothing satisfies the schema; with `strict`, it cannot be enforced whole.
        """
        found, lark = self.tool_format, self.compiler.lark
        top = object_of(self.schema)
        for keyword in top:
            if keyword not in ANNOTATIONS | {"type", "properties", "required", "additionalProperties"}:
                self._leave_out("", keyword)
        required = {key for key in top.get("required") or () if isinstance(key, str)}
        after = lark.pieces(found.value_close)
        close = "" if after[0][0] is not None else after.pop(0)[1]
        terms = []
        for i, (key, part) in enumerate(properties_of(self.schema).items()):
            pointer = f"/properties/{key.replace('~', '~0').replace('/', '~1')}"
            if part is False or not types_of(part, self.schema):
                if key not in required:
                    continue
                self._leave_out(pointer, "", "nothing satisfies what is required")
                part = True
            name = f"pair_{self.number}_{i}"
            opening = lark.terms([*lark.pieces(found.key_open), (None, key), *lark.pieces(found.value_open)])
            if "string" in types_of(part, self.schema):
                value = f"VALUE_{self.number}_{i}"
                text = self._text(pointer, part)
                if not text or not self._can_end(text, close):
                    if key not in required:
                        continue
                    self._leave_out(pointer, "", "nothing that can be written here satisfies it")
                    text = f"{ANY} & {self._unended()}"
                self.json_values.lines.append(f"{value}: ({text}) {quoted(close)}" if close else f"{value}: {text}")
                end = lark.terms(after) if after else ""
            else:
                param = f"{self.param}.properties.{key}"
                value, left_out = self.json_values.rule(self.number, part, self.schema, self.tool.strict, param)
                self.unenforced = self.unenforced or left_out
                end = lark.delimiter(found.value_close)
            self.json_values.lines.append(f"{name}: {opening} {value} {end}")
            terms.append(name if key in required else f"{name}?")
        return terms

    def _can_end(self, text: str, close: str) -> bool:
        """Whether any text satisfies an expression."""
        if text.startswith(ANY) or text.count('"') > 2000:
            return True
        value = f"({text}) {quoted(close)}" if close else text
        return not self.compiler.holds_nothing(f"start: VALUE\nVALUE: {value}")

    def _unended(self) -> str:
        """An expression for text that contains no end of a value or of a call."""
        return f"~/(.|\\n)*({'|'.join(map(literal, self._ends()))})(.|\\n)*/"

    def _ends(self) -> list[str]:
        """The delimiters that no text may contain."""
        return [end for end in (self.tool_format.value_close.strip(), self.tool_format.stop) if end]

    def _text(self, pointer: str, part: Any) -> str:
        """An expression for a value that may be a string, written without quotes; empty if nothing satisfies it."""
        terms: list[str] = []
        for leaf in alternatives(part, self.schema):
            terms += self._leaf(leaf, pointer)
        if ANY in terms:
            return f"{ANY} & {self._unended()}"
        return " | ".join(f"({term})" for term in terms)

    def _leaf(self, leaf: Any, pointer: str) -> list[str]:
        kinds = types_of(leaf, self.schema)
        choices = choices_of(leaf, self.schema)
        if choices is not None:
            texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in choices]
            kept = [text for text in texts if not any(end in text for end in self._ends())]
            if len(kept) < len(texts):
                self._leave_out(pointer, "enum" if "enum" in leaf else "const")
            return [quoted(text) for text in kept] or ([ANY] if texts else [])
        keywords = set(leaf) - ANNOTATIONS - {"type"} if isinstance(leaf, Mapping) else set()
        others = kinds - {"string"} - ({"integer"} if "number" in kinds else set())
        if keywords - {"pattern", "minLength", "maxLength"} or (keywords and others - {"null", "boolean"}):
            self._leave_out(pointer, min(keywords - {"pattern", "minLength", "maxLength"} or keywords))
            return [ANY]
        if "string" in kinds and not keywords:
            return [ANY]  # and whatever else may be written
        if others - set(_NUMBERS):
            self._leave_out(pointer, "type")
            return [ANY]
        found = [_NUMBERS[kind] for kind in sorted(others)]
        return [*found, self._string(leaf, pointer)] if "string" in kinds else found

    def _string(self, leaf: Mapping[str, Any], pointer: str) -> str:
        terms = []
        least, most = leaf.get("minLength", 0), leaf.get("maxLength")
        if isinstance(most, int) and most > MOST_LETTERS:
            most = None  # it is named among what the whole schema leaves out
        if (least or most is not None) and all(isinstance(n, int | None) for n in (least, most)):
            # The first letters of what ends a value are left out: to count letters and look for a tag at once is more
            # than the lexer bears.
            letters = "".join(sorted({literal(end[0]) for end in self._ends()}))
            terms.append(f"/[^{letters}]{{{least},{'' if most is None else most}}}/")
        if "pattern" in leaf:
            searched = _searched(leaf["pattern"])
            if searched is None:
                self._leave_out(pointer, "pattern")
            elif not terms:
                terms = [searched, self._unended()]
            else:
                terms.append(searched)
        return " & ".join(terms) or ANY

    def _leave_out(self, pointer: str, keyword: str, why: str = _UNQUOTED) -> None:
        """Note a keyword, or all of a part, that the rules do not enforce; refuse it with `strict`."""
        pointer = f"{pointer}/{keyword}" if keyword else pointer
        if self.tool.strict:
            raise self._refused(pointer, why)
        self.unenforced = True
        if pointer not in self.left_out:
            self.left_out.append(pointer)

    def _refused(self, pointer: str, why: str) -> InvalidParameter:
        return InvalidParameter(
            f"{self.param}: at {pointer}: {why}.", param=self.param, code="schema_not_enforceable", pointer=pointer
        )


def _searched(pattern: Any) -> str | None:
    """An expression for texts that a pattern matches anywhere; None where its anchors are not at its ends."""
    if not isinstance(pattern, str):
        return None
    begins, ends = pattern.startswith("^"), pattern.endswith("$")
    middle = pattern[1 if begins else 0 : len(pattern) - (1 if ends else 0)]
    escaped = listed = False
    depth = 0
    for letter in middle:
        if escaped:
            escaped = False
        elif letter == "\\":
            escaped = True
        elif listed:
            listed = letter != "]"
        elif letter == "[":
            listed = True
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter in "^$" or (letter == "|" and depth == 0 and (begins or ends)):
            return None
    if escaped or listed or depth:
        return None  # the dollar was escaped, or it is no expression
    free = r"(.|\n)*"
    return f"/{'' if begins else free}({regex_to_lark(middle)}){'' if ends else free}/"
