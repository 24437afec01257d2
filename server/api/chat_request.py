"""A request body, from bytes to what the engine understands. Knows every field of the API; knows no range twice.

Types are checked here, all of them; ranges of sampling fields in `engine.SamplingParams`, for scripts and server alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine import (
    ChatMessage,
    Constraint,
    GenerationRequest,
    InvalidFormat,
    InvalidParameter,
    ModelNotFound,
    Tool,
    ToolCall,
    ToolChoice,
    Unsupported,
)
from server.json_text import excess_of, kind_of, load_body, load_text, shown

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
MAX_NAME: Final = 256

MAX_MODEL: Final = 512
"""Characters of the name of a model. A longer one is none of ours."""
MAX_MESSAGES: Final = 10_000
MAX_PARTS: Final = 10_000
"""Of all messages together."""
MAX_BIASES: Final = 16_384
"""Entries of `logit_bias`. Who wants to forbid most of a vocabulary has grammars for it."""

Kind = tuple[tuple[type, ...], str]
FLAG: Final[Kind] = ((bool,), "true or false")
INTEGER: Final[Kind] = ((int,), "an integer")
NUMBER: Final[Kind] = ((int, float), "a number")
STRING: Final[Kind] = ((str,), "a string")
LIST: Final[Kind] = ((list,), "a list")
OBJECT: Final[Kind] = ((dict,), "an object")

SAMPLING: Final[Mapping[str, Kind]] = {
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": INTEGER,
    "min_p": NUMBER,
    "n": INTEGER,
    "seed": INTEGER,
    "stop": ((str, list), "a string or a list of strings"),
    "stop_token_ids": ((list,), "a list of integers"),
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "repetition_penalty": NUMBER,
    "logit_bias": OBJECT,
    "logprobs": FLAG,
    "top_logprobs": INTEGER,
    "logprobs_mode": STRING,
    "min_tokens": INTEGER,
    "ignore_eos": FLAG,
    "return_token_ids": FLAG,
    "thinking_budget": INTEGER,
}
"""Handed to the engine under the same names. Types here, so that a wrong one is never taken for a wrong value."""

HANDLED: Final = frozenset(
    {
        "model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "chat_template_kwargs",
        "user", "metadata", "response_format", "reasoning_effort", "guided_json", "guided_regex", "guided_choice",
        "guided_grammar", "tools", "tool_choice", "parallel_tool_calls", "cache_salt",
    }
)  # fmt: skip

UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    # field: the values that mean what happens anyway; null always does
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

KNOWN: Final = HANDLED | SAMPLING.keys() | UNSUPPORTED.keys()

MESSAGE_FIELDS: Final = frozenset({"role", "content", "name"})
THOUGHTS: Final = ("reasoning_content", "reasoning")
"""What clients call an assistant's thoughts when they send them back."""
UNSUPPORTED_MESSAGE_FIELDS: Final = ("function_call", "audio", "refusal")
CALL_FIELDS: Final = ("tool_calls", "tool_call_id")
TOOL_FIELDS: Final = ("name", "description", "parameters", "strict")
TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_TOOLS: Final = 128
MAX_CALL_ID: Final = 256
FORMAT_FIELDS: Final = ("name", "description", "schema", "strict")
FORMAT_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_CHOICES: Final = 1024
MAX_SALT: Final = 256
PART_FIELDS: Final = frozenset({"type", "text"})
STREAM_OPTIONS: Final = ("include_usage", "continuous_usage_stats", "include_obfuscation")


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
    data = load_body(raw)
    ignored = [name for name in data if name not in KNOWN]
    model = _required(data, "model", STRING)
    if len(model) > MAX_MODEL:
        raise ModelNotFound(f"the model {model[:100]!r}… does not exist.", param="model")
    messages = _messages(data, ignored)
    tools, choice = _tools(data, ignored)
    for name, neutral in UNSUPPORTED.items():
        value = data.get(name)
        # `is` first: 1 == True in Python, not in JSON.
        if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
            raise Unsupported(f"{name} is not supported by this build.", param=name)
    stream = _optional(data, "stream", FLAG) or False
    generation = GenerationRequest(
        request_id=request_id,
        messages=messages,
        sampling=_sampling(data),
        chat_template_kwargs=_optional(data, "chat_template_kwargs", OBJECT) or {},
        constraint=_constraint(data, ignored),
        reasoning_effort=_optional(data, "reasoning_effort", STRING),
        tools=tools,
        parallel_tool_calls=_optional(data, "parallel_tool_calls", FLAG) is not False,
        tool_choice=choice,
        cache_salt=_cache_salt(data),
    )
    include_usage = _stream_options(data, stream, ignored)
    _annotations(data)
    return ChatRequest(model, generation, stream, include_usage, tuple(ignored))


