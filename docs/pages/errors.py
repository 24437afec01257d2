"""The errors of the API: one row for each class that can reach a client."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import engine.errors
from engine import VerbatimError
from server.errors import classify, headers_of

ROOT = Path(__file__).resolve().parents[2]
_WHEN = {
    "BadHost": "the `Host` header is missing, repeated or unreadable",
    "HostNotAllowed": "the `Host` header names neither this machine nor an entry of `hosts`",
    "OriginNotAllowed": "a page sent it whose origin is neither the server's own nor in `cors_origins`",
    "ManagementNotAllowed": "the key is no admin key or, without keys, the request is not this machine's own",
    "UnsupportedMediaType": "the `Content-Type` is not JSON",
    "UnsupportedEncoding": "the `Content-Encoding` is not gzip; `Accept-Encoding` tells what is",
    "PathNotFound": "nothing is served at this path; the message says what was meant, or what there is",
    "NotServed": "other servers have something at this path (embeddings, audio, Ollama's protocol), this one has not",
    "MethodNotAllowed": "the path does not take this method; `methods` and `Allow` name those it takes",
    "BodyTooLarge": "the body, as it is sent or decoded, is over `max_body_bytes`",
    "BodiesFull": "the bodies being read take `max_bodies_bytes`, or those of one key half of it",
    "BodyTooSlow": "the body did not arrive within `body_seconds`",
    "Unauthorized": "keys are in use, and this one is missing, unknown, revoked or expired; before the body is read",
    "UnknownKey": "the key was revoked while its request was prepared",
    "NoBalance": "the key's balance does not cover what the request may cost at most; `available`, `needed`",
    "RateLimited": "the key exceeds its requests or tokens per minute, or its concurrent requests; do not retry if one "
    "request alone exceeds the limit",
    "NoKeys": "usage was requested, and there are no keys",
    "LedgerFault": "the ledger cannot be read or written; nothing is served meanwhile",
    "Unwritable": "the ledger works, but cannot store a value of this request",
    "Locked": "the ledger works, but another process holds a lock on this key's row",
    "ReceiptNotFound": "no receipt is kept for this key under this id, or the server keeps or signs none",
    "KeepingFault": "the receipts that are kept cannot be read",
    "ReceiptError": "a receipt that was sent is none, or was altered; or a request asks for a receipt and "
    "holds what none can",
    "ModelNotFound": "no entry has this id",
    "ModelLoading": "the model is not ready yet",
    "QueueFull": "`max_sequences` + `max_queue` requests are unfinished",
    "EngineDead": "the model's engine has stopped, or the model could not be loaded",
    "RequestError": "the base class of a caller's errors",
    "Unavailable": "the base class of temporary conditions",
}
"""For classes whose name says enough in the tree that engine/errors.py draws."""


def errors() -> Iterator[tuple[str, ...]]:
    """One row per error class that can reach a client, by status."""
    said = dict(re.findall(r"^[│├└─ ]*(\w+) {2,}(.+)$", engine.errors.__doc__ or "", re.MULTILINE))
    rows = []
    for cls in _subclasses(VerbatimError):
        error = cls("")
        status, kind = classify(error)
        if status == 500:
            continue
        when = _WHEN.get(cls.__name__) or said[cls.__name__]
        if "x-should-retry" in headers_of(error, 1):
            when += "; do not retry"
        rows.append((str(status), f"`{cls.code}`", f"`{kind}`", cls.__name__, when))
    yield from sorted(rows)
    yield (
        "500",
        "`internal_error`",
        "`server_error`",
        "any other exception",
        "A bug; its id stands in the log.",
    )


def _subclasses(cls: type[VerbatimError]) -> Iterator[type[VerbatimError]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def other_codes() -> list[str]:
    """Codes that are given where an error is made, not by its class."""
    found = set()
    for path in (*ROOT.glob("engine/**/*.py"), *ROOT.glob("server/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                found.add(str(node.value.value))
    return sorted(found)
