"""Maps errors to HTTP: status, type, body and headers. The only file that knows status codes of errors.

Every body is `{"error": {"message", "type", "param", "code", …}}`, or the same in Anthropic's shape where clients of
its API ask. For a bug the client gets an id that is in the log, never a traceback.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from engine import (
    EngineDead,
    InvalidFormat,
    InvalidParameter,
    ModelInUse,
    ModelNotFound,
    NumericalFault,
    OutOfMemory,
    ReceiptError,
    RequestError,
    Unavailable,
    VerbatimError,
)
from server.ledger.records import LedgerFault, NoBalance, UnknownKey

log = logging.getLogger("verbatim.server")

MAX_MESSAGE: Final = 2000
_INTEGER_BITS: Final = 8192
"""Of an integer that an error shows as one. Python does not write those of more than 4,300 digits."""


class BodyTooLarge(VerbatimError):
    """The body exceeds `max_body_bytes`."""

    code = "body_too_large"


class BodyTooSlow(VerbatimError):
    """The body did not arrive within `body_seconds`."""

    code = "body_too_slow"


class BodiesFull(Unavailable):
    """The bodies being read take all the memory reserved for bodies."""

    code = "bodies_full"


class BadHost(VerbatimError):
    """The request has no valid `Host` header."""

    code = "invalid_host"


class HostNotAllowed(VerbatimError):
    """The `Host` header names another host."""

    code = "host_not_allowed"


class OriginNotAllowed(VerbatimError):
    """The request was sent by a page of another origin."""

    code = "origin_not_allowed"


class UnsupportedMediaType(VerbatimError):
    """The body's content type is not JSON."""

    code = "unsupported_media_type"


class UnsupportedEncoding(UnsupportedMediaType):
    """The body's content encoding is not gzip."""

    code = "unsupported_content_encoding"


class PathNotFound(VerbatimError):
    """Nothing is served at this path."""

    code = "not_found"


class NotServed(PathNotFound):
    """Other servers have something at this path, and this one has not."""

    code = "not_supported"


class MethodNotAllowed(VerbatimError):
    """The path does not take this method. `methods`: those that it takes."""

    code = "method_not_allowed"


class Unauthorized(VerbatimError):
    """The key is missing, unknown, revoked or expired."""

    code = "invalid_api_key"


class RateLimited(VerbatimError):
    """The key has used its requests or tokens of this minute, or runs as many requests as it may.

    Args:
        retry_after: seconds after which the request may succeed.
        hopeless: it never will, because this one request exceeds the limit.
    """

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: int = 1, hopeless: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.hopeless = hopeless


class ManagementNotAllowed(VerbatimError):
    """The sender may not manage the server: its key is no admin key or, without keys, it is on another machine."""

    code = "management_not_allowed"


class NoKeys(VerbatimError):
    """Usage was asked of a server that has no keys, and so records none."""

    code = "no_keys"


class ReceiptNotFound(VerbatimError):
    """There is no receipt, or no key of receipts, at this path for this key."""

    code = "receipt_not_found"


class KeepingFault(VerbatimError):
    """Receipts cannot be kept, or those that are kept cannot be read: a full disk, a locked ledger."""

    code = "receipts_unavailable"


class ClientGone(Exception):
    """The client closed the connection, so no answer can be sent."""


TABLE: Final[tuple[tuple[type[VerbatimError], int, str], ...]] = (
    # error class, status, type; the first match counts
    (BadHost, 400, "invalid_request_error"),
    (HostNotAllowed, 403, "permission_error"),
    (OriginNotAllowed, 403, "permission_error"),
    (ManagementNotAllowed, 403, "permission_error"),
    (UnsupportedMediaType, 415, "invalid_request_error"),
    (Unauthorized, 401, "authentication_error"),
    (UnknownKey, 401, "authentication_error"),
    (NoBalance, 402, "insufficient_balance"),
    (BodyTooSlow, 408, "invalid_request_error"),
    (BodyTooLarge, 413, "invalid_request_error"),
    (RateLimited, 429, "rate_limit_error"),
    (LedgerFault, 503, "server_error"),
    (KeepingFault, 503, "server_error"),
    (PathNotFound, 404, "invalid_request_error"),
    (MethodNotAllowed, 405, "invalid_request_error"),
    (NoKeys, 404, "invalid_request_error"),
    (ReceiptNotFound, 404, "invalid_request_error"),
    (ReceiptError, 422, "invalid_request_error"),
    (ModelNotFound, 404, "invalid_request_error"),
    (InvalidParameter, 422, "invalid_request_error"),
    (InvalidFormat, 400, "invalid_request_error"),
    (RequestError, 400, "invalid_request_error"),
    (ModelInUse, 409, "conflict_error"),
    (Unavailable, 503, "server_overloaded"),
    (VerbatimError, 500, "server_error"),
)

FINAL: Final = (EngineDead, OutOfMemory, NumericalFault)
"""Unavailable, and retrying does not help: the same request takes the same memory and computes the same bits."""


