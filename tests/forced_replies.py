"""A model that is made to say a text, whatever its weights: what reads replies can then be tested with any text."""

from __future__ import annotations

import dataclasses
from typing import Any

from engine import LLM, ChatMessage, Completion, Constraint, Tool
from engine.grammar.answer_grammar import answer_grammar
from engine.llm import join_outputs
from engine.types.requests import GenerationRequest


def forced_reply(llm: LLM, text: str, tools: list[Tool], **sampling: Any) -> Completion:
    """The reply to a greeting with these tools, held to one text: the request's own grammar is put aside."""
    request = GenerationRequest(
        request_id="forced",
        messages=(ChatMessage("user", "Hello"),),
        sampling={"seed": 1, **sampling},
        tools=tuple(tools),
    )
    grammar = answer_grammar(llm.engine.model.grammars, Constraint("choice", [text])).text
    prepared = llm.engine.prepare(request)
    reply_format = dataclasses.replace(prepared.reply_format, exact_calls=True)
    llm.engine.add(dataclasses.replace(prepared, grammar=grammar, reply_format=reply_format))
    outputs = []
    while not outputs or not outputs[-1].finished:
        outputs += llm.engine.step()
    if outputs[-1].error:
        raise outputs[-1].error
    return join_outputs(outputs, 1)[0]
