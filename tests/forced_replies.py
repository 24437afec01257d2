"""A model that is made to say a text, whatever its weights: what reads replies can then be tested with any text."""

from __future__ import annotations

import dataclasses
from typing import Any

from engine import LLM, ChatMessage, Completion, Constraint, Tool
from engine.grammar.answer_grammar import answer_grammar
from engine.llm import _collect
from engine.types.requests import GenerationRequest


def forced_reply(llm: LLM, text: str, tools: list[Tool], **sampling: Any) -> Completion:
    """The reply to a greeting with these tools, held to one text: the request's own grammar is put aside."""
    request = GenerationRequest(
        request_id="forced",
        messages=(ChatMessage("user", "Hello"),),
        sampling={"seed": 1, **sampling},
        tools=tuple(tools),
    )
    grammar = answer_grammar(llm._model.grammars, Constraint("choice", [text])).text
    prepared = llm._preparer.prepare(request)
    reply_format = dataclasses.replace(prepared.reply_format, exact_calls=True)
    llm._core.add(dataclasses.replace(prepared, grammar=grammar, reply_format=reply_format))
    outputs = []
    while not outputs or not outputs[-1].finished:
        outputs += llm._core.step()
    if outputs[-1].error:
        raise outputs[-1].error
    return _collect(outputs, 1)[0]
