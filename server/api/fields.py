"""The fields of a request body: each is declared once, with its JSON type and its schema in the OpenAPI document.

The sampling fields come from `engine.SamplingParams`, with their types, ranges, defaults and descriptions; none of them
is named here. Which fields are known, which are refused and what the document says follow from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine import SAMPLING_FIELDS, SamplingField, Unsupported
from server.api.parsing import FLAG, INTEGER, LIST, OBJECT, STRING, Kind, at_most, optional, typed

MAX_NAME: Final = 256
"""Characters of a message's `name`."""
MAX_ENTRIES: Final = 16_384
"""Entries of a sampling field that is an object. A client that bans most of a vocabulary should send a grammar."""
MAX_TOOLS: Final = 128
MAX_CHOICES: Final = 1024
"""Texts of `guided_choice`."""
MAX_SALT: Final = 256
"""Characters of `cache_salt`."""
ROLES: Final = ("system", "developer", "user", "assistant", "tool")

_JSON_TYPES: Final = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of the body: the JSON types it takes, and its schema in the OpenAPI document."""

    kind: Kind
    schema: Mapping[str, Any]


def _field(kind: Kind, description: str = "", *, extension: bool = False, **schema: Any) -> Field:
    """Declare a field. `extension`: the OpenAI API has no such field. `schema`: what the JSON type does not say."""
    types = [{"type": _JSON_TYPES[one]} for one in kind[0]]
    base: dict[str, Any] = types[0] if len(types) == 1 else {"anyOf": types}
    said = {"description": ("Extension. " if extension else "") + description} if description else {}
    return Field(kind, {**base, **schema, **said})


def _sampling(field: SamplingField) -> Field:
    return Field((field.kind.json_types, field.kind.words), field.schema())


_TEXT_PART: Final = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_MESSAGE: Final = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"type": "string", "enum": list(ROLES)},
        "content": {
            "description": "Text, or text parts that are joined as they are.",
            "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _TEXT_PART}],
        },
        "name": {"type": "string", "maxLength": MAX_NAME, "description": "Handed to the chat template."},
        "tool_calls": {
            "type": "array",
            "items": {"type": "object"},
            "description": "An assistant's calls, as they came.",
        },
        "tool_call_id": {"type": "string", "description": "In a tool's message: the call that it answers."},
        "reasoning_content": {
            "type": "string",
            "description": "An assistant's thoughts, for templates that show earlier ones to the model.",
        },
    },
}
_FORMAT: Final = {
    "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
    "json_schema": {
        "type": "object",
        "required": ["name", "schema"],
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
            "description": {"type": "string"},
            "schema": {"type": "object"},
            "strict": {"type": "boolean"},
        },
    },
}
_TOOL: Final = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {"type": {"const": "function"}, "function": {"type": "object"}},
}

ALIASES: Final[Mapping[str, tuple[str, ...]]] = {"max_tokens": ("max_tokens", "max_completion_tokens")}
"""Sampling fields that a body may give under several names, a later one wins."""

SAMPLING: Final[Mapping[str, Field]] = {
    name: _sampling(field) for name, field in SAMPLING_FIELDS.items() if name not in ALIASES
}
"""The sampling fields that are handed to the engine under their own names."""

_ASKED: Final[Mapping[str, Field]] = {
    "model": _field(STRING, "An id from `GET /models`."),
    "messages": _field(LIST, minItems=1, items=_MESSAGE),
    "max_completion_tokens": _sampling(SAMPLING_FIELDS["max_tokens"]),
    "max_tokens": _field(INTEGER, "The older name; max_completion_tokens wins.", minimum=1),
}
_HANDLED: Final[Mapping[str, Field]] = {
    "stream": _field(FLAG, "Server-sent events instead of one body.", default=False),
    "stream_options": _field(OBJECT, properties={"include_usage": {"type": "boolean"}}),
    "response_format": _field(
        OBJECT,
        "What the answer must be, enforced while it is written. With strict, a schema that cannot be enforced whole is "
        "refused; without, the rest is checked afterwards: `schema_error` beside the choice.",
        required=["type"],
        properties=_FORMAT,
    ),
    "tools": _field(
        LIST,
        "Functions that the model may call; read from its text, in the form that its template writes.",
        maxItems=MAX_TOOLS,
        items=_TOOL,
    ),
    "tool_choice": _field(
        ((str, dict), "a string or an object"),
        'none, auto, required, or the function that must be called: `{"type": "function", "function": {"name": …}}`.',
        default="auto",
    ),
    "parallel_tool_calls": _field(FLAG, "False: the answer ends with its first call.", default=True),
    "reasoning_effort": _field(
        STRING,
        "Set in the model's chat template: none and minimal switch thinking off where there is a switch. Named in "
        "x-ignored-fields where there is none.",
        enum=["none", "minimal", "low", "medium", "high", "xhigh"],
    ),
    "chat_template_kwargs": _field(OBJECT, "Variables of the model's chat template.", extension=True),
    "guided_json": _field(
        ((dict, str), "an object, or its text"),
        "A JSON schema, enforced; the object or its text.",
        extension=True,
    ),
    "guided_regex": _field(STRING, "The answer matches it whole.", extension=True, minLength=1),
    "guided_choice": _field(
        LIST,
        "The answer is one of these.",
        extension=True,
        minItems=1,
        maxItems=MAX_CHOICES,
        items={"type": "string", "minLength": 1},
    ),
    "guided_grammar": _field(STRING, "Lark, in llguidance's dialect.", extension=True, minLength=1),
    "cache_salt": _field(
        STRING,
        "Only requests with the same salt find each other's prompts in the prefix cache.",
        extension=True,
        minLength=1,
        maxLength=MAX_SALT,
    ),
    "user": _field(STRING, "For the client's own records; without effect."),
    "metadata": _field(
        OBJECT, "For the client's own records; without effect.", additionalProperties={"type": "string"}
    ),
}

FIELDS: Final[Mapping[str, Field]] = {**_ASKED, **SAMPLING, **_HANDLED}
"""Every field that is honoured."""

UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    # field: the values that ask for what happens anyway; null always does
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
"""Fields that clients know and this build does not honour: refused by name, never ignored."""

KNOWN: Final = FIELDS.keys() | UNSUPPORTED.keys()


def given(data: Mapping[str, Any], name: str) -> Any:
    """Return the value of a body's field, or None if it is absent or null. Checks the declared type."""
    return optional(data, name, FIELDS[name].kind)


def sampling(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling fields that a body gives. Types are checked here, ranges in `engine.SamplingParams`."""
    found = {name: typed(data[name], name, f.kind) for name, f in SAMPLING.items() if data.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, dict):
            at_most(MAX_ENTRIES, len(value), name, "entries")
    for field, names in ALIASES.items():
        for name in names:
            value = given(data, name)
            if value is not None:  # the range too, because the engine's error would not know which name was used
                found[field] = SAMPLING_FIELDS[field].checked(name, value)
    return found


def refuse_unsupported(data: Mapping[str, Any]) -> None:
    """Raise `Unsupported` for a field that this build cannot honour."""
    for name, neutral in UNSUPPORTED.items():
        value = data.get(name)
        # `is` first: 1 == True in Python, not in JSON.
        if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
            raise Unsupported(f"{name} is not supported by this build.", param=name)