def _cache_salt(data: Mapping[str, Any]) -> str:
    salt = _optional(data, "cache_salt", STRING)
    if salt is not None and not 1 <= len(salt) <= MAX_SALT:
        raise InvalidParameter(
            f"cache_salt must have between 1 and {MAX_SALT} characters, not {len(salt)}.", param="cache_salt"
        )
    return salt or ""


def _typed(value: Any, name: str, kind: Kind) -> Any:
    types, words = kind
    if type(value) not in types:  # exactly: True is an int to isinstance
        raise InvalidFormat(f"{name} must be {words}, not {kind_of(value)}{shown(value)}.", param=name)
    return value


def _required(data: Mapping[str, Any], name: str, kind: Kind, at: str = "") -> Any:
    """A field that must be there. `at`: what stands before its name in messages, `messages.0.`."""
    if name not in data:
        raise InvalidFormat(f"{at}{name} is required.", param=f"{at}{name}", code="missing_field")
    return _typed(data[name], f"{at}{name}", kind)


def _optional(data: Mapping[str, Any], name: str, kind: Kind, at: str = "") -> Any:
    """A field that may be absent or null."""
    value = data.get(name)
    return None if value is None else _typed(value, f"{at}{name}", kind)


def _at_most(limit: int, count: int, name: str, things: str) -> None:
    if count > limit:
        raise InvalidParameter(f"{name} may hold at most {limit} {things}, not {count}.", param=name)


def _messages(data: Mapping[str, Any], ignored: list[str]) -> tuple[ChatMessage, ...]:
    messages = _required(data, "messages", LIST)
    if not messages:
        raise InvalidParameter("messages must hold at least one message, not 0.", param="messages")
    _at_most(MAX_MESSAGES, len(messages), "messages", "messages")
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    parts = sum(len(content) for content in contents if isinstance(content, list))
    _at_most(MAX_PARTS, parts, "messages", "parts")
    turns = tuple(_message(message, f"messages.{i}", ignored) for i, message in enumerate(messages))
    called: set[str] = set()
    for i, turn in enumerate(turns):
        if turn.tool_call_id is not None and turn.tool_call_id not in called:
            raise InvalidParameter(
                f"messages.{i}.tool_call_id: no call before it has the id {turn.tool_call_id[:100]!r}.",
                param=f"messages.{i}.tool_call_id",
            )
        called.update(call.id for call in turn.tool_calls)
    _check_arguments(turns)
    return turns


def _check_arguments(turns: tuple[ChatMessage, ...]) -> None:
    """The arguments of all calls are JSON objects. Their values are counted together: each is a text of its own."""
    if excess := excess_of(call.arguments for turn in turns for call in turn.tool_calls):
        raise InvalidParameter(
            f"The arguments in messages hold more than {excess}; at most that many are allowed.", param="messages"
        )
    for i, turn in enumerate(turns):
        for j, call in enumerate(turn.tool_calls):
            try:
                whole = isinstance(load_text(call.arguments), dict)
            except ValueError:
                whole = False
            if not whole:
                at = f"messages.{i}.tool_calls.{j}.function.arguments"
                raise InvalidParameter(f"{at} must be a JSON object as text, not {call.arguments[:100]!r}.", param=at)


