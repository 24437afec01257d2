"""The record of a request holds everything that its reply depends on, through canonical JSON and back."""

from __future__ import annotations

import copy
import dataclasses
import datetime as dt
import json
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings, strategies as st

from engine import ChatMessage, Constraint, GenerationRequest, ReceiptError, SamplingParams, Tool, ToolCall, ToolChoice
from engine.receipts.request_record import from_record, to_record
from engine.types.sampling_params import SAMPLING_FIELDS

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXT, JSON, max_size=3)
CALLS = st.builds(ToolCall, TEXT, TEXT, TEXT)
MESSAGES = st.builds(
    ChatMessage,
    st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
    st.none() | TEXT,
    st.none() | TEXT,
    st.none() | TEXT,
    st.lists(CALLS, max_size=2).map(tuple),
    st.none() | TEXT,
)
TOOLS = st.builds(Tool, TEXT, st.none() | TEXT, st.none() | OBJECTS, st.booleans())
CONSTRAINTS = st.one_of(
    st.builds(Constraint, st.just("json"), JSON, st.booleans()),
    st.builds(Constraint, st.sampled_from(["regex", "grammar", "gbnf"]), TEXT),
    st.builds(Constraint, st.just("choice"), st.lists(TEXT, min_size=1, max_size=3)),
)
BIASES = st.dictionaries(st.integers(0, 400), st.floats(-100, 100), max_size=3)
PARAMS = st.fixed_dictionaries(
    {"seed": st.integers(-(2**63), 2**63 - 1), "max_tokens": st.integers(0, 2**70)},
    optional={
        "n": st.integers(1, 8),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1),
        "top_k": st.integers(0, 2**80),
        "presence_penalty": st.floats(-2, 2),
        "logit_bias": BIASES,
        "stop": st.lists(TEXT.filter(bool), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, 400), max_size=3),
        "logprobs": st.booleans(),
        "prompt_logprobs": st.none() | st.integers(0, 20),
        "margins": st.booleans(),
        "thinking_budget": st.none() | st.integers(0, 2**60),
    },
)
CLOCKS = st.none() | st.datetimes(dt.datetime(1900, 1, 1), timezones=st.none() | st.just(dt.UTC)).map(
    lambda clock: clock.replace(fold=0)
)


@st.composite
def requests(draw: st.DrawFn) -> GenerationRequest:
    prompt: dict[str, Any] = draw(
        st.one_of(
            st.lists(MESSAGES, min_size=1, max_size=3).map(lambda m: {"messages": tuple(m)}),
            TEXT.map(lambda text: {"prompt": text}),
            st.lists(st.integers(0, 2**32 - 1), max_size=4).map(lambda ids: {"prompt_token_ids": tuple(ids)}),
        )
    )
    tools = tuple(draw(st.lists(TOOLS, max_size=2)))
    names = tuple(tool.name for tool in tools)
    choices = [ToolChoice(), ToolChoice("required"), ToolChoice("function", names[0] if names else "f")]
    choices += [ToolChoice(choice.kind, allowed=names) for choice in choices[:2]]
    return GenerationRequest(
        request_id="r",
        **prompt,
        suffix=draw(st.none() | TEXT),
        add_special_tokens=draw(st.booleans()),
        add_generation_prompt=draw(st.booleans()),
        continue_final_message=draw(st.booleans()),
        continue_token_ids=draw(st.none() | st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4).map(tuple)),
        chat_template_kwargs=draw(OBJECTS),
        constraint=draw(st.none() | CONSTRAINTS),
        reasoning_effort=draw(st.none() | st.sampled_from(["low", "high"])),
        tools=tools,
        parallel_tool_calls=draw(st.booleans()),
        tool_choice=draw(st.sampled_from(choices)),
        clock=draw(CLOCKS) if "messages" in prompt else None,
    )


def facts(request: GenerationRequest) -> str:
    """Everything but what a record leaves out; `repr` tells 1 from 1.0, and the order of names."""
    constraint = request.constraint
    return repr(
        (
            request.messages,
            request.prompt,
            request.prompt_token_ids,
            request.suffix,
            request.add_special_tokens,
            request.add_generation_prompt,
            request.continue_final_message,
            request.continue_token_ids,
            dict(request.chat_template_kwargs),
            constraint and (constraint.kind, constraint.value, constraint.strict),
            request.reasoning_effort,
            request.tools,
            request.parallel_tool_calls,
            request.tool_choice,
            request.clock,
        )
    )


@settings(deadline=None)
@given(requests(), PARAMS)
def test_a_record_gives_the_request_back(request: GenerationRequest, params: dict[str, Any]) -> None:
    filled = SamplingParams(**params)
    record = json.loads(rfc8785.dumps(to_record(request, filled)))
    again = from_record(record, "again")
    assert facts(again) == facts(request)
    assert SamplingParams.merged(again.sampling) == filled
    assert again.record
    assert json.loads(rfc8785.dumps(to_record(again, filled))) == record


