"""What a request asks of its reply's form, as plain data and as a grammar. No tokens, no torch, no clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.tools import ToolGrammar, tool_grammar
from engine.replies.reasoning import ReasoningFormat
from engine.replies.tool_format import ToolFormat
from engine.types.requests import Constraint

__all__ = ["ReplyForm", "grammar_of"]


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """A constraint, tools, or both.

    Args:
        constraint: what the reply has to be, or what it has to be if it holds no call.
        tools: definitions in the API's shape; a grammar is made for their calls unless there are none.
        written: how the model writes calls; None only without tools.
        choice: `auto`, `required`, or after a colon the name of the tool that must be called.
        several: whether another call may follow the first.
        thoughts: how the model writes thoughts, if they may stand before the answer.
        opened: whether the prompt has begun them.
    """

    constraint: Constraint | None
    tools: tuple[Mapping[str, Any], ...] = ()
    written: ToolFormat | None = None
    choice: str = "auto"
    several: bool = True
    thoughts: ReasoningFormat | None = None
    opened: bool = False

    @property
    def param(self) -> str:
        """The request's field that a refusal of the whole names."""
        return "tools" if self.tools or self.constraint is None else self.constraint.param

    def as_json(self) -> dict[str, Any]:
        """This as JSON, if the schemas in it are."""
        told = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # schemas are not copied
        for name in ("constraint", "written", "thoughts"):
            part = told[name]
            told[name] = part and {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return told

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ReplyForm:
        thoughts = value["thoughts"]
        return cls(
            **{
                **value,
                "constraint": Constraint(**value["constraint"]) if value["constraint"] else None,
                "tools": tuple(value["tools"]),
                "written": ToolFormat(**value["written"]) if value["written"] else None,
                "thoughts": ReasoningFormat(**{**thoughts, "asides": tuple(thoughts["asides"])}) if thoughts else None,
            }
        )


def grammar_of(compiler: GrammarCompiler, form: ReplyForm) -> ToolGrammar:
    """The grammar of a form.

    With tools: calls, if some are asked for; calls or the form that is asked for; strict calls, once they begin.

    Raises:
        InvalidParameter: it cannot be compiled; with `strict`, it cannot be enforced whole.
    """
    constraint, choice = form.constraint, form.choice
    if not form.tools:
        assert constraint is not None
        return ToolGrammar(*compiler.grammar_of(constraint, form.thoughts, form.opened))
    assert form.written is not None
    if constraint is not None and choice != "auto":
        compiler.grammar_of(constraint)  # it can never come to it, but what is wrong is said
    grammar = tool_grammar(
        compiler,
        form.written,
        form.tools,
        form.thoughts,
        form.opened,
        free=choice == "auto" and constraint is None,
        several=form.several and not choice.startswith(":"),
        only=choice[1:] if choice.startswith(":") else None,
        otherwise=constraint if choice == "auto" else None,
    )
    compiler.check(grammar.text, "tools")
    return grammar