def _message(message: Any, at: str, ignored: list[str]) -> ChatMessage:
    _typed(message, at, OBJECT)
    role = _required(message, "role", STRING, f"{at}.")
    for name in UNSUPPORTED_MESSAGE_FIELDS:
        if message.get(name) not in (None, []):
            raise Unsupported(f"{at}.{name} is not supported by this build.", param=f"{at}.{name}")
    if role == "function":
        raise Unsupported(f"{at}.role: {role!r} is not supported by this build.", param=f"{at}.role")
    if role not in ROLES:
        raise InvalidParameter(f"{at}.role must be one of {', '.join(ROLES)}, not {role[:100]!r}.", param=f"{at}.role")
    name = _optional(message, "name", STRING, f"{at}.")
    if name is not None and len(name) > MAX_NAME:
        raise InvalidParameter(
            f"{at}.name may have at most {MAX_NAME} characters, not {len(name)}.", param=f"{at}.name"
        )
    thoughts = [_optional(message, key, STRING, f"{at}.") for key in THOUGHTS] if role == "assistant" else []
    known = MESSAGE_FIELDS.union(UNSUPPORTED_MESSAGE_FIELDS, CALL_FIELDS, THOUGHTS if role == "assistant" else ())
    ignored += [f"{at}.{key}" for key in message if key not in known]
    reasoning = next((text for text in thoughts if text), None)
    calls = _calls(message, at, role, ignored)
    answers = _answered(message, at, role)
    return ChatMessage(role, _content(message, at, bool(calls), ignored), name, reasoning, calls, answers)


def _calls(message: Mapping[str, Any], at: str, role: str, ignored: list[str]) -> tuple[ToolCall, ...]:
    """An assistant's calls, as it made them."""
    at = f"{at}.tool_calls"
    given = _typed(message["tool_calls"], at, LIST) if message.get("tool_calls") is not None else []
    if given and role != "assistant":
        raise InvalidParameter(f"{at}: only an assistant calls tools, not a {role}.", param=at)
    calls = []
    for i, call in enumerate(given):
        here = f"{at}.{i}."
        _typed(call, here[:-1], OBJECT)
        kind = call.get("type", "function")
        if kind != "function":
            raise InvalidParameter(f"{here}type must be function, not {kind!r:.100}.", param=f"{here}type")
        function = _required(call, "function", OBJECT, here)
        arguments = _required(function, "arguments", STRING, f"{here}function.")
        ignored += [f"{here}{key}" for key in call if key not in ("id", "type", "function", "index")]
        found = ToolCall(_call_id(call, "id", here), _name(function, f"{here}function."), arguments or "{}")
        calls.append(found)
    return tuple(calls)


def _answered(message: Mapping[str, Any], at: str, role: str) -> str | None:
    """The id of the call that a tool's turn answers."""
    if role == "tool":
        return _call_id(message, "tool_call_id", f"{at}.")
    if message.get("tool_call_id") is not None:
        raise InvalidParameter(f"{at}.tool_call_id: only a tool answers a call.", param=f"{at}.tool_call_id")
    return None


def _call_id(data: Mapping[str, Any], name: str, at: str) -> str:
    found: str = _required(data, name, STRING, at)
    if not 1 <= len(found) <= MAX_CALL_ID:
        raise InvalidParameter(
            f"{at}{name} must have 1 to {MAX_CALL_ID} characters, not {len(found)}.", param=f"{at}{name}"
        )
    return found


def _name(function: Mapping[str, Any], at: str) -> str:
    name: str = _required(function, "name", STRING, at)
    if not TOOL_NAME.fullmatch(name):
        raise InvalidParameter(
            f"{at}name must be 1 to 64 of the characters A-Z a-z 0-9 _ -, not {name[:100]!r}.", param=f"{at}name"
        )
    return name


def _tools(data: Mapping[str, Any], ignored: list[str]) -> tuple[tuple[Tool, ...], ToolChoice]:
    """Read the tools that the model may call, none with `tool_choice: none`, and whether it must call one."""
    given = _optional(data, "tools", LIST) or []
    _at_most(MAX_TOOLS, len(given), "tools", "definitions")
    tools = [_tool(tool, f"tools.{i}.", ignored) for i, tool in enumerate(given)]
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidParameter(
                f"tools.{i}.function.name: {name!r} is there twice.", param=f"tools.{i}.function.name"
            )
    _optional(data, "parallel_tool_calls", FLAG)
    choice = data.get("tool_choice")
    if choice is None or choice == "auto":
        return tuple(tools), ToolChoice()
    if choice == "none":
        return (), ToolChoice()
    return tuple(tools), _chosen(choice, names, ignored)


