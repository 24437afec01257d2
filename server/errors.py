"""The error table: from what went wrong to what the client is told. The only file that knows status codes of errors.

Every body is `{"error": {"message", "type", "param", "code", …}}`. A bug shows an id that stands in the log, never a
trace.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from engine import (
    EngineDead,
    InvalidFormat,
    InvalidParameter,
    ModelNotFound,
    NumericalFault,
    OutOfMemory,
    RequestError,
    Unavailable,
    VerbatimError,
)
from server.ledger.records import LedgerFault, NoBalance, UnknownKey

log = logging.getLogger("verbatim.server")

MAX_MESSAGE: Final = 2000


class BodyTooLarge(VerbatimError):
    code = "body_too_large"


class BodyTooSlow(VerbatimError):
    code = "body_too_slow"


class BodiesFull(Unavailable):
    """The bodies that are being read take all the memory there is for them."""

    code = "bodies_full"


class BadHost(VerbatimError):
    """A request that does not say whom it is for."""

    code = "invalid_host"


class HostNotAllowed(VerbatimError):
    """A request for a name that is not this server's."""

    code = "host_not_allowed"


class OriginNotAllowed(VerbatimError):
    """A request that a page of another origin has sent."""

    code = "origin_not_allowed"


class UnsupportedMediaType(VerbatimError):
    """A body that is announced as something else than JSON."""

    code = "unsupported_media_type"


class Unauthorized(VerbatimError):
    """No key, or one that opens nothing."""

    code = "invalid_api_key"


class RateLimited(VerbatimError):
    """The key has used up its requests or tokens of this minute, or runs as many requests as it may.

    Args:
        retry_after: seconds after which there may be room.
        hopeless: there will never be: one request is over the limit.
    """

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: int = 1, hopeless: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.hopeless = hopeless


class NoKeys(VerbatimError):
    """The server has no keys, and so no books."""

    code = "no_keys"


class ClientGone(Exception):
    """The client closed the connection; nobody is left to be told anything."""


TABLE: Final[tuple[tuple[type[VerbatimError], int, str], ...]] = (
    # error class, status, type; the first that fits
    (BadHost, 400, "invalid_request_error"),
    (HostNotAllowed, 403, "permission_error"),
    (OriginNotAllowed, 403, "permission_error"),
    (UnsupportedMediaType, 415, "invalid_request_error"),
    (Unauthorized, 401, "authentication_error"),
    (UnknownKey, 401, "authentication_error"),
    (NoBalance, 402, "insufficient_balance"),
    (BodyTooSlow, 408, "invalid_request_error"),
    (BodyTooLarge, 413, "invalid_request_error"),
    (RateLimited, 429, "rate_limit_error"),
    (LedgerFault, 503, "server_error"),
    (NoKeys, 404, "invalid_request_error"),
    (ModelNotFound, 404, "invalid_request_error"),
    (InvalidParameter, 422, "invalid_request_error"),
    (InvalidFormat, 400, "invalid_request_error"),
    (RequestError, 400, "invalid_request_error"),
    (Unavailable, 503, "server_overloaded"),
    (VerbatimError, 500, "server_error"),
)

FINAL: Final = (EngineDead, OutOfMemory, NumericalFault)
"""Unavailable, and trying the same again will not help: the same request takes the same memory, gives the same bits."""


def classify(error: VerbatimError) -> tuple[int, str]:
    """Status and type of an error."""
    return next((status, kind) for cls, status, kind in TABLE if isinstance(error, cls))


def error_body(message: str, kind: str, param: str | None, code: str, **details: Any) -> dict[str, Any]:
    """The one shape of an error."""
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + "…"
    # Text that cannot be encoded may come back in a message that quotes it.
    message = message.encode("utf-8", "replace").decode("utf-8")
    param = param.encode("utf-8", "replace").decode("utf-8")[:200] if param else param
    return {"error": {"message": message, "type": kind, "param": param, "code": code, **details}}


def describe(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and body for anything that was raised. Logs what is a bug."""
    if isinstance(error, VerbatimError):
        status, kind = classify(error)
        if isinstance(error, LedgerFault):  # its words name hosts, users, files: for the log alone
            message = "the server's keys and balances cannot be used at the moment; its log says why."
            return status, error_body(message, kind, None, error.code)
        return status, error_body(error.message, kind, error.param, error.code, **error.details)
    reference = secrets.token_hex(8)
    log.error("internal error %s", reference, exc_info=error)
    message = f"The server failed on this request; its log has the details under {reference}."
    return 500, error_body(message, "server_error", None, "internal_error")


def headers_of(error: BaseException, retry_after: int) -> dict[str, str]:
    """What goes with the answer to an error; `retry_after`: seconds, where trying again may help."""
    if isinstance(error, Unauthorized | UnknownKey):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, RateLimited):
        final = {"x-should-retry": "false"} if error.hopeless else {}
        return {"retry-after": str(error.retry_after), **final}
    if isinstance(error, BodyTooSlow):
        return {"connection": "close", "x-should-retry": "false"}
    if not isinstance(error, Unavailable | LedgerFault):
        return {}
    if isinstance(error, FINAL):
        return {"retry-after": str(retry_after), "x-should-retry": "false"}
    return {"retry-after": str(retry_after)}


def error_response(error: BaseException, retry_after: int = 1) -> JSONResponse:
    """The answer to anything that was raised. `retry_after`: seconds, used where trying again may help."""
    status, body = describe(error)
    return JSONResponse(body, status_code=status, headers=headers_of(error, retry_after))


def install(app: FastAPI, retry_after: int) -> None:
    """Make every answer that is not a success look like the table says."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return error_response(error, retry_after)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        path = request.url.path[:200]
        if error.status_code == 404:
            message, code = f"There is nothing at {path}.", "not_found"
        elif error.status_code == 405:
            message, code = f"{path} does not take {request.method[:20]}.", "method_not_allowed"
        else:
            message, code = str(error.detail), "http_error"
        body = error_body(message, "invalid_request_error", None, code)
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(VerbatimError, known)
    app.add_exception_handler(HTTPException, http)