_MESSAGES: Final = re.compile(
    r"(?:(?:(?:/api)?/v1)*|/api|(?!(?:/api)?/v1/).*/v1)/messages(?:/.*)?",
    re.DOTALL,
)
"""The paths whose clients speak Anthropic's Messages API: those that are served, what Anthropic has below them, and
the same under a wrong base URL, `/messages` or `/x/v1/messages`. Not `/v1/threads/t/messages`, which is OpenAI's."""

_KINDS: Final[Mapping[int, str]] = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Anthropic's `error.type` by status: https://docs.anthropic.com/en/api/errors. Its 529 is a 503 here."""


def classify(error: VerbatimError) -> tuple[int, str]:
    """Return the status and type of an error."""
    return next((status, kind) for cls, status, kind in TABLE if isinstance(error, cls))


def error_body(message: str, kind: str, param: str | None, code: str, **details: Any) -> dict[str, Any]:
    """Build the body of an error. Long messages are cut. Whatever the error quotes, the body can be encoded."""
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + "…"
    param = param[:200] if param else param
    body: dict[str, Any] = _encodable({"message": message, "type": kind, "param": param, "code": code, **details})
    return {"error": body}


def _encodable(value: Any) -> Any:
    """Return a value as JSON that UTF-8 can hold: an error may quote halves of characters, and any number."""
    match value:
        case None | bool():
            return value
        case str():
            return value.encode("utf-8", "replace").decode("utf-8")
        case float():
            return value if math.isfinite(value) else str(value)
        case int():
            return value if value.bit_length() < _INTEGER_BITS else hex(value)
        case Mapping():
            return {_encodable(str(key)): _encodable(inner) for key, inner in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_encodable(inner) for inner in value]
    return _encodable(str(value))


def describe(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Return the status and body for any exception. Logs a bug with its traceback."""
    if isinstance(error, VerbatimError):
        status, kind = classify(error)
        if isinstance(error, LedgerFault):  # its message names hosts, users and files: only for the log
            message = "the server's keys and balances cannot be used at the moment; its log says why."
            return status, error_body(message, kind, None, error.code)
        if isinstance(error, KeepingFault):  # the same
            message = "the receipts that this server keeps cannot be used at the moment; its log says why."
            return status, error_body(message, kind, None, error.code)
        return status, error_body(error.message, kind, error.param, error.code, **error.details)
    reference = secrets.token_hex(8)
    log.error("internal error %s", reference, exc_info=error)
    message = f"The server failed on this request; its log has the details under {reference}."
    return 500, error_body(message, "server_error", None, "internal_error")


def headers_of(error: BaseException, retry_after: int) -> dict[str, str]:
    """Return the headers of an error's answer. `retry_after`: seconds, used where a retry may help."""
    if isinstance(error, Unauthorized | UnknownKey):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, UnsupportedEncoding):
        return {"accept-encoding": "gzip"}
    if isinstance(error, MethodNotAllowed):
        return {"allow": ", ".join(error.details.get("methods", ()))}
    if isinstance(error, RateLimited):
        final = {"x-should-retry": "false"} if error.hopeless else {}
        return {"retry-after": str(error.retry_after), **final}
    if isinstance(error, BodyTooSlow):
        return {"connection": "close", "x-should-retry": "false"}
    if not isinstance(error, Unavailable | LedgerFault | KeepingFault):
        return {}
    if isinstance(error, FINAL):
        return {"retry-after": str(retry_after), "x-should-retry": "false"}
    return {"retry-after": str(retry_after)}


def error_response(error: BaseException, scope: Scope, retry_after: int = 1) -> JSONResponse:
    """Build the answer to any exception, in the shape that the clients of the scope's path read.

    `retry_after`: seconds, used where a retry may help.
    """
    status, body = describe(error)
    return _answer(status, body, scope, headers_of(error, retry_after))


def _answer(status: int, body: dict[str, Any], scope: Scope, headers: Mapping[str, str] | None) -> JSONResponse:
    state = scope.setdefault("state", {})
    state["error_code"] = body["error"]["code"]  # for whoever counts refusals
    request_id = state.get("request_id")
    return JSONResponse(_shaped(body, status, scope["path"], request_id), status_code=status, headers=headers)


def _shaped(body: dict[str, Any], status: int, path: str, request_id: str | None) -> dict[str, Any]:
    """Return the body of an error, `{"error": {"message", …}}`, in the shape that the clients of a path read."""
    return anthropic_error(body, status, request_id) if _MESSAGES.fullmatch(path) else body


def anthropic_error(body: Mapping[str, Any], status: int, request_id: str | None = None) -> dict[str, Any]:
    """Return an error's body in Anthropic's shape. The members that this server's errors have beside it stay."""
    kind = _KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    named = {} if request_id is None else {"request_id": request_id}
    return {"type": "error", "error": {**body["error"], "type": kind}, **named}


def install(app: FastAPI, retry_after: int) -> None:
    """Make the application answer errors as the table says. Paths and methods: `server/wire/paths.py`."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return error_response(error, request.scope, retry_after)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        body = error_body(str(error.detail), "invalid_request_error", None, "http_error")
        return _answer(error.status_code, body, request.scope, error.headers)

    app.add_exception_handler(VerbatimError, known)
    app.add_exception_handler(HTTPException, http)
