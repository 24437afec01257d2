"""Reads the bodies of `/tokenize` and `/detokenize`: bytes → what the engine is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine import GenerationRequest, InvalidFormat, InvalidParameter, Unsupported
from server.api.chat_messages import read_messages
from server.api.common_fields import read_ending, read_optional_model, read_token_ids
from server.api.fields import BodyFields
from server.api.tokenizer.fields import DETOKENIZE, TOKENIZE
from server.api.tools import read_tools
from server.json_text import load_body

__all__ = ["TextOf", "TokensOf", "parse_detokenize", "parse_tokenize"]


@dataclass(frozen=True, slots=True)
class TokensOf:
    """A checked body of `/tokenize`. `model`: None where it was left out; `places`: as in `ParsedRequest`."""

    model: str | None
    request: GenerationRequest
    strings: bool
    ignored: tuple[str, ...]
    places: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TextOf:
    """A checked body of `/detokenize`. `model`: None where it was left out."""

    model: str | None
    tokens: tuple[int, ...]
    ignored: tuple[str, ...]


def parse_tokenize(raw: bytes, request_id: str) -> TokensOf:
    """Parse and check a body.

    Raises:
        InvalidFormat: not JSON, not an object, a field missing or of the wrong type.
        InvalidParameter: right type, wrong value; Unsupported: a field this build cannot honour.
    """
    data, model, ignored = _read(TOKENIZE, raw)
    strings = bool(TOKENIZE.given(data, "return_token_strs"))
    prompt, special = TOKENIZE.given(data, "prompt"), TOKENIZE.given(data, "add_special_tokens")
    messages, variables = TOKENIZE.given(data, "messages"), TOKENIZE.given(data, "chat_template_kwargs")
    goes_on, again = read_ending(TOKENIZE, data)
    if prompt is None and messages is None:
        raise InvalidFormat("prompt or messages is required.", param="prompt", code="missing_field")
    if prompt is not None and messages is not None:
        raise InvalidParameter("prompt and messages cannot be combined.", param="messages")
    if messages is None:
        for name in ("tools", "chat_template_kwargs", "continue_final_message"):
            if TOKENIZE.given(data, name):
                raise InvalidParameter(f"{name} needs messages.", param=name)
        request = GenerationRequest(request_id=request_id, prompt=prompt, add_special_tokens=special is not False)
        return TokensOf(model, request, strings, tuple(ignored))
    if special:
        raise Unsupported(
            "add_special_tokens: messages are encoded with the tokens that the chat template writes, and no others.",
            param="add_special_tokens",
        )
    read, (tools, _) = read_messages(data, ignored), read_tools(data, ignored)
    request = GenerationRequest(
        request_id=request_id,
        messages=read,
        tools=tools,
        chat_template_kwargs=variables or {},
        add_generation_prompt=again,
        continue_final_message=goes_on,
    )
    return TokensOf(model, request, strings, tuple(ignored))


def parse_detokenize(raw: bytes, request_id: str) -> TextOf:
    """Parse and check a body.

    Raises:
        InvalidFormat: not JSON, not an object, a field missing or of the wrong type.
    """
    data, model, ignored = _read(DETOKENIZE, raw)
    tokens = read_token_ids(DETOKENIZE, data, "tokens")
    if tokens is None:
        raise InvalidFormat("tokens is required.", param="tokens", code="missing_field")
    return TextOf(model, tokens, tuple(ignored))


def _read(fields: BodyFields, raw: bytes) -> tuple[Mapping[str, Any], str | None, list[str]]:
    data = load_body(raw)
    fields.refuse_unsupported(data)
    return data, read_optional_model(fields, data), [name for name in data if name not in fields.known]
