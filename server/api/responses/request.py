"""Reads the body of `POST /responses`: bytes → a `ParsedRequest` for the engine.

Checks every type and refuses every field that this build cannot honour, by the field's own path. Ranges of sampling
fields are checked in `engine.SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from engine import GenerationRequest
from server.api.common_fields import read_common, read_model
from server.api.parsing import ParsedRequest
from server.api.responses.fields import ENCRYPTED, LOGPROBS, RESPONSES
from server.api.responses.items import read_input
from server.api.responses.options import read_effort, read_form, read_include
from server.api.responses.tools import read_tools
from server.json_text import load_body

__all__ = ["own_name", "parse"]

_NAMES: Final[Mapping[str, str]] = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
_ECHOED: Final = (
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning",
    "safety_identifier",
    "service_tier",
    "text",
    "tool_choice",
    "tools",
    "user",
)
"""Fields that a response repeats."""


def own_name(name: str | None) -> str | None:
    """Return the name that a field of the engine has in this endpoint's bodies."""
    return None if name is None else _NAMES.get(name, name)


def parse(raw: bytes, request_id: str) -> ParsedRequest:
    """Parse and check a body.

    Raises:
        InvalidFormat: not JSON, not an object, a field missing or of the wrong type.
        InvalidParameter: right type, wrong value; Unsupported: a field this build cannot honour.
    """
    data = load_body(raw)
    model = read_model(RESPONSES, data)
    common = read_common(RESPONSES, data)
    nested: list[str] = []
    messages = read_input(data, nested)
    offered = read_tools(data, nested)
    include = read_include(data)
    for name in ("max_tool_calls", "safety_identifier", "client_metadata", "prompt_cache_key"):
        RESPONSES.given(data, name)
    for name in ("prompt_cache_retention", "prompt_cache_options"):
        RESPONSES.given(data, name)
    generation = GenerationRequest(
        request_id=request_id,
        messages=messages,
        sampling=_sampling(data, include),
        chat_template_kwargs=RESPONSES.given(data, "chat_template_kwargs") or {},
        constraint=read_form(data, nested),
        reasoning_effort=read_effort(data, nested),
        tools=offered.tools,
        parallel_tool_calls=RESPONSES.given(data, "parallel_tool_calls") is not False,
        tool_choice=offered.choice,
        cache_salt=common.cache_salt,
    )
    return ParsedRequest(
        model,
        (generation,),
        common.stream,
        common.include_usage,
        (*common.ignored, *nested),
        receipt=common.receipt,
        repeated={
            "fields": {name: data[name] for name in _ECHOED if data.get(name) is not None},
            "names": offered.names,
            "packed": ENCRYPTED in include,
        },
        places=offered.places,
    )


def _sampling(data: Mapping[str, Any], include: frozenset[str]) -> dict[str, Any]:
    """Read the sampling fields. Log-probabilities are asked for in `include`, or by a number of alternatives."""
    found = RESPONSES.sampling(data)
    if LOGPROBS in include or found.get("top_logprobs"):
        found["logprobs"] = True
    return found
