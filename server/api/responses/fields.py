"""The fields of a body for `POST /responses`; see `server/api/fields.py`."""

from __future__ import annotations

from typing import Any, Final

from engine import SAMPLING_FIELDS
from server.api.fields import CHAT, MAX_TOOLS, MODEL, REFUSED, SAMPLING, SHARED, BodyFields, Field, declare
from server.api.parsing import INTEGER, LIST, OBJECT, STRING

ROLES: Final = ("user", "assistant", "system", "developer")
ENCRYPTED: Final = "reasoning.encrypted_content"
LOGPROBS: Final = "message.output_text.logprobs"
INCLUDABLE: Final = (
    ENCRYPTED,
    LOGPROBS,
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
"""What `include` may name. All but the first two are details of items that no reply here has."""

_OF_CHAT: Final = frozenset(("n", "logprobs"))
"""Sampling fields that this endpoint asks for otherwise, or not at all: a response is one reply."""

_RECORDS: Final = "For the client's own records; without effect."

_CONTENT: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
_ITEM: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "type": {
            "type": "string",
            "enum": ["message", "reasoning", "function_call", "function_call_output"],
            "description": "A `message` where it is left out.",
        },
        "role": {"type": "string", "enum": list(ROLES)},
        "content": _CONTENT,
        "call_id": {"type": "string"},
        "name": {"type": "string"},
        "arguments": {"type": "string"},
        "output": _CONTENT,
    },
}
_MESSAGE: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"type": "string", "enum": list(ROLES)}, "content": {"type": "string"}},
}
_ITEMS: Final[dict[str, Any]] = {"type": "object", "anyOf": [_MESSAGE, _ITEM]}
_TOOL: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["type", "name"],
    "properties": {
        "type": {"type": "string", "enum": ["function", "namespace"]},
        "name": {"type": "string"},
        "description": {"type": "string"},
        "parameters": {"type": "object"},
        "strict": {"type": "boolean"},
    },
}
_TEXT: Final[dict[str, Any]] = {
    "format": {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
            "name": {"type": "string", "pattern": "^[A-Za-z0-9_./-]{1,128}$"},
            "description": {"type": "string"},
            "schema": {"type": "object"},
            "strict": {"type": "boolean"},
        },
    },
    "verbosity": {"type": "string", "enum": ["medium"]},
}

RESPONSES: Final = BodyFields.refusing_others(
    honoured={
        "model": MODEL,
        "input": Field(
            ((str, list), "a string or a list of items"),
            {
                "description": "What the user says, or the conversation so far as items: messages, thoughts, calls "
                "and their outputs, a response's `output` among them as it came.",
                "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _ITEMS}],
            },
        ),
        "instructions": declare(STRING, "A system message before everything else."),
        "max_output_tokens": Field(
            (SAMPLING_FIELDS["max_tokens"].kind.json_types, SAMPLING_FIELDS["max_tokens"].kind.words),
            SAMPLING_FIELDS["max_tokens"].schema(),
        ),
        **{name: declared for name, declared in SAMPLING.items() if name not in _OF_CHAT},
        "include": declare(
            LIST,
            f"`{ENCRYPTED}`: thoughts also in the form that clients send back. `{LOGPROBS}`: one entry per generated "
            "token, thoughts and calls included, at the answer's text.",
            items={"type": "string", "enum": list(INCLUDABLE)},
        ),
        "tools": declare(
            LIST,
            "Functions that the model may call, and namespaces of them, whose functions the model knows as "
            "`namespace.function`.",
            maxItems=MAX_TOOLS,
            items=_TOOL,
        ),
        "tool_choice": declare(
            ((str, dict), "a string or an object"),
            'none, auto, required, the function that must be called: `{"type": "function", "name": …}`, or '
            '`{"type": "allowed_tools", "mode": …, "tools": […]}`.',
            default="auto",
        ),
        "parallel_tool_calls": CHAT.honoured["parallel_tool_calls"],
        "max_tool_calls": declare(INTEGER, "Of the server's own tools. It has none, so that any limit is kept."),
        "text": declare(OBJECT, "The form of the answer, as `response_format` of a chat completion.", properties=_TEXT),
        "reasoning": declare(
            OBJECT,
            "`effort`: as `reasoning_effort` of a chat completion. `summary`: null or auto; there is none, thoughts "
            "come whole.",
            properties={
                "effort": {"type": "string", "enum": ["none", "minimal", "low", "medium", "high", "xhigh"]},
                "summary": {"type": "string", "enum": ["auto"]},
            },
        ),
        "chat_template_kwargs": CHAT.honoured["chat_template_kwargs"],
        **{name: declared for name, declared in SHARED.items() if name != "response_format"},
        "safety_identifier": declare(STRING, _RECORDS),
        "client_metadata": declare(OBJECT, _RECORDS),
        "prompt_cache_key": declare(STRING, "A hint for a cache; without effect. See `cache_salt`."),
        "prompt_cache_retention": declare(STRING, "The same."),
        "prompt_cache_options": declare(OBJECT, "The same."),
    },
    refused={
        **REFUSED,
        "prompt": (),  # one that OpenAI keeps
        "context_management": ([],),
        "response_format": (),
        "verbosity": (),
    },
    required=("model", "input"),
    instead={
        "store": "nothing is stored here; leave it out, or send false",
        "previous_response_id": "nothing is stored here; send the items of the conversation",
        "conversation": "nothing is stored here; send the items of the conversation",
        "background": "nothing is stored here",
        "truncation": "an input over the context is refused; leave it out, or send disabled",
        "messages": "here it is input",
        "max_tokens": "here it is max_output_tokens",
        "max_completion_tokens": "here it is max_output_tokens",
        "response_format": "here it is text.format",
        "reasoning_effort": "here it is reasoning.effort",
        "verbosity": "here it is text.verbosity",
        "logprobs": f"here it is {LOGPROBS} in include",
    },
)
"""`POST /responses`."""
