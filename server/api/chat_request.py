"""Reads the body of a chat completion: bytes → a `ParsedRequest` for the engine.

Checks every type and refuses every field that this build cannot honour. Ranges of sampling fields are checked in
`engine.SamplingParams`, for scripts and the server alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from engine import GenerationRequest, InvalidParameter, ModelNotFound, Unsupported
from server.api.chat_messages import read_messages
from server.api.fields import FIELDS, KNOWN, MAX_SALT, given, refuse_unsupported, sampling
from server.api.formats import read_constraint
from server.api.parsing import FLAG, STRING, ParsedRequest, optional, required, typed
from server.api.tools import read_tools
from server.json_text import load_body

MAX_MODEL: Final = 512
"""Characters of a model's name. No model here has a longer one."""
STREAM_OPTIONS: Final = ("include_usage", "continuous_usage_stats", "include_obfuscation")


def parse(raw: bytes, request_id: str) -> ParsedRequest:
    """Parse and check a body.

    Raises:
        InvalidFormat: not JSON, not an object, a field missing or of the wrong type.
        InvalidParameter: right type, wrong value; Unsupported: a field this build cannot honour.
    """
    data = load_body(raw)
    ignored = [name for name in data if name not in KNOWN]
    model = required(data, "model", FIELDS["model"].kind)
    if len(model) > MAX_MODEL:
        raise ModelNotFound(f"the model {model[:100]!r}… does not exist.", param="model")
    messages = read_messages(data, ignored)
    tools, choice = read_tools(data, ignored)
    refuse_unsupported(data)
    stream = given(data, "stream") or False
    generation = GenerationRequest(
        request_id=request_id,
        messages=messages,
        sampling=sampling(data),
        chat_template_kwargs=given(data, "chat_template_kwargs") or {},
        constraint=read_constraint(data, ignored),
        reasoning_effort=given(data, "reasoning_effort"),
        tools=tools,
        parallel_tool_calls=given(data, "parallel_tool_calls") is not False,
        tool_choice=choice,
        cache_salt=_cache_salt(data),
    )
    include_usage = _stream_options(data, stream, ignored)
    _check_annotations(data)
    return ParsedRequest(model, generation, stream, include_usage, tuple(ignored))


def _cache_salt(data: Mapping[str, Any]) -> str:
    salt = given(data, "cache_salt")
    if salt is not None and not 1 <= len(salt) <= MAX_SALT:
        raise InvalidParameter(
            f"cache_salt must have between 1 and {MAX_SALT} characters, not {len(salt)}.", param="cache_salt"
        )
    return salt or ""


def _stream_options(data: Mapping[str, Any], stream: bool, ignored: list[str]) -> bool:
    """Read whether the stream ends with the usage."""
    options = given(data, "stream_options")
    if options is None:
        return False
    if not stream:
        raise InvalidParameter("stream_options is only allowed with stream: true.", param="stream_options")
    include_usage, *unsupported = (optional(options, name, FLAG, "stream_options.") for name in STREAM_OPTIONS)
    for name, value in zip(STREAM_OPTIONS[1:], unsupported, strict=True):
        if value:
            name = f"stream_options.{name}"
            raise Unsupported(f"{name} is not supported by this build.", param=name)
    ignored += [f"stream_options.{key}" for key in options if key not in STREAM_OPTIONS]
    return bool(include_usage)


def _check_annotations(data: Mapping[str, Any]) -> None:
    """Check `user` and `metadata`. They are for the client's own records and change nothing."""
    given(data, "user")
    for key, value in (given(data, "metadata") or {}).items():
        typed(value, f"metadata.{key}", STRING)