def _tool(tool: Any, at: str, ignored: list[str]) -> Tool:
    _typed(tool, at[:-1], OBJECT)
    kind = _required(tool, "type", STRING, at)
    if kind != "function":
        raise Unsupported(f"{at}type: only function is supported, not {kind[:100]!r}.", param=f"{at}type")
    function = _required(tool, "function", OBJECT, at)
    here = f"{at}function."
    found = Tool(
        _name(function, here),
        _optional(function, "description", STRING, here),
        _optional(function, "parameters", OBJECT, here),
        bool(_optional(function, "strict", FLAG, here)),
    )
    ignored += [f"{at}{key}" for key in tool if key not in ("type", "function")]
    ignored += [f"{here}{key}" for key in function if key not in TOOL_FIELDS]
    return found


def _chosen(choice: Any, names: list[str], ignored: list[str]) -> ToolChoice:
    """Read a `tool_choice` that demands a call: `required`, or an object that names the function."""
    _typed(choice, "tool_choice", ((str, dict), "a string or an object"))
    if isinstance(choice, str):
        if choice != "required":
            raise InvalidParameter(
                f"tool_choice must be none, auto, required or a function, not {choice[:100]!r}.", param="tool_choice"
            )
        if not names:
            raise InvalidParameter("tool_choice: required needs at least one tool.", param="tool_choice")
        return ToolChoice("required")
    else:
        kind = _optional(choice, "type", STRING, "tool_choice.")
        if kind not in (None, "function"):
            raise Unsupported(
                f"tool_choice.type: only function is supported, not {kind[:100]!r}.", param="tool_choice.type"
            )
        ignored += [f"tool_choice.{key}" for key in choice if key not in ("type", "function")]
        function = _required(choice, "function", OBJECT, "tool_choice.")
        ignored += [f"tool_choice.function.{key}" for key in function if key != "name"]
        name = _required(function, "name", STRING, "tool_choice.function.")
        if name not in names:
            at = "tool_choice.function.name"
            raise InvalidParameter(f"{at}: {name[:100]!r} is not among the tools.", param=at)
        return ToolChoice("function", name)


def _content(message: Mapping[str, Any], at: str, calls: bool, ignored: list[str]) -> str:
    """The text of a message; parts are joined as they are, nothing between them."""
    at = f"{at}.content"
    if calls and message.get("content") is None:
        return ""
    if "content" not in message:
        raise InvalidFormat(f"{at} is required.", param=at, code="missing_field")
    content = message["content"]
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidFormat(f"{at} may be null only in an assistant's message with tool calls.", param=at)
    if not _typed(content, at, ((list,), "a string or a list of parts")):
        raise InvalidParameter(f"{at} must hold at least one part.", param=at)
    return "".join(_part(part, f"{at}.{i}", ignored) for i, part in enumerate(content))


def _part(part: Any, at: str, ignored: list[str]) -> str:
    kind = _required(_typed(part, at, OBJECT), "type", STRING, f"{at}.")
    if kind != "text":
        raise Unsupported(
            f"{at}: a part of type {kind[:100]!r} is not supported; this server serves text only, no images, audio or "
            "files.",
            param=f"{at}.type",
        )
    text: str = _required(part, "text", STRING, f"{at}.")
    ignored += [f"{at}.{key}" for key in part if key not in PART_FIELDS]
    return text


