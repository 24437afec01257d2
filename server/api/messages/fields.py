"""The fields of bodies for `POST /messages` and `POST /messages/count_tokens`; see `server/api/fields.py`.

The API's description: https://docs.anthropic.com/en/api/messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from server.api.fields import MAX_TOOLS, MODEL, SAMPLING, SHARED, BodyFields, Field, declare
from server.api.parsing import INTEGER, LIST, OBJECT

EFFORTS: Final[Mapping[str, str]] = {
    "low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "xhigh",
}  # fmt: skip
"""`output_config.effort` → the engine's `reasoning_effort`."""

_WITHOUT_A_PLACE: Final = frozenset(
    ("logprobs", "top_logprobs", "logprobs_mode", "prompt_logprobs", "margins", "return_token_ids")
)
"""Sampling fields that ask for parts of a reply which a message does not have."""
_OTHERWISE: Final = frozenset(("n", "stop", "thinking_budget"))
"""Sampling fields that are given in another way here, or not at all."""

_TEXT: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_RESULT: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["type", "tool_use_id"],
    "properties": {"type": {"const": "tool_result"}, "tool_use_id": {"type": "string"}},
}
_USE: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["type", "id", "name", "input"],
    "properties": {
        "type": {"const": "tool_use"},
        "id": {"type": "string", "minLength": 1, "maxLength": 256},
        "name": {"type": "string", "pattern": "^[A-Za-z0-9_./-]{1,128}$"},
        "input": {"type": "object"},
    },
}
_THOUGHT: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["type", "thinking"],
    "properties": {"type": {"const": "thinking"}, "thinking": {"type": "string"}, "signature": {"type": "string"}},
}
_BLOCKS: Final = [_TEXT, _RESULT, _USE, _THOUGHT]
_MESSAGE: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"type": "string", "enum": ["user", "assistant", "system"]},
        "content": {
            "description": "Text, or blocks: `text`; of a user also `tool_result`; of the assistant also `thinking` "
            "and `tool_use`.",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object", "anyOf": _BLOCKS}}],
        },
    },
}
_TOOL: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["name", "input_schema"],
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9_./-]{1,128}$"},
        "description": {"type": "string"},
        "input_schema": {"type": "object"},
        "strict": {"type": "boolean"},
    },
}
_FORMAT: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["type", "schema"],
    "properties": {"type": {"const": "json_schema"}, "schema": {"type": "object"}},
}

_PROMPT: Final[Mapping[str, Field]] = {
    "model": MODEL,
    "messages": declare(
        LIST,
        "The conversation. Turns of one role that follow each other are combined. With a last one that is the "
        "assistant's the reply goes on: it holds what comes behind it.",
        minItems=1,
        items=_MESSAGE,
    ),
    "system": Field(
        ((str, list), "a string or a list of blocks"),
        {
            "description": "What comes before the conversation: text, or text blocks.",
            "anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT}],
        },
    ),
    "tools": declare(
        LIST,
        "What the model may call. `type` is absent or `custom`: tools that Anthropic defines are refused.",
        maxItems=MAX_TOOLS,
        items=_TOOL,
    ),
    "tool_choice": declare(
        OBJECT,
        "Whether a tool must be called: `auto`, `any`, `none`, or `tool` with its `name`. "
        "`disable_parallel_tool_use`: the answer ends with its first call.",
        required=["type"],
        properties={"type": {"type": "string", "enum": ["auto", "any", "tool", "none"]}},
    ),
    "thinking": declare(
        OBJECT,
        "Set in the model's chat template, where that has a switch: `disabled`, `enabled` or `adaptive`. Named in "
        "x-ignored-fields where there is none. `budget_tokens`: tokens of thought after which the engine closes the "
        "thoughts.",
        required=["type"],
        properties={
            "type": {"type": "string", "enum": ["disabled", "enabled", "adaptive"]},
            "budget_tokens": {"type": "integer", "minimum": 0},
        },
    ),
    "output_config": declare(
        OBJECT,
        "`effort`: how much to think, set in the chat template. `format`: a JSON schema that the answer satisfies; "
        "one that cannot be enforced whole is refused.",
        properties={"effort": {"type": "string", "enum": list(EFFORTS)}, "format": _FORMAT},
    ),
    "output_format": declare(OBJECT, "The older name of `output_config.format`.", **{**_FORMAT, "type": "object"}),
    "cache_control": declare(OBJECT, "Without effect: what was computed before is found again without being asked."),
    "context_management": declare(
        OBJECT,
        "Only what changes nothing: no edits, or `clear_thinking_20251015` that keeps all.",
        properties={"edits": {"type": "array", "maxItems": 0}},
    ),
    "chat_template_kwargs": declare(OBJECT, "Variables of the model's chat template.", extension=True),
}  # fmt: skip
"""The fields that decide the prompt, or are about it."""

MESSAGE: Final = BodyFields.refusing_others(
    honoured={
        **_PROMPT,
        "max_tokens": declare(
            INTEGER,
            "Cap on generated tokens; clamped to what is left of the context, and all of it if left out. 0 computes "
            "the prompt and draws nothing.",
            minimum=0,
        ),
        "stop_sequences": declare(
            LIST,
            "Ends the answer before any of these texts; at most 16, each of 1 to 1024 characters. `stop_sequence` of "
            "the reply tells which.",
            maxItems=16,
            items={"type": "string", "minLength": 1, "maxLength": 1024},
        ),
        "stream": SHARED["stream"],
        **{name: field for name, field in SAMPLING.items() if name not in _WITHOUT_A_PLACE | _OTHERWISE},
        "cache_salt": SHARED["cache_salt"],
        "receipt": SHARED["receipt"],
        "metadata": declare(
            OBJECT,
            "For the client's own records; without effect.",
            properties={"user_id": {"type": "string"}},
            additionalProperties={"type": "string"},
        ),
    },
    refused={"service_tier": ("auto", "standard_only")},
    required=("model", "messages"),
)
"""`POST /messages`."""

COUNT: Final = BodyFields(honoured=_PROMPT, refused=MESSAGE.refused, required=("model", "messages"))
"""`POST /messages/count_tokens`. What a message honours and a prompt does not depend on is ignored and named."""
