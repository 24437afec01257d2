"""A request body, from bytes to what the engine understands. Knows every field of the API; knows no range twice.

Types of the fields that steer this server are checked here; sampling fields are handed on as they were given and
checked by `engine.SamplingParams`, for scripts and server alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine import ChatMessage, GenerationRequest, InvalidFormat, InvalidParameter, Unsupported

ROLES: Final = ("system", "developer", "user", "assistant")
MAX_NAME: Final = 256

SAMPLING: Final = frozenset(
    {
        "temperature", "top_p", "n", "stop", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "logprobs",
        "top_logprobs", "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids",
        "logprobs_mode", "return_token_ids",
    }
)  # fmt: skip
"""Handed to the engine under the same names."""

HANDLED: Final = frozenset(
    {
        "model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "chat_template_kwargs",
        "user", "metadata",
    }
)  # fmt: skip

UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    # field: the values that mean what happens anyway; null always does
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "response_format": ({"type": "text"},),
    "reasoning_effort": (),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "web_search_options": (),
    "verbosity": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "grammar": (),
    "prompt_logprobs": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": (),
    "bad_words": ([],),
    "skip_special_tokens": (True,),
    "thinking": (),
}
"""Known to clients, not to this build: refused by name, never ignored."""

MESSAGE_FIELDS: Final = frozenset({"role", "content", "name"})
UNSUPPORTED_MESSAGE_FIELDS: Final = ("tool_calls", "tool_call_id", "function_call", "audio")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked body. `ignored`: dotted names of fields that nobody knows."""

    model: str
    generation: GenerationRequest
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...]


def parse(raw: bytes, request_id: str) -> ChatRequest:
    """Check a body.

    Raises:
        InvalidFormat: not JSON, not an object, a field missing or of the wrong type.
        InvalidParameter: right type, wrong value; Unsupported: a field this build cannot honour.
    """
    data = _load(raw)
    ignored = [name for name in data if name not in SAMPLING | HANDLED | UNSUPPORTED.keys()]
    model = _required(data, "model", str, "a string")
    messages = _messages(data, ignored)
    for name, neutral in UNSUPPORTED.items():
        value = data.get(name)
        # `is` first: 1 == True in Python, not in JSON.
        if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
            raise Unsupported(f"{name} is not supported by this build.", param=name)
    stream = _optional(data, "stream", bool, "true or false") or False
    generation = GenerationRequest(
        request_id=request_id,
        messages=messages,
        sampling=_sampling(data),
        chat_template_kwargs=_optional(data, "chat_template_kwargs", dict, "an object") or {},
    )
    include_usage = _stream_options(data, stream, ignored)
    _annotations(data)
    return ChatRequest(model, generation, stream, include_usage, tuple(ignored))


