"""Writes the grammar of tool calls, as the model writes them, with arguments that satisfy their schemas. No torch.

Whatever such a grammar allows is read back by `engine.replies.tool_calls`: a call as that call, text as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from engine.errors import InvalidParameter
from engine.grammar.answer_grammar import ReplyGrammar, answer_rules, names_of
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.diagnosis import check_bounds, enforceable
from engine.grammar.lark import ANY, json_rule, literal, quoted
from engine.grammar.pair_arguments import JsonValues, PairArguments
from engine.replies.reasoning import ReasoningFormat
from engine.replies.tool_format import CALL_ID, ToolFormat
from engine.text.json_schema import moved, types_of
from engine.types.requests import Constraint
from engine.types.tools import Tool

__all__ = ["tool_grammar"]

_SPACE: Final = r"[\s\x1c-\x1f]*"
"""White space to the readers of calls, as an expression: Python counts four characters more than the lexer."""


def tool_grammar(
    compiler: GrammarCompiler,
    tool_format: ToolFormat,
    tools: Sequence[Tool],
    thoughts: ReasoningFormat | None = None,
    opened: bool = False,
    *,
    free: bool,
    several: bool,
    allows: Callable[[str], bool] = lambda name: True,
    otherwise: Constraint | None = None,
) -> ReplyGrammar:
    """Write the grammar of a reply with calls of these tools, each with arguments that satisfy its schema.

    Args:
        tool_format: how the model writes calls.
        tools: what may be called. A schema that cannot be enforced whole is refused with `strict`, and otherwise
            enforced as far as possible.
        thoughts: how the model writes thoughts, if thoughts may precede the answer.
        opened: whether the prompt ends inside the thoughts.
        free: whether the reply may be any text, which must be a valid call once the delimiter of one is written.
            Without, it is nothing but calls.
        several: whether another call may follow the first.
        allows: whether the tool of a name may be called; others are left out.
        otherwise: the constraint on a reply without calls; not with `free`.

    Raises:
        InvalidParameter: a schema cannot be compiled; with `strict`, it cannot be enforced whole.
    """
    made = _CallRules(compiler, tool_format)
    for i, tool in enumerate(tools):
        if allows(tool.name):
            made.add(i, tool)
    delimiter, whole = compiler.lark.delimiter, compiler.lark.whole
    close = [delimiter(part) if part else "" for part in tool_format.close.split(CALL_ID)]
    lines = [*made.lines, f"call: {' | '.join(made.names)}", "ID: /[A-Za-z0-9]{9}/", f"close: {' ID '.join(close)}"]
    if tool_format.begin and not tool_format.end.strip():
        several = False  # what follows a call could not be told from another one of its block
    more = ""
    if several and tool_format.between is not None:
        more = f"({delimiter(tool_format.between) if tool_format.between else ''} {delimiter(tool_format.open)} call)*"
    end = delimiter(tool_format.end) if tool_format.end else ""
    calls = f"calls: {delimiter(tool_format.begin + tool_format.open)} call {more} {end}"
    unenforced_tools, left_out = frozenset(made.unenforced), tuple(made.left_out)
    if not free:
        if otherwise is None:
            text = whole(thoughts, opened, "answer: calls", [calls, *lines])
            return ReplyGrammar(text, (), unenforced_tools, left_out)
        if not tool_format.tagged and otherwise.kind == "json" and "{" in tool_format.open:
            rule, unenforced = _as_json(compiler, tool_format, tools, otherwise, allows)
            text = whole(thoughts, opened, "answer: json", [f"json: {rule}"])
            return ReplyGrammar(text, unenforced, unenforced_tools, left_out + names_of(otherwise.param, unenforced))
        form, unenforced = answer_rules(
            compiler, otherwise, thoughts, tool_format.delimiter if tool_format.tagged else ""
        )
        text = whole(thoughts, opened, "answer: calls | text", [calls, *lines, *form])
        return ReplyGrammar(text, unenforced, unenforced_tools, left_out + names_of(otherwise.param, unenforced))
    answer, rules = _free(compiler, tool_format, thoughts, opened, calls, lines, several)
    return ReplyGrammar(whole(thoughts, opened, answer, rules, asides=True), (), unenforced_tools, left_out)


def _as_json(
    compiler: GrammarCompiler,
    tool_format: ToolFormat,
    tools: Sequence[Tool],
    otherwise: Constraint,
    allows: Callable[[str], bool],
) -> tuple[str, tuple[str, ...]]:
    """Write one JSON schema for a call without a delimiter or an answer in JSON.

    The lexer could not tell which of two rules has begun. Returns also pointers to the unenforced keywords of the
    answer's schema.
    """
    name, arguments = (re.findall(r"\w+", part)[0] for part in (tool_format.open, tool_format.middle))
    listed: list[Any] = []
    for i, tool in enumerate(tools):
        if not allows(tool.name):
            continue
        whole = {**(tool.parameters or {}), "type": "object"}
        schema, _ = enforceable(compiler, Constraint("json", whole, tool.strict, _param(i)))
        members = {name: {"const": tool.name}, arguments: moved(schema, f"/anyOf/{len(listed)}/properties/{arguments}")}
        listed.append({"type": "object", "properties": members, "required": [*members], "additionalProperties": False})
    check_bounds(otherwise)
    form, unenforced = enforceable(compiler, otherwise)
    listed.append(moved(form, f"/anyOf/{len(listed)}"))
    return json_rule({"anyOf": listed}), unenforced


def _free(
    compiler: GrammarCompiler,
    tool_format: ToolFormat,
    thoughts: ReasoningFormat | None,
    opened: bool,
    calls: str,
    lines: Sequence[str],
    several: bool,
) -> tuple[str, list[str]]:
    """Write the rule `answer`, and those it needs, for text with calls in it. The text contains no call's delimiter."""
    lark = compiler.lark
    if thoughts is not None and thoughts.resume:  # the answer is a turn of its own
        return "answer: calls | said", [
            calls,
            *lines,
            f"said: {lark.delimiter(thoughts.answer_open)} TEXT",
            f"TEXT: {ANY} & ~/(.|\\n)*{literal(thoughts.close)}(.|\\n)*/",  # nor that delimiter letter by letter
        ]
    first = ""
    if thoughts is not None and not opened:
        special, begins = lark.pieces(thoughts.open)[0]
        if special is None:  # these are thoughts, whatever stands in them
            first = f" & ~/{_SPACE}{literal(begins)}(.|\\n)*/"
    delimiter = tool_format.delimiter
    if not tool_format.tagged:  # such a call is all of a reply
        start = _SPACE.join(literal(piece) for piece in re.findall(r'"[^"]*"|\S', delimiter.removesuffix('"')))
        other = f"OTHER: {ANY} & ~/{_SPACE}{start}(.|\\n)*/{first}"
        return "answer: calls | OTHER", [calls, *lines, other]
    text = f"{ANY} & ~/(.|\\n)*{literal(delimiter)}(.|\\n)*/"
    opening = tool_format.begin + tool_format.open
    block = calls.removeprefix(f"calls: {lark.delimiter(opening)}")
    end = ""
    if lark.pieces(opening)[0][0] is None:  # text ends with the delimiter, not by itself
        end, opening = f" {quoted(delimiter)}", opening[len(delimiter) :]
    rules = [
        f"HEAD: ({text}){end}",
        f"FIRST: ({text}{first}){end}",
        f"TEXT: {text}",
        f"OTHER: {text}{first}",
        f"rest_of_block: {lark.delimiter(opening) if opening else ''} {block}",
    ]
    again = "(HEAD rest_of_block)* " if several else ""
    return f"answer: OTHER | FIRST rest_of_block {again}TEXT", [*lines, *rules]


