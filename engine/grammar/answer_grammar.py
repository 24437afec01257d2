"""The grammar of an answer under a constraint: a JSON schema, an expression, a choice of texts, or a grammar itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from engine.errors import InvalidParameter, one_line
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.diagnosis import check_bounds, schema_rule
from engine.grammar.lark import literal, quoted
from engine.replies.reasoning import ReasoningFormat
from engine.text.json_schema import dotted
from engine.types.requests import Constraint

__all__ = ["ReplyGrammar", "answer_grammar", "answer_rules", "names_of"]

MAX_CHOICES: Final = 1_900
"""Texts to choose from: as many items are in a row of the parser, which holds 2,000."""
_PARTS: Final = re.compile(
    r'"(?:\\.|[^"\\])*"|#[^\r\n]*|\[(?:\\.|[^\]\\])*\]|\.|[()]|(?P<never>\{\s*0\s*(?:,\s*0\s*)?\})|\{[^}]*\}'
    r"|(?P<name>[\w-]+)|(?P<open>[\"\[])",
    re.DOTALL,
)
"""A text, a comment, a class of characters, any character, a bracket, a count, a name or what is not closed in GBNF."""
_HEAD: Final = re.compile(r"[ \t]*::=")
_ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_SET_OPERATIONS: Final = ("&&", "~~", "--")
"""Characters in a class of GBNF; in one of an expression, operations on sets."""


@dataclass(frozen=True, slots=True)
class ReplyGrammar:
    """The grammar of a reply, and which parts of the request's schemas it does not enforce."""

    text: str
    """In llguidance's dialect of Lark."""
    unenforced: tuple[str, ...] = ()
    """JSON pointers to keywords of the answer's schema."""
    unenforced_tools: frozenset[str] = frozenset()
    """Names of tools with such keywords in the schema of their arguments."""
    left_out: tuple[str, ...] = ()
    """Dotted names of all these keywords, from the request's field on."""


def answer_grammar(
    compiler: GrammarCompiler, constraint: Constraint, thoughts: ReasoningFormat | None = None, opened: bool = False
) -> ReplyGrammar:
    """Write the grammar of a constraint.

    Args:
        thoughts: how the model writes thoughts, if free thoughts may precede the answer. They must end.
        opened: whether the prompt ends inside the thoughts.

    Raises:
        InvalidParameter: it cannot be compiled; with `strict`, it cannot be enforced whole. A JSON pointer says where.
    """
    if constraint.kind == "gbnf":
        check_bounds(constraint)
        constraint = dataclasses.replace(
            constraint, kind="grammar", value=lark_of(str(constraint.value), constraint.param)
        )
    if constraint.kind == "grammar":
        check_bounds(constraint)
        compiler.check(str(constraint.value), constraint.param)
        if thoughts is None or not opened:
            return ReplyGrammar(str(constraint.value))
        raise InvalidParameter(
            f"{constraint.param} cannot be combined with thinking; turn that off (reasoning_effort: none).",
            param=constraint.param,
        )
    rules, unenforced = answer_rules(compiler, constraint, thoughts)
    grammar = compiler.lark.whole(thoughts, opened, "answer: text", rules)
    compiler.check(grammar, constraint.param)
    return ReplyGrammar(grammar, unenforced, left_out=names_of(constraint.param, unenforced))


def names_of(param: str, pointers: Iterable[str]) -> tuple[str, ...]:
    """Write pointers to keywords of a field's schema as dotted names."""
    return tuple(dotted(param, pointer) for pointer in pointers)


def answer_rules(
    compiler: GrammarCompiler, constraint: Constraint, thoughts: ReasoningFormat | None, without: str = ""
) -> tuple[list[str], tuple[str, ...]]:
    """Write the rule `text`, an answer that satisfies a constraint; return it with the unenforced keywords.

    Args:
        without: a text that no expression may match and no choice contain, because it would be read as a call.
    """
    value = constraint.value
    check_bounds(constraint)
    start = ""
    if thoughts is not None and thoughts.answer_open:
        start = f"{compiler.lark.delimiter(thoughts.answer_open)} "
    unenforced: tuple[str, ...] = ()
    match constraint.kind:
        case "json":
            rule, unenforced = schema_rule(compiler, constraint)
        case "regex":
            rule = f"/{regex_to_lark(str(value))}/"
            if without:
                return [f"text: {start}FORM", f"FORM: {rule} & ~/(.|\\n)*{literal(without)}(.|\\n)*/"], ()
        case "choice":
            rule = _choices(constraint, without)
        case "grammar" | "gbnf":
            raise InvalidParameter(
                f"{constraint.param} cannot be combined with tools: it is a whole grammar.", param=constraint.param
            )
    return [f"text: {start}form", f"form: {rule}"], unenforced


