"""The request and the answers as the served OpenAPI document describes them. Describes; checks nothing."""

from __future__ import annotations

from typing import Any, Final

_TEXT_PART: Final = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_MESSAGE: Final = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "description": "Text, or text parts that are joined as they are.",
            "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _TEXT_PART}],
        },
        "name": {"type": "string", "maxLength": 256, "description": "Handed to the chat template."},
        "tool_calls": {
            "type": "array",
            "items": {"type": "object"},
            "description": "An assistant's calls, as they came.",
        },
        "tool_call_id": {"type": "string", "description": "In a tool's turn: the call that it answers."},
        "reasoning_content": {
            "type": "string",
            "description": "An assistant's thoughts, for templates that show earlier ones to the model.",
        },
    },
}


def _number(low: float, high: float, default: float, text: str) -> dict[str, Any]:
    return {"type": "number", "minimum": low, "maximum": high, "default": default, "description": text}


def _integer(text: str, **limits: Any) -> dict[str, Any]:
    return {"type": "integer", **limits, "description": text}


def _flag(text: str) -> dict[str, Any]:
    return {"type": "boolean", "default": False, "description": text}


_FIELDS: Final[dict[str, dict[str, Any]]] = {
    "model": {"type": "string", "description": "An id from `GET /models`."},
    "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
    "max_completion_tokens": _integer("Cap on generated tokens; clamped to what is left of the context.", minimum=1),
    "max_tokens": _integer("The older name; max_completion_tokens wins.", minimum=1),
    "temperature": _number(0, 2, 1, "0 is greedy; the lowest token id wins a tie."),
    "top_p": _number(0, 1, 1, "Keep the likeliest tokens up to this mass, at least one."),
    "n": _integer("Choices; choice 0 is the answer to n = 1.", minimum=1, default=1),
    "stream": _flag("Server-sent events instead of one body."),
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
    "stop": {
        "description": "Ends the answer before any of these texts; at most 16, each of 1 to 1024 characters.",
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "maxItems": 16, "items": {"type": "string", "minLength": 1, "maxLength": 1024}},
            {"type": "null"},
        ],
    },
    "presence_penalty": _number(-2, 2, 0, "Subtracted once from the logit of every token generated so far."),
    "frequency_penalty": _number(-2, 2, 0, "Subtracted for every time a token was generated so far."),
    "logit_bias": {
        "type": "object",
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "description": "Token id → bias; -100 bans.",
    },
    "seed": _integer(
        "Same request, same seed, same system_fingerprint: same bytes. Drawn and returned if omitted.",
        minimum=-(2**63),
        maximum=2**63 - 1,
    ),
    "response_format": {
        "type": "object",
        "required": ["type"],
        "properties": {
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
        },
        "description": "What the answer must be, enforced while it is written. With strict, a schema that cannot be "
        "enforced whole is refused; without, the rest is checked afterwards: `schema_error` beside the choice.",
    },
    "tools": {
        "type": "array",
        "maxItems": 128,
        "items": {
            "type": "object",
            "required": ["type", "function"],
            "properties": {"type": {"const": "function"}, "function": {"type": "object"}},
        },
        "description": "Functions that the model may call; read from its text, in the form that its template writes.",
    },
    "tool_choice": {
        "anyOf": [{"type": "string"}, {"type": "object"}],
        "default": "auto",
        "description": "none, auto, required, or the function that must be called: "
        '`{"type": "function", "function": {"name": …}}`.',
    },
    "parallel_tool_calls": {
        "type": "boolean",
        "default": True,
        "description": "False: the answer ends with its first call.",
    },
    "reasoning_effort": {
        "type": "string",
        "enum": ["none", "minimal", "low", "medium", "high", "xhigh"],
        "description": "Set in the model's chat template: none and minimal switch thinking off where there is a "
        "switch. Named in x-ignored-fields where there is none.",
    },
    "logprobs": _flag("One entry per generated token."),
    "top_logprobs": _integer("Rivals per entry; needs logprobs.", minimum=0, maximum=20, default=0),
    "top_k": _integer("Extension. Keep this many tokens; 0 keeps all.", minimum=0, default=0),
    "min_p": _number(0, 1, 0, "Extension. Keep tokens at least this likely, as a share of the likeliest."),
    "repetition_penalty": _number(0.01, 100, 1, "Extension. As in transformers, over prompt and answer."),
    "min_tokens": _integer("Extension. Nothing ends the answer before.", minimum=0, default=0),
    "ignore_eos": _flag("Extension. Go on after the end token."),
    "stop_token_ids": {
        "type": "array",
        "maxItems": 256,
        "items": {"type": "integer"},
        "description": "Extension. Token ids that end the answer.",
    },
    "logprobs_mode": {
        "type": "string",
        "enum": ["raw", "processed"],
        "default": "raw",
        "description": "Extension. The model's own distribution, or the one that was drawn from.",
    },
    "return_token_ids": _flag("Extension. `token_ids` beside each choice."),
    "thinking_budget": _integer("Extension. Tokens of thought after which they are closed by force.", minimum=0),
    "chat_template_kwargs": {"type": "object", "description": "Extension. Variables of the model's chat template."},
    "guided_json": {
        "description": "Extension. A JSON schema, enforced; the object or its text.",
        "anyOf": [{"type": "object"}, {"type": "string"}],
    },
    "guided_regex": {"type": "string", "minLength": 1, "description": "Extension. The answer matches it whole."},
    "guided_choice": {
        "type": "array",
        "minItems": 1,
        "maxItems": 1024,
        "items": {"type": "string", "minLength": 1},
        "description": "Extension. The answer is one of these.",
    },
    "guided_grammar": {"type": "string", "minLength": 1, "description": "Extension. Lark, in llguidance's dialect."},
    "cache_salt": {
        "type": "string",
        "minLength": 1,
        "maxLength": 256,
        "description": "Extension. Only requests with the same salt find each other's prompts in the prefix cache.",
    },
    "user": {"type": "string", "description": "For the client's own books; without effect."},
    "metadata": {
        "type": "object",
        "additionalProperties": {"type": "string"},
        "description": "For the client's own books; without effect.",
    },
}