def _sampling(data: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling fields that were given; `max_completion_tokens` wins over `max_tokens`."""
    given = {name: _typed(data[name], name, kind) for name, kind in SAMPLING.items() if data.get(name) is not None}
    _at_most(MAX_BIASES, len(given.get("logit_bias", ())), "logit_bias", "entries")
    for name in ("max_tokens", "max_completion_tokens"):
        value = _optional(data, name, INTEGER)
        if value is not None:
            if value < 1:  # here, because the engine knows only one of the two names, and one wins over the other
                raise InvalidParameter(f"{name} must be at least 1, not {value}.", param=name)
            given["max_tokens"] = value
    return given


def _constraint(data: Mapping[str, Any], ignored: list[str]) -> Constraint | None:
    """What the reply must be, from whichever one of the fields asks for it."""
    found = {name: c for name, c in _constraints(data, ignored) if c is not None}
    if len(found) > 1:
        names = list(found)
        raise InvalidParameter(f"{names[0]} and {names[1]} cannot be combined.", param=names[1])
    return next(iter(found.values()), None)


def _constraints(data: Mapping[str, Any], ignored: list[str]) -> Iterator[tuple[str, Constraint | None]]:
    yield "response_format", _response_format(data, ignored)
    schema = _optional(data, "guided_json", ((dict, str), "an object, or its text"))
    if isinstance(schema, str):
        try:
            schema = load_text(schema)
        except ValueError as error:
            raise InvalidParameter(f"guided_json is not JSON: {error}.", param="guided_json") from None
        _typed(schema, "guided_json", OBJECT)
    if schema is not None:
        yield "guided_json", Constraint("json", schema, param="guided_json")
    for name, kind in (("guided_regex", "regex"), ("guided_grammar", "grammar")):
        text = _optional(data, name, STRING)
        if text is not None:
            if not text:
                raise InvalidParameter(f"{name} must not be empty.", param=name)
            yield name, Constraint(kind, text, param=name)  # type: ignore[arg-type]
    choices = _optional(data, "guided_choice", LIST)
    if choices is not None:
        if not 1 <= len(choices) <= MAX_CHOICES:
            raise InvalidParameter(
                f"guided_choice takes 1 to {MAX_CHOICES} texts, not {len(choices)}.", param="guided_choice"
            )
        texts = [_typed(text, f"guided_choice.{i}", STRING) for i, text in enumerate(choices)]
        if "" in texts:
            raise InvalidParameter("guided_choice must not hold an empty text.", param="guided_choice")
        yield "guided_choice", Constraint("choice", texts, param="guided_choice")


def _response_format(data: Mapping[str, Any], ignored: list[str]) -> Constraint | None:
    form = _optional(data, "response_format", OBJECT)
    if form is None:
        return None
    at = "response_format."
    kind = _required(form, "type", STRING, at)
    ignored += [f"{at}{key}" for key in form if key not in ("type", "json_schema")]
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json", {"type": "object"})
    if kind != "json_schema":
        raise InvalidParameter(
            f"response_format.type must be text, json_object or json_schema, not {kind[:100]!r}.", param=f"{at}type"
        )
    inner = _required(form, "json_schema", OBJECT, at)
    at += "json_schema."
    name = _required(inner, "name", STRING, at)
    if not FORMAT_NAME.fullmatch(name):
        raise InvalidParameter(
            f"{at}name must be 1 to 64 of the characters A-Z a-z 0-9 _ -, not {name[:100]!r}.", param=f"{at}name"
        )
    _optional(inner, "description", STRING, at)
    schema = _required(inner, "schema", OBJECT, at)
    ignored += [f"{at}{key}" for key in inner if key not in FORMAT_FIELDS]
    return Constraint("json", schema, bool(_optional(inner, "strict", FLAG, at)), f"{at}schema")


def _stream_options(data: Mapping[str, Any], stream: bool, ignored: list[str]) -> bool:
    options = _optional(data, "stream_options", OBJECT)
    if options is None:
        return False
    if not stream:
        raise InvalidParameter("stream_options is only allowed with stream: true.", param="stream_options")
    include_usage, *unsupported = (_optional(options, name, FLAG, "stream_options.") for name in STREAM_OPTIONS)
    for name, value in zip(STREAM_OPTIONS[1:], unsupported, strict=True):
        if value:
            name = f"stream_options.{name}"
            raise Unsupported(f"{name} is not supported by this build.", param=name)
    ignored += [f"stream_options.{key}" for key in options if key not in STREAM_OPTIONS]
    return bool(include_usage)


def _annotations(data: Mapping[str, Any]) -> None:
    """`user` and `metadata` are for the client's own books: checked, and without effect on the reply."""
    _optional(data, "user", STRING)
    for key, value in (_optional(data, "metadata", OBJECT) or {}).items():
        _typed(value, f"metadata.{key}", STRING)


def header_value(names: tuple[str, ...]) -> str:
    """Field names for a response header: printable ASCII, bounded, whatever a hostile client called them."""
    shown = [re.sub(r"[^!-+\--~]", "?", name[:64]) for name in names[:32]]
    return ", ".join([*shown, "..."] if len(names) > 32 else shown)
