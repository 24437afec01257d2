"""Reads the body of `POST /responses`: bytes → a `ParsedRequest` for the engine.

Checks every type and refuses every field that this build cannot honour, by the field's own path. Ranges of sampling
fields are checked in `engine.SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from engine import GenerationRequest, InvalidParameter
from server.api.common_fields import read_common, read_model
from server.api.parsing import ParsedRequest
from server.api.responses.fields import ENCRYPTED, LOGPROBS, RESPONSES
from server.api.responses.items import read_input
from server.api.responses.options import read_effort, read_form, read_include
from server.api.responses.tools import read_tools
from server.json_text import load_body, to_json

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

_RECORDS: Final = (
    "max_tool_calls",
    "safety_identifier",
    "client_metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
)
"""Fields of which only the type is checked: they change nothing."""

MOST_REPEATED: Final = 1 << 20
"""Characters of JSON that a response repeats: they are kept until it ends, and written three times in a stream."""


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
    sampling = _sampling(data, include)
    read = {name: RESPONSES.given(data, name) for name in _RECORDS}
    generation = GenerationRequest(
        request_id=request_id,
        messages=messages,
        sampling=sampling,
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
            "fields": _repeated({**data, **read, "max_output_tokens": sampling.get("max_tokens")}),
            "names": offered.names,
            "packed": ENCRYPTED in include,
        },
        places=offered.places,
    )


def _repeated(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the response repeats.

    Raises:
        InvalidParameter: they are too long together.
    """
    found = {name: data[name] for name in _ECHOED if data.get(name) is not None}
    sizes = {name: len(to_json(value)) for name, value in found.items()}
    if sum(sizes.values()) > MOST_REPEATED:
        name = max(sizes, key=lambda one: sizes[one])
        raise InvalidParameter(
            f"{name} has {sizes[name]} characters of JSON; fields that the response repeats may have at most "
            f"{MOST_REPEATED} together.",
            param=name,
        )
    return found


def _sampling(data: Mapping[str, Any], include: frozenset[str]) -> dict[str, Any]:
    """Read the sampling fields. Log-probabilities are asked for in `include`, or by a number of alternatives."""
    found = RESPONSES.sampling(data)
    if LOGPROBS in include or found.get("top_logprobs"):
        found["logprobs"] = True
    return found
