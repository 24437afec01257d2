"""Reads the body of a chat completion: bytes → a `ParsedRequest` for the engine.

Checks every type and refuses every field that this build cannot honour. Ranges of sampling fields are checked in
`engine.SamplingParams`, for scripts and the server alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine import GenerationRequest, InvalidParameter
from server.api.chat_messages import read_content, read_messages
from server.api.common_fields import read_common, read_ending, read_model, read_token_ids
from server.api.fields import CHAT
from server.api.formats import read_constraint
from server.api.parsing import STRING, ParsedRequest, required
from server.api.tools import read_tools
from server.json_text import load_body


def parse(raw: bytes, request_id: str) -> ParsedRequest:
    """Parse and check a body.

    Raises:
        InvalidFormat: not JSON, not an object, a field missing or of the wrong type.
        InvalidParameter: right type, wrong value; Unsupported: a field this build cannot honour.
    """
    data = load_body(raw)
    model = read_model(CHAT, data)
    nested: list[str] = []
    messages = read_messages(data, nested)
    tools, choice = read_tools(data, nested)
    common = read_common(CHAT, data)
    goes_on, again = read_ending(CHAT, data)
    generation = GenerationRequest(
        request_id=request_id,
        messages=messages,
        add_generation_prompt=again,
        continue_final_message=goes_on,
        continue_token_ids=read_token_ids(CHAT, data, "continue_token_ids"),
        sampling=CHAT.sampling(data),
        chat_template_kwargs=CHAT.given(data, "chat_template_kwargs") or {},
        constraint=read_constraint(CHAT, data, nested),
        reasoning_effort=CHAT.given(data, "reasoning_effort"),
        tools=tools,
        parallel_tool_calls=CHAT.given(data, "parallel_tool_calls") is not False,
        tool_choice=choice,
        cache_salt=common.cache_salt,
        prediction=_prediction(data, nested),
    )
    ignored = (*common.ignored, *nested)
    return ParsedRequest(model, (generation,), common.stream, common.include_usage, ignored, receipt=common.receipt)


def _prediction(data: Mapping[str, Any], ignored: list[str]) -> str | None:
    """Read the text that the answer may hold much of."""
    given = CHAT.given(data, "prediction")
    if given is None:
        return None
    kind = required(given, "type", STRING, "prediction.")
    if kind != "content":
        raise InvalidParameter(f"prediction.type must be content, not {kind[:100]!r}.", param="prediction.type")
    ignored += [f"prediction.{key}" for key in given if key not in ("type", "content")]
    return read_content(given, "prediction.content", ignored)