def lark_of(gbnf: str, param: str) -> str:
    """Translate a grammar in GBNF (https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md) into Lark.

    Every text of the translation is one of the grammar. As a lexer takes the longest word, the reverse does not hold:
    of a rule like `[a-z]+ "b"` no text can be written.

    Raises:
        InvalidParameter: it is none, or holds what the translation would get wrong.
    """
    try:
        return gbnf_to_lark(_translatable(gbnf))
    except (Exception, RecursionError) as error:  # its own type, ValueError, IndexError: it was not made for strangers
        raise InvalidParameter(f"{param} is not valid GBNF: {one_line(str(error))[:300]}", param=param) from None


def _translatable(gbnf: str) -> str:
    """Write a grammar in GBNF so that its translation means the same, and is one.

    The translation gives names their case by what a rule is: each gets a number, or `fooBar` and `foo-bar` would be one
    rule, and `start` the root. What is repeated no times is left out, because Lark has no such count.
    """
    heads = [found["name"] for found in _PARTS.finditer(gbnf) if found["name"] and _HEAD.match(gbnf, found.end())]
    names = {
        name: f"r{i}_{re.sub('[^a-z0-9]', '', name.lower())[:20]}" for i, name in enumerate(dict.fromkeys(heads))
    } | ({"root": "root"} if "root" in heads else {})
    parts: list[str] = []
    end = 0
    for found in _PARTS.finditer(gbnf):
        if found.start() > end:
            parts.append(gbnf[end : found.start()])
        end = found.end()
        name = found["name"]
        if found["open"]:
            raise ValueError(f"Unexpected end of input: {found['open']} is not closed")
        if name is not None and name not in names:
            raise ValueError(f"Rule {name!r} not found")
        if found["never"] is None or not _emptied(parts):
            parts.append(_plain(found) if name is None else names[name])
    return "".join(parts) + gbnf[end:]


def _emptied(parts: list[str]) -> bool:
    """Replace the last item of a sequence in GBNF by the empty text; return False if there is none."""
    at = len(parts) - 1
    while at >= 0 and parts[at].isspace():
        at -= 1
    depth = 0
    while at >= 0 and (depth or parts[at] == ")"):
        depth += {")": 1, "(": -1}.get(parts[at], 0)
        if not depth:
            break
        at -= 1
    if depth:
        raise ValueError("a bracket is closed that was not opened")
    if at < 0 or not re.match(r'["\[(\w-]', parts[at]):
        return False
    parts[at:] = ['""']
    return True


def _plain(found: re.Match[str]) -> str:
    """Write a part of a grammar in GBNF so that its translation means the same in Lark."""
    part = found[0]
    if part == ".":  # which is no line break in Lark
        return '(. | "\\n")'
    if part.startswith("#"):
        return part
    if part.startswith("[") and any(operation in part for operation in _SET_OPERATIONS):
        raise ValueError(f"a class of characters with {' or '.join(_SET_OPERATIONS)} in it cannot be translated")
    written = _ESCAPE.sub(_escape, part)
    if part.startswith("["):
        return written
    written = re.sub(r"\\(?:([\[\]])|.)", lambda escape: escape[1] or escape[0], written)
    return "".join(f"\\x{ord(c):02x}" if c < " " or c == "\x7f" else c for c in written)


def _escape(found: re.Match[str]) -> str:
    """Write a character that is escaped by its number as itself, or by two digits if it could mean something."""
    digits = found[1] or found[2]
    if digits is None:
        return found[0]
    code = int(digits, 16)
    chr(code).encode()  # half a surrogate pair is no character: ValueError
    return f"\\x{code:02x}" if code < 0x80 else chr(code)


def _choices(constraint: Constraint, without: str) -> str:
    if len(constraint.value) > MAX_CHOICES:
        raise InvalidParameter(
            f"{constraint.param} has {len(constraint.value):,} choices; at most {MAX_CHOICES:,} are allowed.",
            param=constraint.param,
        )
    if without and any(without in choice for choice in constraint.value):
        raise InvalidParameter(
            f"{constraint.param}: a choice holds {without!r}, which would be read as a call of a tool.",
            param=constraint.param,
        )
    return " | ".join(quoted(choice) for choice in constraint.value)
