"""Each form of a reply on each kind of tokenizer: the reply has the form, and its bytes are those the grammar read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tiny_models import write
from tokenizers_for_tests import WRITERS

from engine import LLM, ChatMessage, Constraint, Tool, ToolChoice, Unsupported

HELLO = [ChatMessage("user", "yes no")]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": -9, "maximum": 99},
        "name": {"enum": ["left", "right so"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["x", "name", "flags"],
    "additionalProperties": False,
}
UNIQUE = {**SCHEMA, "properties": {**SCHEMA["properties"], "flags": {"const": [True]}}, "minProperties": 1}
OBJECT = {"type": "object"}
CHOICES = ["yes", "no", "maybe so", "yes-no", "yesno"]
SPACED = [" yes", "  no", " maybe so", "yes"]
SUM = 'start: "sum:" NUMBER ("+" NUMBER){1,3}\nNUMBER: /[0-9]{1,3}/'
ARGUMENTS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "left"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
PARAMETERS = {"weather": ARGUMENTS, "ping": {**OBJECT, "properties": {}, "additionalProperties": False}}
STRICT = tuple(Tool(name, "", schema, strict=True) for name, schema in PARAMETERS.items())
LOOSE = tuple(Tool(name, "", schema) for name, schema in PARAMETERS.items())


def satisfying(schema: dict[str, Any]) -> Callable[[str], bool]:
    return lambda text: Draft202012Validator(schema).is_valid(json.loads(text))


def matching(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


def form(kind: Any, value: Any, **more: Any) -> dict[str, Any]:
    strict = more.pop("strict", True)
    return {"constraint": Constraint(kind, value, strict), **more}


REQUIRED, NAMED = ToolChoice("required"), ToolChoice("function", "weather")
FORMS: dict[str, tuple[dict[str, Any], Callable[[str], bool] | None]] = {
    # what is asked for; whether an answer in text has the form (None: there are only calls)
    "json_object": (form("json", OBJECT), satisfying(OBJECT)),
    "json_schema, strict": (form("json", SCHEMA), satisfying(SCHEMA)),
    "json_schema": (form("json", UNIQUE, strict=False), satisfying(UNIQUE)),
    "guided_choice": (form("choice", CHOICES), CHOICES.__contains__),
    "guided_choice, one": (form("choice", ["maybe so"]), ["maybe so"].__contains__),
    "guided_choice, one with a space": (form("choice", [" yes"]), [" yes"].__contains__),
    "guided_choice, with spaces": (form("choice", SPACED), SPACED.__contains__),
    "guided_choice, control words": (form("choice", ["a</s>b"]), ["a</s>b"].__contains__),
    "guided_regex": (form("regex", "[A-F]{3}-[0-9]{2}so"), matching("[A-F]{3}-[0-9]{2}so")),
    "guided_regex, with a space": (form("regex", " ?yes{0,2} so"), matching(" ?yes{0,2} so")),
    "guided_grammar": (form("grammar", SUM), matching(r"sum:[0-9]{1,3}([+][0-9]{1,3}){1,3}")),
    "tools, required, strict": ({"tools": STRICT, "tool_choice": REQUIRED}, None),
    "tools, required": ({"tools": LOOSE, "tool_choice": REQUIRED}, None),
    "tools, named, strict": ({"tools": STRICT, "tool_choice": NAMED}, None),
    "tools, named": ({"tools": LOOSE, "tool_choice": NAMED}, None),
    "tools, auto, strict": ({"tools": STRICT}, lambda text: True),
    "tools, auto": ({"tools": LOOSE}, lambda text: True),
    "tools or json_schema": (form("json", SCHEMA, tools=STRICT), satisfying(SCHEMA)),
    "tools or guided_choice": (form("choice", SPACED, tools=LOOSE), SPACED.__contains__),
}
CALLS = {form for form in FORMS if form.startswith("tools")} - {"tools, auto"}
SPACES = ("guided_choice, with spaces", "tools or guided_choice")
UNSPELLABLE = {
    "unigram_with_holes": dict.fromkeys(CALLS, "tools"),  # no line break, with which a call begins
    "word_piece_chat": {**dict.fromkeys(CALLS, "tools"), **dict.fromkeys(SPACES, "response_format")},  # nor two spaces
}
"""By kind: forms with a text that no tokens spell, and the field that asks for it. They are refused by name, before the
first byte."""
ENDLESS = {"json_object", "tools, auto", "tools, auto, strict"}
"""Forms whose replies may go on for ever, as a model with random weights does."""


QUICK = {"byte_level_chat", "dummy_prefix", "no_dummy_prefix", "greedy_added_tokens"}
KINDS = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in WRITERS]


@pytest.fixture(scope="module", params=KINDS)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    yield from serving(WRITERS[request.param](), tmp_path_factory.mktemp(request.param))


def serving(tokenizer: Any, folder: Path) -> Iterator[LLM]:
    write(folder, "qwen3", vocab_size=len(tokenizer) + 3, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    tokenizer.save_pretrained(folder)
    made = LLM(folder, cache_size="16MiB", context_length=2048)
    yield made
    made.close()


def read_by_its_grammar(llm: LLM, grammar: str, tokens: tuple[int, ...], whole: bool) -> bytes:
    """Follow a reply's tokens in its grammar; return the bytes that the grammar has read."""
    compiler, table = llm.engine.model.grammars, llm.engine.model.grammars.table()
    state = compiler.start(grammar)
    for token in tokens:
        assert compiler.allowed(state)[token]
        state.consume(token)
    assert not whole or state.accepting
    return b"".join(table.tokens[i] for i in tokens if i not in table.special)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_on_every_tokenizer(llm: LLM, name: str, request: pytest.FixtureRequest) -> None:
    asked, fits = FORMS[name]
    tools: tuple[Tool, ...] = asked.get("tools", ())
    kind = request.node.callspec.params["llm"]
    if name in UNSPELLABLE.get(kind, ()):
        with pytest.raises(Unsupported) as raised:
            llm.engine.prepare(llm.request(HELLO, **asked))
        assert raised.value.param == UNSPELLABLE[kind][name]
        return
    finished = 0
    for prompt, temperature, seed in ((HELLO, 1.0, 7), (HELLO if tools else "so", 0.0, 8)):
        limit = 40 if name in ENDLESS else 120
        sampling = {"n": 2 if temperature else 1, "temperature": temperature, "seed": seed, "max_tokens": limit}
        grammar = llm.engine.prepare(llm.request(prompt, **asked, **sampling)).grammar
        answers = llm.generate(prompt, **asked, **sampling)
        drawn = llm.generate(prompt, **asked, **sampling, logprobs=True)
        assert [one.token_ids for one in answers] == [one.token_ids for one in drawn], "forced tokens are those drawn"
        for answer in answers:
            whole = answer.finish_reason != "length"
            finished += whole
            for call in answer.tool_calls:
                assert Draft202012Validator(PARAMETERS[call.name]).is_valid(json.loads(call.arguments))
            if whole and not answer.tool_calls:
                assert fits is not None, "a call was required"
                assert fits(answer.text), answer.text
            if grammar is None:
                continue
            read = read_by_its_grammar(llm, grammar, answer.token_ids, whole and answer.finish_reason == "stop")
            if whole and not answer.tool_calls and "auto" not in name:
                assert answer.text.encode() == read
    assert finished or name in ENDLESS
