"""Reads the body of a message: bytes → a `ParsedRequest` for the engine; and of a count of its tokens."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Final

from engine import SAMPLING_FIELDS, GenerationRequest, ModelInfo
from server.api.common_fields import read_common, read_model
from server.api.fields import BodyFields
from server.api.messages.conversation import read_conversation, read_prefill
from server.api.messages.fields import COUNT, MESSAGE
from server.api.messages.settings import Thoughts, check_context_management, read_format, read_thoughts
from server.api.messages.tools import read_tools
from server.api.parsing import ParsedRequest
from server.api.tokenizer.requests import TokensOf
from server.json_text import load_body

__all__ = ["fitted", "own_name", "parse", "parse_count"]

_TOOL: Final = re.compile(r"(tools\.\d+)\.function\.(name|description|strict)")
_SCHEMA: Final = re.compile(r"(tools\.\d+)\.function\.parameters")
_NAMES: Final[Mapping[str, str]] = {
    "stop": "stop_sequences",
    "thinking_budget": "thinking.budget_tokens",
}
"""Fields of the engine's → where a body has what is told of them."""


def parse(raw: bytes, request_id: str) -> ParsedRequest:
    """Parse and check a body.

    Raises:
        InvalidFormat: not JSON, not an object, a field missing or of the wrong type.
        InvalidParameter: right type, wrong value; Unsupported: a field this build cannot honour.
    """
    data = load_body(raw)
    model = read_model(MESSAGE, data)
    nested: list[str] = []
    request, thoughts = _prompt(MESSAGE, data, request_id, nested)
    prefill = read_prefill(data, request.messages or ())
    common = read_common(MESSAGE, data)
    sampling = MESSAGE.sampling(data)
    if (stops := MESSAGE.given(data, "stop_sequences")) is not None:
        sampling["stop"] = SAMPLING_FIELDS["stop"].checked("stop_sequences", stops)
    if thoughts.budget is not None:
        sampling["thinking_budget"] = thoughts.budget
    request = dataclasses.replace(
        request, sampling=sampling, cache_salt=common.cache_salt, continue_final_message=bool(prefill)
    )
    ignored = (*common.ignored, *nested)
    places = {"reasoning_effort": thoughts.place, **prefill}
    return ParsedRequest(model, (request,), common.stream, True, ignored, receipt=common.receipt, places=places)


def parse_count(raw: bytes, request_id: str) -> TokensOf:
    """Parse and check a body whose tokens are to be counted.

    Raises: as `parse`.
    """
    data = load_body(raw)
    model = read_model(COUNT, data)
    ignored = [name for name in data if name not in COUNT.known]
    request, thoughts = _prompt(COUNT, data, request_id, ignored)
    COUNT.refuse_unsupported(data)
    if data["messages"][-1]["role"] != "assistant":
        prefill: dict[str, str] = {}
    elif request.messages and request.messages[-1].tool_calls:  # nothing goes on with it, so no turn begins
        request, prefill = dataclasses.replace(request, add_generation_prompt=False), {}
    else:
        prefill = read_prefill(data, request.messages or (), spaces=True)
    request = dataclasses.replace(request, continue_final_message=bool(prefill))
    return TokensOf(model, request, False, tuple(ignored), {"reasoning_effort": thoughts.place, **prefill})


def _prompt(
    fields: BodyFields, data: Mapping[str, Any], request_id: str, ignored: list[str]
) -> tuple[GenerationRequest, Thoughts]:
    """Read what decides the prompt, and the form of the answer."""
    fields.given(data, "cache_control")
    messages = read_conversation(data, ignored)
    tools, choice, parallel = read_tools(data, ignored)
    thoughts = read_thoughts(data, ignored)
    check_context_management(data, ignored)
    request = GenerationRequest(
        request_id=request_id,
        messages=messages,
        chat_template_kwargs=fields.given(data, "chat_template_kwargs") or {},
        constraint=read_format(data, ignored),
        reasoning_effort=thoughts.effort,
        tools=tools,
        parallel_tool_calls=parallel,
        tool_choice=choice,
    )
    return request, thoughts


def fitted(parsed: ParsedRequest, info: ModelInfo) -> ParsedRequest:
    """Leave out a limit on thoughts for a model that has none, and name it: clients ask all models alike."""
    [request] = parsed.generations
    if info.reasoning is not None or "thinking_budget" not in request.sampling:
        return parsed
    sampling = {name: value for name, value in request.sampling.items() if name != "thinking_budget"}
    request = dataclasses.replace(request, sampling=sampling)
    return dataclasses.replace(parsed, generations=(request,), ignored=(*parsed.ignored, "thinking.budget_tokens"))


def own_name(name: str | None) -> str | None:
    """Return where a body has what the engine calls `name`."""
    if name is None:
        return None
    name = _SCHEMA.sub(r"\1.input_schema", _TOOL.sub(r"\1.\2", name))
    return _NAMES.get(name, name)
