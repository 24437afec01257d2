"""The OpenAPI description of requests and answers. Fields of bodies come from the tables of `server/api/fields.py`."""

from __future__ import annotations

from typing import Any, Final

from server.api.fields import CHAT, BodyFields

EXAMPLES: Final[dict[str, dict[str, Any]]] = {
    "chat": {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "seed": 7},
    "completion": {"model": "demo", "prompt": "Once upon a time", "max_tokens": 16, "seed": 7},
    "response": {"model": "demo", "input": "Hello", "seed": 7},
    "message": {
        "model": "demo",
        "max_tokens": 64,
        "messages": [{"role": "user", "content": "Hello"}],
        "seed": 7,
    },
    "count": {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]},
    "tokenize": {"model": "demo", "prompt": "Hello"},
    "detokenize": {"model": "demo", "tokens": [1, 2, 3]},
}


def request_body(fields: BodyFields, example: dict[str, Any]) -> dict[str, Any]:
    """Describe a body by the fields that are honoured in it."""
    schema = {
        "type": "object",
        "required": list(fields.required),
        "properties": {name: dict(field.schema) for name, field in fields.honoured.items()},
    }
    return {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}


def optional_body(fields: BodyFields, example: dict[str, Any]) -> dict[str, Any]:
    """Describe a body that may be left out."""
    return {**request_body(fields, example), "required": False}


CHAT_BODY: Final = request_body(CHAT, EXAMPLES["chat"])

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


_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    400: _failure("Invalid Format: not JSON, a field missing or of the wrong type, a prompt over the context."),
    401: _failure("Authentication Fails: the key is missing, unknown, revoked or expired."),
    402: _failure("Insufficient Balance: the key's balance does not cover the request's worst case."),
    403: _failure("The Host header names another host, or a page of another origin sent the request."),
    404: _failure("Unknown model, unknown path."),
    405: _failure("The path does not take this method; see Allow."),
    408: _failure("The body did not arrive in time."),
    413: _failure("Body over the limit."),
    414: _failure("Path and query over the limit."),
    415: _failure("The Content-Type is not JSON, or the Content-Encoding not gzip."),
    422: _failure("Invalid Parameters: out of range, an impossible combination, a field this build cannot honour."),
    429: _failure(
        "Rate Limit Reached: the key's requests or tokens of a minute, or its requests at once; see Retry-After."
    ),
    431: _failure("Head or trailer over the limit."),
    500: _failure("Server Error: a bug; the message has an id that is in the log."),
    503: _failure("Server Overloaded: queue full, no room for the body, model loading, engine dead; see Retry-After."),
}

_JSON_OR_EVENTS: Final[dict[str, Any]] = {"application/json": {}, "text/event-stream": {}}

RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "A `chat.completion`, or with `stream` a sequence of `chat.completion.chunk` and `[DONE]`.",
        "content": _JSON_OR_EVENTS,
    },
    **_REFUSALS,
}

COMPLETION_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "A `text_completion`, or with `stream` a sequence of them and `[DONE]`.",
        "content": _JSON_OR_EVENTS,
    },
    **_REFUSALS,
}

RESPONSE_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "A `response`, or with `stream` a sequence of events, the last of which holds it.",
        "content": _JSON_OR_EVENTS,
    },
    **_REFUSALS,
}

MESSAGE_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "A message, or with `stream` its events, from `message_start` to `message_stop`.",
        "content": _JSON_OR_EVENTS,
    },
    **_REFUSALS,
}

TOKENIZER_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    status: refusal for status, refusal in _REFUSALS.items() if status != 402
}


USAGE: Final[dict[int | str, dict[str, Any]]] = {
    401: _failure("Authentication Fails: the key is missing, unknown, revoked or expired."),
    403: _failure("The Host header names another host, or a page of another origin sent the request."),
    404: _failure("The server has no keys, and so no record of usage."),
    422: _failure("`since` is neither a date nor Unix seconds; `by` is neither day nor model."),
}

_ADMIN: Final = _failure(
    "The key is no admin key or, without keys, the request is not this machine's own; or as for every path: another "
    "host's name, a page of another origin."
)
METRICS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The text format of Prometheus, or OpenMetrics where `Accept` names it.",
        "content": {"text/plain": {}, "application/openmetrics-text": {}},
    },
    401: _REFUSALS[401],
    403: _ADMIN,
}
MACHINE: Final[dict[int | str, dict[str, Any]]] = {401: _REFUSALS[401], 403: _REFUSALS[403]}
KEYS: Final[dict[int | str, dict[str, Any]]] = {
    401: _REFUSALS[401],
    403: _ADMIN,
    404: _failure("The server has no keys."),
    503: _failure("The ledger cannot be read at the moment; see the server's log."),
}

RECEIPT_BODY: Final[dict[str, Any]] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "description": "A receipt, its signed envelope, or a reply that holds either.",
            }
        }
    },
}

RECEIPTS: Final[dict[int | str, dict[str, Any]]] = {
    401: _REFUSALS[401],
    403: _REFUSALS[403],
    404: _failure("There is no such receipt for this key, or this server keeps or signs none."),
    422: _failure("`limit` is out of range."),
    429: _REFUSALS[429],
    503: _failure("The receipts that are kept cannot be read at the moment; see the server's log."),
}

VERIFY: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "The report, whatever its verdict.", "content": {"application/json": {}}},
    **{status: refusal for status, refusal in _REFUSALS.items() if status not in (400, 404, 422)},
    422: _failure("The body is no receipt, or an altered one; `mode` or `tolerance` is out of range."),
}


_MANAGED: Final[dict[int | str, dict[str, Any]]] = {
    **{status: refusal for status, refusal in _REFUSALS.items() if status not in (402, 403)},
    403: _failure("The key is no admin key, or the request is from another machine, host or origin."),
}

LOAD: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "The model, ready.", "content": {"application/json": {}}},
    202: {"description": "The model, which is being loaded.", "content": {"application/json": {}}},
    **_MANAGED,
    503: _failure("There is no room for it, or it cannot be loaded; the message says why."),
}

UNLOAD: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "The model, unloaded.", "content": {"application/json": {}}},
    202: {"description": "The model, which a request has had loaded again.", "content": {"application/json": {}}},
    **_MANAGED,
    409: _failure("It has requests, or is being loaded."),
}


def with_keys(document: dict[str, Any], open_paths: frozenset[str]) -> dict[str, Any]:
    """Say in the document that every path needs a key, except `open_paths`."""
    scheme = {"type": "http", "scheme": "bearer", "description": "A key of this server; `verbatim keys create`."}
    document.setdefault("components", {})["securitySchemes"] = {"key": scheme}
    document["security"] = [{"key": []}]
    for path in open_paths & document["paths"].keys():
        for operation in document["paths"][path].values():
            operation["security"] = []
    return document