class _CallRules:
    """The rules of calls, one per tool: what follows the opening of a call, up to its end."""

    def __init__(self, compiler: GrammarCompiler, tool_format: ToolFormat) -> None:
        self.lines: list[str] = []
        self.names: list[str] = []
        """The rule of each tool."""
        self.unenforced: set[str] = set()
        """Tools with keywords in their schema that no rule enforces."""
        self.left_out: list[str] = []
        """The dotted names of these keywords."""
        self._compiler = compiler
        self._format = tool_format
        self._json_values = JsonValues(compiler, self.lines)

    def add(self, number: int, tool: Tool) -> None:
        """Write the rule of a tool, the `number`th of the request.

        Raises:
            InvalidParameter: its schema cannot be compiled; with `strict`, it cannot be enforced whole.
        """
        lark, schema = self._compiler.lark, tool.parameters or {}
        param = _param(number)
        check_bounds(Constraint("json", schema, tool.strict, param))
        if "object" not in types_of(schema, schema):
            raise InvalidParameter(f"{param} must describe an object.", param=param)
        whole = Constraint("json", {**schema, "type": "object"}, tool.strict, param)
        held, dropped = enforceable(self._compiler, whole)  # also for pairs, to refuse what is no schema
        rule = json_rule({**held, "type": "object"})  # whatever else was left out
        head = lark.terms([(None, tool.name), *lark.pieces(self._format.middle)])
        left_out = [*names_of(param, dropped)]
        unenforced = bool(dropped)
        if self._format.style == "json":
            self.lines += [f"call_{number}: {head} args_{number} close", f"args_{number}: {rule}"]
        else:
            told = replace(tool, parameters=held)
            arguments = PairArguments(self._compiler, self._format, told, number, param, self._json_values)
            terms = arguments.terms()
            self.lines.append(f"call_{number}: {head} {' '.join(terms)} close")
            left_out += [name for name in names_of(param, arguments.left_out) if name not in left_out]
            unenforced = unenforced or arguments.unenforced
        self.left_out += left_out
        self.names.append(f"call_{number}")
        if unenforced:
            self.unenforced.add(tool.name)


def _param(number: int) -> str:
    """The request's field that holds the schema of a tool."""
    return f"tools.{number}.function.parameters"