def _load(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidFormat(f"The body is not UTF-8: byte {error.start} is {raw[error.start]:#04x}.") from None
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidFormat("The body is nested too deeply.") from None
    except ValueError as error:
        raise InvalidFormat(f"The body is not JSON: {error}.") from None
    if not isinstance(data, dict):
        raise InvalidFormat(f"The body must be a JSON object, not {_kind(data)}.")
    if re.search(rb"\\u[dD][89a-fA-F]", raw):
        _check_surrogates(data)
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_surrogates(data: dict[str, Any]) -> None:
    """JSON can spell half of a surrogate pair; no text can hold it."""
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidFormat(f"The body holds half a surrogate pair: {error.object[error.start]!a}.") from None


def _kind(value: Any) -> str:
    """What JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _typed(value: Any, name: str, kind: type, words: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InvalidFormat(f"{name} must be {words}, not {_kind(value)}.", param=name)
    return value


def _required(data: Mapping[str, Any], name: str, kind: type, words: str) -> Any:
    if name not in data:
        raise InvalidFormat(f"{name} is required.", param=name, code="missing_field")
    return _typed(data[name], name, kind, words)


def _optional(data: Mapping[str, Any], name: str, kind: type, words: str) -> Any:
    value = data.get(name)
    return None if value is None else _typed(value, name, kind, words)


def _messages(data: Mapping[str, Any], ignored: list[str]) -> tuple[ChatMessage, ...]:
    messages = _required(data, "messages", list, "a list of messages")
    if not messages:
        raise InvalidParameter("messages must hold at least one message, not 0.", param="messages")
    return tuple(_message(message, f"messages.{i}", ignored) for i, message in enumerate(messages))


def _message(message: Any, at: str, ignored: list[str]) -> ChatMessage:
    _typed(message, at, dict, "an object")
    if "role" not in message:
        raise InvalidFormat(f"{at}.role is required.", param=f"{at}.role", code="missing_field")
    role = _typed(message["role"], f"{at}.role", str, "a string")
    for name in UNSUPPORTED_MESSAGE_FIELDS:
        if message.get(name) not in (None, []):
            raise Unsupported(f"{at}.{name} is not supported by this build.", param=f"{at}.{name}")
    if role in ("tool", "function"):
        raise Unsupported(f"{at}.role: {role!r} is not supported by this build.", param=f"{at}.role")
    if role not in ROLES:
        raise InvalidParameter(f"{at}.role must be one of {', '.join(ROLES)}, not {role[:100]!r}.", param=f"{at}.role")
    name = message.get("name")
    if name is not None and len(_typed(name, f"{at}.name", str, "a string")) > MAX_NAME:
        raise InvalidParameter(
            f"{at}.name may have at most {MAX_NAME} characters, not {len(name)}.", param=f"{at}.name"
        )
    ignored += [f"{at}.{key}" for key in message if key not in MESSAGE_FIELDS and key not in UNSUPPORTED_MESSAGE_FIELDS]
    return ChatMessage(role, _content(message, at), name)


def _content(message: Mapping[str, Any], at: str) -> str:
    """The text of a message; parts are joined as they are, nothing between them."""
    at = f"{at}.content"
    if "content" not in message:
        raise InvalidFormat(f"{at} is required.", param=at, code="missing_field")
    content = message["content"]
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidFormat(f"{at} may be null only in an assistant's message with tool calls.", param=at)
    if not isinstance(content, list):
        raise InvalidFormat(f"{at} must be a string or a list of parts, not {_kind(content)}.", param=at)
    if not content:
        raise InvalidParameter(f"{at} must hold at least one part.", param=at)
    return "".join(_part(part, f"{at}.{i}") for i, part in enumerate(content))


def _part(part: Any, at: str) -> str:
    _typed(part, at, dict, "an object")
    kind = part.get("type")
    if not isinstance(kind, str):
        raise InvalidFormat(f"{at}.type must be a string, not {_kind(kind)}.", param=f"{at}.type")
    if kind != "text":
        raise Unsupported(f"{at}: a part of type {kind[:100]!r} is not supported; only text is.", param=f"{at}.type")
    if "text" not in part:
        raise InvalidFormat(f"{at}.text is required.", param=f"{at}.text", code="missing_field")
    text: str = _typed(part["text"], f"{at}.text", str, "a string")
    return text


def _sampling(data: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling fields that were given; `max_completion_tokens` wins over `max_tokens`."""
    given = {name: data[name] for name in SAMPLING if data.get(name) is not None}
    for name in ("max_tokens", "max_completion_tokens"):
        value = data.get(name)
        if value is not None:
            _typed(value, name, int, "an integer")
            if value < 1:
                raise InvalidParameter(f"{name} must be at least 1, not {value}.", param=name)
            given["max_tokens"] = value
    min_tokens = given.get("min_tokens")
    if isinstance(min_tokens, int) and "max_tokens" not in given and min_tokens > 2**31:
        raise InvalidParameter(f"min_tokens must be at most {2**31}, not {min_tokens}.", param="min_tokens")
    return given


def _stream_options(data: Mapping[str, Any], stream: bool, ignored: list[str]) -> bool:
    options = _optional(data, "stream_options", dict, "an object")
    if options is None:
        return False
    if not stream:
        raise InvalidParameter("stream_options is only allowed with stream: true.", param="stream_options")
    if options.get("continuous_usage_stats"):
        name = "stream_options.continuous_usage_stats"
        raise Unsupported(f"{name} is not supported by this build.", param=name)
    known = {"include_usage", "continuous_usage_stats", "include_obfuscation"}
    ignored += [f"stream_options.{key}" for key in options if key not in known]
    value = options.get("include_usage")
    if value is not None and not isinstance(value, bool):
        name = "stream_options.include_usage"
        raise InvalidFormat(f"{name} must be true or false, not {_kind(value)}.", param=name)
    return bool(value)


def _annotations(data: Mapping[str, Any]) -> None:
    """`user` and `metadata` are for the client's own books: checked, and without effect on the reply."""
    _optional(data, "user", str, "a string")
    for key, value in (_optional(data, "metadata", dict, "an object") or {}).items():
        if not isinstance(value, str):
            raise InvalidFormat(f"metadata.{key} must be a string, not {_kind(value)}.", param=f"metadata.{key}")


def header_value(names: tuple[str, ...]) -> str:
    """Field names for a response header: printable ASCII, bounded, whatever a hostile client called them."""
    shown = [re.sub(r"[^!-+\--~]", "?", name[:64]) for name in names[:32]]
    return ", ".join(shown) + (", …".encode("ascii", "replace").decode() if len(names) > 32 else "")