def test_version_1_holds_these_fields() -> None:
    """A new sampling field changes what a receipt must hold: raise `VERSION`, and read version 1 without the field."""
    assert set(SAMPLING_FIELDS) == set(
        "n max_tokens temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty logit_bias "
        "seed stop stop_token_ids min_tokens ignore_eos logprobs top_logprobs logprobs_mode prompt_logprobs margins "
        "return_token_ids thinking_budget".split()
    )


def test_every_field_of_a_request_is_in_the_record_or_changes_no_reply() -> None:
    """A new field belongs into the record, if a prompt or a reply depends on it; then the format has a new version."""
    left_out = {"request_id", "prompt_field", "echo", "group", "context_limit", "cache_salt", "prediction", "record"}
    recorded = set(RECORD) | {"prompt", "prompt_token_ids", "continue_final_message", "continue_token_ids"}
    of_the_environment = {"adapter"}  # among the model's files and the parts of its fingerprint
    assert {field.name for field in dataclasses.fields(GenerationRequest)} == recorded | left_out | of_the_environment


RECORD = to_record(
    GenerationRequest(
        request_id="r",
        messages=(ChatMessage("user", "Hello"),),
        tools=(Tool("f", None, {"b": 1, "a": 1.0}),),
        constraint=Constraint("regex", "a+"),
    ),
    SamplingParams(seed=1, max_tokens=4),
)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("extra", 1, "request.extra is not known"),
        ("continue_final_message", False, "request.continue_final_message is false: then it is left out"),
        ("continue_token_ids", [], "request.continue_token_ids holds nothing: then it is left out"),
        ("continue_token_ids", [-1], "request.continue_token_ids must be a list of token ids"),
        ("tools", None, "request.tools must be a list"),
        ("tools.0.parameters", "[1]", "request.tools.0.parameters must be the text of an object"),
        ("tools.0.parameters", "{", "request.tools.0.parameters is not the text of JSON"),
        ("tools.0.strict", 1, "request.tools.0.strict must be true or false"),
        ("messages.0.role", "king", "request.messages.0.role must be system or developer or user"),
        ("messages.0.content", 1, "request.messages.0.content must be a text"),
        ("messages.0.more", 1, "request.messages.0.more is not known"),
        ("prompt", "Hello", "request must hold exactly one of messages, prompt, prompt_token_ids"),
        ("sampling.temperature", 3, "request.sampling: temperature must be between 0 and 2"),
        ("sampling.temperature", "1", "request.sampling: temperature must be a number"),
        ("sampling.seed", None, "request.sampling.seed is null"),
        ("sampling.seed", "7", "request.sampling: seed must be an integer"),
        ("sampling.seed", "99999999999999999999", "request.sampling: seed must be between"),
        ("sampling.beam", 1, "request.sampling.beam is not known"),
        ("tool_choice.kind", "none", "request.tool_choice.kind must be auto or required or function"),
        ("tool_choice.name", "f", "request.tool_choice: auto takes no name"),
        ("tool_choice.allowed", [], "request.tool_choice.allowed must be a list of names"),
        ("tool_choice.allowed", ["f", 1], "request.tool_choice.allowed must be a list of names"),
        ("constraint.kind", "xml", "request.constraint.kind must be json or regex"),
        ("clock", "noon", "request.clock must be a time"),
        ("chat_template_kwargs", "[]", "request.chat_template_kwargs must be the text of an object"),
    ],
)
def test_reading_is_strict(path: str, value: Any, message: str) -> None:
    record = copy.deepcopy(RECORD)
    *places, last = path.split(".")
    inner: Any = record
    for place in places:
        inner = inner[int(place)] if isinstance(inner, list) else inner[place]
    inner[last] = value
    with pytest.raises(ReceiptError, match=message):
        from_record(record, "r")


@pytest.mark.parametrize("name", sorted(RECORD))
def test_nothing_may_be_missing(name: str) -> None:
    with pytest.raises(ReceiptError, match=f"request.{name} is missing|exactly one of"):
        from_record({key: value for key, value in RECORD.items() if key != name}, "r")


@pytest.mark.parametrize("value", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": object()}, {"a": float("inf")}, {"a": "\ud800"}])
def test_what_json_cannot_write_is_refused(value: dict[str, Any]) -> None:
    """A tuple renders otherwise than a list, so a record that made a list of it would describe another prompt."""
    request = GenerationRequest(request_id="r", prompt="Hello", chat_template_kwargs=value)
    with pytest.raises(ReceiptError, match="chat_template_kwargs holds something that JSON cannot write"):
        to_record(request, SamplingParams(seed=1, max_tokens=1))


def test_the_order_of_a_schema_is_kept() -> None:
    """A grammar writes properties in their schema's order, and canonical JSON sorts names."""
    assert list(from_record(json.loads(rfc8785.dumps(RECORD)), "r").tools[0].parameters or ()) == ["b", "a"]
