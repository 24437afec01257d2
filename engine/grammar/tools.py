"""Tool calls as a grammar: one of the tools, in the model's own form, with arguments that satisfy its schema. No torch.

Arguments that are JSON are compiled from their schema. In forms that write them one by one (`pairs`) a text stands
without quotes: it becomes an expression, which leaves out what would end the value or the call, so that whatever the
grammar allows is read back as it was meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from llguidance import regex_to_lark

from engine.errors import InvalidParameter
from engine.grammar.compiler import GrammarCompiler, check_bounds, json_rule, literal, quoted
from engine.replies.reasoning import ReasoningFormat
from engine.replies.tool_format import CALL_ID, ToolFormat
from engine.text.json_schema import (
    ANNOTATIONS,
    alternatives,
    bundled,
    choices_of,
    moved,
    object_of,
    properties_of,
    types_of,
)
from engine.types.requests import Constraint
from engine.types.tools import Tool

__all__ = ["ToolGrammar", "tool_grammar"]

_ANY: Final = r"/(.|\n)*/"
_MOST: Final = 1_000_000  # characters of all rules for values that are JSON
_SPACE: Final = r"[\s\x1c-\x1f]*"
"""What readers take for white space, between slashes: Python's knows four letters more than the lexer's."""
_NUMBERS: Final = {
    "integer": r"/-?(0|[1-9][0-9]{0,18})/",
    "number": r"/-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,18})?/",
    "boolean": '"true" | "false"',
    "null": '"null"',
}
"""How what is no text is written beside one."""


@dataclass(frozen=True, slots=True)
class ToolGrammar:
    """`text`: the grammar. `unenforced`: keywords of the answer's own schema that it leaves out. `loose`: tools whose
    arguments it does not hold to all of their schema."""

    text: str
    unenforced: tuple[str, ...] = ()
    loose: frozenset[str] = frozenset()


def tool_grammar(
    compiler: GrammarCompiler,
    found: ToolFormat,
    tools: Sequence[Tool],
    thoughts: ReasoningFormat | None = None,
    opened: bool = False,
    *,
    free: bool,
    several: bool,
    only: str | None = None,
    otherwise: Constraint | None = None,
) -> ToolGrammar:
    """Calls of these tools, each with arguments that satisfy its schema.

    Args:
        tools: what may be called. A schema that cannot be enforced whole is refused with `strict`, else
            enforced as far as it can be.
        free: any text, and a call only once the mark of one has been written; else nothing but calls.
        several: whether another call may follow the first.
        only: the one tool that may be called.
        otherwise: what a reply without calls has to be; not with `free`.

    Raises:
        InvalidParameter: a schema that cannot be compiled.
    """
    made = _Rules(compiler, found)
    for i, tool in enumerate(tools):
        if only in (None, tool.name):
            made.add(i, tool)
    mark = compiler.mark
    close = [mark(part) if part else "" for part in found.close.split(CALL_ID)]
    lines = [*made.lines, f"call: {' | '.join(made.calls)}", "ID: /[A-Za-z0-9]{9}/", f"close: {' ID '.join(close)}"]
    if found.begin and not found.end.strip():
        several = False  # what follows a call could not be told from another one of its block
    more = ""
    if several and found.between is not None:
        more = f"({mark(found.between) if found.between else ''} {mark(found.open)} call)*"
    end = mark(found.end) if found.end else ""
    calls = f"calls: {mark(found.begin + found.open)} call {more} {end}"
    loose = frozenset(made.loose)
    if not free:
        if otherwise is None:
            return ToolGrammar(compiler.whole(thoughts, opened, "answer: calls", [calls, *lines]), (), loose)
        if not found.tagged and otherwise.kind == "json" and "{" in found.open:
            rule, unenforced, loose = _as_json(compiler, found, tools, otherwise)
            return ToolGrammar(compiler.whole(thoughts, opened, "answer: json", [f"json: {rule}"]), unenforced, loose)
        text, unenforced = compiler.text_rules(otherwise, thoughts, found.mark if found.tagged else "")
        whole = compiler.whole(thoughts, opened, "answer: calls | text", [calls, *lines, *text])
        return ToolGrammar(whole, unenforced, loose)
    answer, rules = _free(compiler, found, thoughts, opened, calls, lines, several)
    return ToolGrammar(compiler.whole(thoughts, opened, answer, rules, asides=True), (), loose)


def _as_json(
    compiler: GrammarCompiler, found: ToolFormat, tools: Sequence[Tool], otherwise: Constraint
) -> tuple[str, tuple[str, ...], frozenset[str]]:
    """A call without a mark, or another JSON text: one schema, since a lexer cannot tell which of them has begun."""
    name, arguments = (re.findall(r"\w+", part)[0] for part in (found.open, found.middle))
    listed: list[Any] = []
    loose = set()
    for i, tool in enumerate(tools):
        param = f"tools.{i}.function.parameters"
        whole = {**(tool.parameters or {}), "type": "object"}
        schema, dropped = compiler.enforceable(Constraint("json", whole, tool.strict, param))
        if dropped:
            loose.add(tool.name)
        members = {name: {"const": tool.name}, arguments: moved(schema, f"/anyOf/{i}/properties/{arguments}")}
        listed.append({"type": "object", "properties": members, "required": [*members], "additionalProperties": False})
    check_bounds(otherwise)
    form, unenforced = compiler.enforceable(otherwise)
    listed.append(moved(form, f"/anyOf/{len(listed)}"))
    return json_rule({"anyOf": listed}), unenforced, frozenset(loose)


def _free(
    compiler: GrammarCompiler,
    found: ToolFormat,
    thoughts: ReasoningFormat | None,
    opened: bool,
    calls: str,
    lines: Sequence[str],
    several: bool,
) -> tuple[str, list[str]]:
    """The rule `answer` and the others, where a reply is text with calls in it: no mark of a call in the text."""
    if thoughts is not None and thoughts.resume:  # the answer is a turn of its own
        return "answer: calls | said", [
            calls,
            *lines,
            f"said: {compiler.mark(thoughts.answer_open)} TEXT",
            f"TEXT: {_ANY} & ~/(.|\\n)*{literal(thoughts.close)}(.|\\n)*/",  # nor the mark letter by letter
        ]
    first = ""
    if thoughts is not None and not opened:
        special, begins = compiler.pieces(thoughts.open)[0]
        if special is None:  # these are thoughts, whatever stands in them
            first = f" & ~/{_SPACE}{literal(begins)}(.|\\n)*/"
    mark = found.mark
    if not found.tagged:  # such a call is all of a reply
        start = _SPACE.join(literal(piece) for piece in re.findall(r'"[^"]*"|\S', mark.removesuffix('"')))
        other = f"OTHER: {_ANY} & ~/{_SPACE}{start}(.|\\n)*/{first}"
        return "answer: calls | OTHER", [calls, *lines, other]
    text = f"{_ANY} & ~/(.|\\n)*{literal(mark)}(.|\\n)*/"
    opening = found.begin + found.open
    block = calls.removeprefix(f"calls: {compiler.mark(opening)}")
    end = ""
    if compiler.pieces(opening)[0][0] is None:  # text does not end by itself: it ends with the mark
        end, opening = f" {quoted(mark)}", opening[len(mark) :]
    rules = [
        f"HEAD: ({text}){end}",
        f"FIRST: ({text}{first}){end}",
        f"TEXT: {text}",
        f"OTHER: {text}{first}",
        f"rest_of_block: {compiler.mark(opening) if opening else ''} {block}",
    ]
    again = "(HEAD rest_of_block)* " if several else ""
    return f"answer: OTHER | FIRST rest_of_block {again}TEXT", [*lines, *rules]


@dataclass(slots=True)
class _Rules:
    """The rules of calls, one per tool: what follows the opening of a call, up to its end."""

    compiler: GrammarCompiler
    found: ToolFormat
    lines: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    loose: set[str] = field(default_factory=set)
    size: int = 0
    """Characters of the rules for values that are JSON."""
    _json: dict[tuple[int, str], tuple[str, bool]] = field(default_factory=dict)
    """Rules for values that are JSON: (name, whether it leaves something out), by tool and part; many are alike."""

    def add(self, number: int, tool: Tool) -> None:
        param, strict = f"tools.{number}.function.parameters", tool.strict
        schema = tool.parameters or {}
        check_bounds(Constraint("json", schema, strict, param))
        if "object" not in types_of(schema, schema):
            raise InvalidParameter(f"{param} must describe an object.", param=param)
        whole = {**schema, "type": "object"}
        rule, dropped = self.compiler.schema_rule(Constraint("json", whole, strict, param))  # refuses what is no schema
        head = self.compiler.terms([(None, tool.name), *self.compiler.pieces(self.found.middle)])
        if self.found.style == "json":
            self.lines += [f"call_{number}: {head} args_{number} close", f"args_{number}: {rule}"]
        else:
            terms = _Pairs(self, schema, strict, param, number, tool.name).terms()
            self.lines.append(f"call_{number}: {head} {' '.join(terms)} close")
        self.calls.append(f"call_{number}")
        if dropped:
            self.loose.add(tool.name)

    def json(self, number: int, part: Any, root: Any, strict: bool, param: str) -> tuple[str, bool]:
        """The name of a rule for a value in JSON, and whether it leaves something out."""
        said = {key: value for key, value in part.items() if key not in ANNOTATIONS} if isinstance(part, dict) else part
        known = (number, json.dumps(said, sort_keys=True))
        if known not in self._json:
            rule, dropped = self.compiler.schema_rule(Constraint("json", bundled(part, root), strict, param))
            self.size += len(rule)
            if self.size > _MOST:
                raise InvalidParameter(f"{param}: these schemas are too large together.", param=param)
            name = f"json_{len(self._json)}"
            self.lines.append(f"{name}: {rule}")
            self._json[known] = name, bool(dropped)
        return self._json[known]


@dataclass(slots=True)
class _Pairs:
    """The arguments of one tool, one by one: in the order of the schema, what is not required may be left out."""

    rules: _Rules
    schema: Mapping[str, Any]
    strict: bool
    param: str
    number: int
    name: str

    def terms(self) -> list[str]:
        found, compiler = self.rules.found, self.rules.compiler
        top = object_of(self.schema)
        for keyword in top:
            if keyword not in ANNOTATIONS | {"type", "properties", "required", "additionalProperties"}:
                self._leave_out("", keyword)
        required = {key for key in top.get("required") or () if isinstance(key, str)}
        after = compiler.pieces(found.value_close)
        close = "" if after[0][0] is not None else after.pop(0)[1]
        terms = []
        for i, (key, part) in enumerate(properties_of(self.schema).items()):
            pointer = f"/properties/{key.replace('~', '~0').replace('/', '~1')}"
            if part is False or not types_of(part, self.schema):
                if key in required:
                    raise self._refused(pointer, "nothing satisfies what is required")
                continue
            name = f"pair_{self.number}_{i}"
            opening = compiler.terms(
                [*compiler.pieces(found.key_open), (None, key), *compiler.pieces(found.value_open)]
            )
            if "string" in types_of(part, self.schema):
                value = f"VALUE_{self.number}_{i}"
                text = self._text(pointer, part)
                if not text or not self._can_end(text, close):
                    if key in required:
                        raise self._refused(pointer, "nothing that can be written here satisfies it")
                    continue
                self.rules.lines.append(f"{value}: ({text}) {quoted(close)}" if close else f"{value}: {text}")
                end = compiler.terms(after) if after else ""
            else:
                param = f"{self.param}.properties.{key}"
                value, loose = self.rules.json(self.number, part, self.schema, self.strict, param)
                if loose:
                    self._loose()
                end = compiler.mark(found.value_close)
            self.rules.lines.append(f"{name}: {opening} {value} {end}")
            terms.append(name if key in required else f"{name}?")
        return terms

    def _can_end(self, text: str, close: str) -> bool:
        """Whether any text satisfies an expression."""
        if text.startswith(_ANY) or text.count('"') > 2000:
            return True
        value = f"({text}) {quoted(close)}" if close else text
        return not self.rules.compiler.holds_nothing(f"start: VALUE\nVALUE: {value}")

    def _unended(self) -> str:
        """Expressions for text that holds no end of a value or of a call."""
        return f"~/(.|\\n)*({'|'.join(map(literal, self._ends()))})(.|\\n)*/"

    def _ends(self) -> list[str]:
        """The tags that no text may hold."""
        return [end for end in (self.rules.found.value_close.strip(), self.rules.found.stop) if end]

    def _text(self, pointer: str, part: Any) -> str:
        """An expression for a value that may be a text, as it is written; none of them holds the end of a value."""
        terms: list[str] = []
        for leaf in alternatives(part, self.schema):
            terms += self._leaf(leaf, pointer)
        if _ANY in terms:
            return f"{_ANY} & {self._unended()}"
        return " | ".join(f"({term})" for term in terms)

    def _leaf(self, leaf: Any, pointer: str) -> list[str]:
        kinds = types_of(leaf, self.schema)
        choices = choices_of(leaf, self.schema)
        if choices is not None:
            texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in choices]
            kept = [text for text in texts if not any(end in text for end in self._ends())]
            if len(kept) < len(texts):
                self._leave_out(pointer, "enum" if "enum" in leaf else "const")
            return [quoted(text) for text in kept] or ([_ANY] if texts else [])
        keywords = set(leaf) - ANNOTATIONS - {"type"} if isinstance(leaf, Mapping) else set()
        others = kinds - {"string"} - ({"integer"} if "number" in kinds else set())
        if keywords - {"pattern", "minLength", "maxLength"} or (keywords and others - {"null", "boolean"}):
            self._leave_out(pointer, min(keywords - {"pattern", "minLength", "maxLength"} or keywords))
            return [_ANY]
        if "string" in kinds and not keywords:
            return [_ANY]  # and whatever else may be written
        if others - set(_NUMBERS):
            self._leave_out(pointer, "type")
            return [_ANY]
        found = [_NUMBERS[kind] for kind in sorted(others)]
        return [*found, self._string(leaf, pointer)] if "string" in kinds else found

    def _string(self, leaf: Mapping[str, Any], pointer: str) -> str:
        terms = []
        least, most = leaf.get("minLength", 0), leaf.get("maxLength")
        if (least or most is not None) and all(isinstance(n, int | None) for n in (least, most)):
            # Without the first letter of what ends a value: that costs nothing, while letters that are counted beside
            # a tag that is looked for are more than the lexer bears.
            marks = "".join(sorted({literal(end[0]) for end in self._ends()}))
            terms.append(f"/[^{marks}]{{{least},{'' if most is None else most}}}/")
        if "pattern" in leaf:
            searched = _searched(leaf["pattern"])
            if searched is None:
                self._leave_out(pointer, "pattern")
            elif not terms:
                terms = [searched, self._unended()]
            else:
                terms.append(searched)
        return " & ".join(terms) or _ANY

    def _leave_out(self, pointer: str, keyword: str) -> None:
        if self.strict:
            raise self._refused(f"{pointer}/{keyword}", "it cannot be enforced in the form in which this model writes "
                                "arguments, one by one and without quotes")  # fmt: skip
        self._loose()

    def _loose(self) -> None:
        self.rules.loose.add(self.name)

    def _refused(self, pointer: str, why: str) -> InvalidParameter:
        return InvalidParameter(
            f"{self.param}: at {pointer}: {why}.", param=self.param, code="schema_not_enforceable", pointer=pointer
        )


def _searched(pattern: Any) -> str | None:
    """An expression for texts in which a pattern is found; None where its anchors are not at its ends."""
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
