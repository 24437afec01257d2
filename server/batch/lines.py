"""Lines of a batch: one line of the input → a request, or why it is none; an answer → one line of the output. Pure.

Everything in a line of the output is a function of the input's line and the model's fingerprint: no time, no chance,
nothing of the other lines (docs/decisions/0027). The format is that of OpenAI's Batch API.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine import InvalidFormat, InvalidParameter, RequestError, Unsupported
from server.api.parsing import OBJECT, STRING, required
from server.errors import error_body
from server.json_text import load_body, to_json

__all__ = [
    "URLS",
    "Answer",
    "BatchLine",
    "Refusal",
    "digest_of",
    "line_id",
    "output_line",
    "read_line",
    "too_long",
    "twice",
]

URLS: Final = ("/v1/chat/completions", "/v1/completions")
"""The endpoints that a line may name."""

MAX_CUSTOM_ID: Final = 512
"""Characters of a `custom_id`."""

_VERSION: Final = "1"
"""Part of every id: raised when the same line would be answered with other bytes under the same fingerprint."""
_SEED_BITS: Final = 53
"""Bits of a derived seed: few enough for clients whose numbers are doubles."""


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A request of a batch. `digest`: SHA-256 over the whole line as parsed, 64 hex digits."""

    custom_id: str
    url: str
    body: dict[str, Any]
    digest: str

    @property
    def model(self) -> str:
        """The model's id, as far as the body names one."""
        model = self.body.get("model")
        return model if isinstance(model, str) else ""

    def sent(self, *, receipts: bool) -> bytes:
        """Write the body that is answered: with a seed, and with a receipt if each line gets one.

        A line that asks for the form with digests keeps it.
        """
        added: dict[str, Any] = {}
        if self.body.get("seed") is None:
            # The id is part of it, so that lines with the same request are different draws.
            added["seed"] = int(self.digest, 16) >> (256 - _SEED_BITS)
        asked = self.body.get("receipt")
        if receipts and (asked is None or asked is False):
            added["receipt"] = True
        return to_json({**self.body, **added}).encode()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A line of the input that is no request. `custom_id`: None where it could not be read."""

    custom_id: str | None
    error: RequestError
    digest: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request was answered with. `request_id`, `ignored`: the headers `x-request-id` and `x-ignored-fields`."""

    status: int
    request_id: str
    body: dict[str, Any]
    ignored: str = ""


def read_line(raw: bytes) -> BatchLine | Refusal:
    """Parse one line of the input."""
    try:
        data = load_body(raw)
    except RequestError as error:
        error.message = error.message.replace("The body", "The line", 1)
        return Refusal(None, error, hashlib.sha256(raw.strip()).hexdigest())
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    custom_id = data.get("custom_id")
    try:
        return _request(data, digest)
    except RequestError as error:
        return Refusal(custom_id if isinstance(custom_id, str) else None, error, digest)


def _request(data: Mapping[str, Any], digest: str) -> BatchLine:
    custom_id = required(data, "custom_id", STRING)
    if not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        raise InvalidParameter(
            f"custom_id must have between 1 and {MAX_CUSTOM_ID} characters, not {len(custom_id)}.", param="custom_id"
        )
    method, url = required(data, "method", STRING), required(data, "url", STRING)
    if method != "POST":
        raise InvalidParameter(f"method must be POST, not {method[:100]!r}.", param="method")
    if url not in URLS:
        raise InvalidParameter(f"url must be {' or '.join(URLS)}, not {url[:100]!r}.", param="url")
    body = required(data, "body", OBJECT)
    for name in data:
        if name not in ("custom_id", "method", "url", "body"):
            raise InvalidFormat(f"{name[:100]!r} is not a key of a batch's line.", param=name[:100])
    if body.get("stream"):
        raise Unsupported("body.stream: a line of a batch is answered as a whole.", param="body.stream")
    return BatchLine(custom_id, url, body, digest)


def too_long(limit: int, digest: str) -> Refusal:
    """Refuse a line that exceeds the limit. `digest`: SHA-256 of its bytes."""
    return Refusal(None, InvalidFormat(f"The line has more than {limit} bytes, the limit."), digest)


def twice(line: BatchLine) -> Refusal:
    """Refuse a line whose `custom_id` an earlier line has."""
    return Refusal(
        line.custom_id,
        InvalidParameter("custom_id is that of an earlier line.", param="custom_id"),
        line.digest,
    )


def digest_of(line: BatchLine | Refusal, fingerprint: str, *, receipts: bool) -> str:
    """Digest what a line of the output depends on: 32 hex digits, the same in all ids of that line."""
    parts = (_VERSION, line.digest, fingerprint, "receipts" if receipts else "")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def line_id(digest: str) -> str:
    """Return the id of a line of the output."""
    return f"batch_req_{digest}"


def output_line(line: BatchLine | Refusal, digest: str, answer: Answer | None) -> bytes:
    """Write a line of the output. `answer`: None for a line that is no request."""
    if isinstance(line, Refusal):
        error = error_body(line.error.message, "invalid_request_error", line.error.param, line.error.code)["error"]
        data: dict[str, Any] = {"id": line_id(digest), "custom_id": line.custom_id, "response": None, "error": error}
    else:
        assert answer is not None
        response: dict[str, Any] = {"status_code": answer.status, "request_id": answer.request_id}
        if answer.ignored:
            response["ignored_fields"] = answer.ignored
        response["body"] = _without_load(answer.body)
        data = {"id": line_id(digest), "custom_id": line.custom_id, "response": response, "error": None}
    return to_json(data).encode() + b"\n"


def _without_load(body: dict[str, Any]) -> dict[str, Any]:
    """Leave out what depends on the other requests: how many tokens were in the prefix cache."""
    usage = body.get("usage")
    if isinstance(usage, dict):
        usage.pop("prompt_tokens_details", None)
    return body
