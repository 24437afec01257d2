"""`GrammarSource`, what a reply's grammar is made from, and `reply_grammar`, which makes it. No torch, no clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import Unsupported
from engine.grammar.answer_grammar import ReplyGrammar, answer_grammar
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.tool_grammar import tool_grammar
from engine.replies.reasoning import ReasoningFormat
from engine.replies.tool_format import CALL_ID, ToolFormat
from engine.types.requests import Constraint
from engine.types.tools import AUTO, Tool, ToolChoice

__all__ = ["GrammarSource", "reply_grammar"]


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """A request's constraint, its tools, or both, and how the model writes calls and thoughts.

    Args:
        constraint: what the reply must be; with tools, what it must be unless it is calls.
        tools: the tools that may be called.
        tool_format: how the model writes calls; None only without tools.
        choice: whether a tool must be called.
        parallel_tool_calls: whether another call may follow the first.
        reasoning: how the model writes thoughts, if thoughts may precede the answer.
        thinking: whether the prompt ends inside the thoughts.
    """

    constraint: Constraint | None
    tools: tuple[Tool, ...] = ()
    tool_format: ToolFormat | None = None
    choice: ToolChoice = AUTO
    parallel_tool_calls: bool = True
    reasoning: ReasoningFormat | None = None
    thinking: bool = False

    @property
    def param(self) -> str:
        """The request's field that a refusal of the whole names."""
        return "tools" if self.tools or self.constraint is None else self.constraint.param

    def as_json(self) -> dict[str, Any]:
        """Return this as JSON, provided that the schemas in it are JSON."""
        told = _members(self)
        for name in ("constraint", "tool_format", "choice", "reasoning"):
            told[name] = told[name] and _members(told[name])
        told["tools"] = [_members(tool) for tool in self.tools]
        return told

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> GrammarSource:
        """Read what `as_json` wrote."""
        reasoning = value["reasoning"]
        return cls(
            **{
                **value,
                "constraint": Constraint(**value["constraint"]) if value["constraint"] else None,
                "tools": tuple(Tool(**tool) for tool in value["tools"]),
                "tool_format": ToolFormat(**value["tool_format"]) if value["tool_format"] else None,
                "choice": ToolChoice(**{**value["choice"], "allowed": tuple(value["choice"]["allowed"])}),
                "reasoning": ReasoningFormat(**{**reasoning, "asides": tuple(reasoning["asides"])})
                if reasoning
                else None,
            }
        )


def _members(value: Any) -> dict[str, Any]:
    # Not `dataclasses.asdict`, which copies the schemas.
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def reply_grammar(compiler: GrammarCompiler, source: GrammarSource) -> ReplyGrammar:
    """Write the grammar of a reply.

    With tools: calls, if one is required; calls or the answer that the constraint asks for; or free text in which
    a call, once begun, must be valid.

    Raises:
        InvalidParameter: it cannot be compiled; with `strict`, it cannot be enforced whole.
        Unsupported: it holds a text that no tokens spell.
    """
    made = _written(compiler, source)
    _check_spelling(compiler, source)
    return made


def _written(compiler: GrammarCompiler, source: GrammarSource) -> ReplyGrammar:
    constraint, choice = source.constraint, source.choice
    if not source.tools:
        assert constraint is not None
        return answer_grammar(compiler, constraint, source.reasoning, source.thinking)
    assert source.tool_format is not None
    if constraint is not None and choice.kind != "auto":
        answer_grammar(compiler, constraint)  # the reply never gets there, but a faulty constraint is still refused
    grammar = tool_grammar(
        compiler,
        source.tool_format,
        source.tools,
        source.reasoning,
        source.thinking,
        free=choice.kind == "auto" and constraint is None,
        several=source.parallel_tool_calls and choice.kind != "function",
        allows=choice.allows,
        otherwise=constraint if choice.kind == "auto" else None,
    )
    compiler.check(grammar.text, "tools")
    return grammar


def _check_spelling(compiler: GrammarCompiler, source: GrammarSource) -> None:
    """Refuse texts that a reply may have to contain and no tokens spell: choices, and what is around a call.

    Only vocabularies without a token for each byte have such texts.
    """
    texts: list[tuple[str, str]] = []
    constraint, written = source.constraint, source.tool_format
    if constraint is not None and constraint.kind == "choice":
        texts += [(constraint.param, text) for text in constraint.value]
    if written is not None:
        texts += [("tools", f"{written.begin}{written.open}{tool.name}{written.middle}") for tool in source.tools]
        texts += [("tools", text) for text in f"{written.close}{written.end}".split(CALL_ID)]
    for param, text in texts:
        if not compiler.can_spell(text):
            raise Unsupported(f"{param}: no tokens of this model spell {text[:60]!r}.", param=param)