REQUEST_BODY: Final[dict[str, Any]] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"type": "object", "required": ["model", "messages"], "properties": _FIELDS},
            "example": {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "seed": 7},
        }
    },
}

_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "Dotted path of the offending field."},
                "code": {"type": "string", "description": "Stable; for programs."},
            },
        }
    },
}


def _failure(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _ERROR}}}


RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "A `chat.completion`, or with `stream` a sequence of `chat.completion.chunk` and `[DONE]`.",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    400: _failure("Invalid Format: not JSON, a field missing or of the wrong type, a prompt over the context."),
    401: _failure("Authentication Fails: the key is missing, unknown, revoked or expired."),
    402: _failure("Insufficient Balance: the key's balance does not cover the request's worst case."),
    403: _failure("The request is for a name that is not this server's, or a page of another origin has sent it."),
    404: _failure("Unknown model."),
    408: _failure("The body was not there in time."),
    413: _failure("Body over the limit."),
    414: _failure("Path and query over the limit."),
    415: _failure("The body is announced as something else than JSON."),
    422: _failure("Invalid Parameters: out of range, an impossible combination, a field this build cannot honour."),
    429: _failure(
        "Rate Limit Reached: the key's requests or tokens of a minute, or its requests at once; see Retry-After."
    ),
    431: _failure("Head or trailer over the limit."),
    500: _failure("Server Error: a bug; the message has an id that stands in the log."),
    503: _failure("Server Overloaded: queue full, no room for the body, model loading, engine dead; see Retry-After."),
}


USAGE: Final[dict[int | str, dict[str, Any]]] = {
    401: _failure("Authentication Fails: the key is missing, unknown, revoked or expired."),
    403: _failure("The request is for a name that is not this server's, or a page of another origin has sent it."),
    404: _failure("The server has no keys, and so no books."),
    422: _failure("`since` is neither a date nor Unix seconds; `by` is neither day nor model."),
}


def with_keys(document: dict[str, Any], open_paths: frozenset[str]) -> dict[str, Any]:
    """The document of a server that has keys: every path but these needs one."""
    scheme = {"type": "http", "scheme": "bearer", "description": "A key of this server; `verbatim keys create`."}
    document.setdefault("components", {})["securitySchemes"] = {"key": scheme}
    document["security"] = [{"key": []}]
    for path in open_paths & document["paths"].keys():
        for operation in document["paths"][path].values():
            operation["security"] = []
    return document


def field_names() -> frozenset[str]:
    """Every field the document describes."""
    return frozenset(_FIELDS)
