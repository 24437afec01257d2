"""Reads a receipt that a stranger sent to be checked: bytes → a `Receipt`. Counts its values before parsing them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine import InvalidParameter, Receipt, ReceiptError, document_of, read_receipt
from server.json_text import excess_in, excess_of, load_text

__all__ = ["SentReceipt", "parse_receipt"]


@dataclass(frozen=True, slots=True)
class SentReceipt:
    """A receipt that was sent. `request_id`: of the check; `envelope`: as it came, if it is signed."""

    request_id: str
    receipt: Receipt
    envelope: dict[str, Any] | None


def parse_receipt(raw: bytes, request_id: str) -> SentReceipt:
    """Parse and check a body: a receipt, its signed envelope, or a reply that holds either.

    Parsing many values would stop all other threads, so that the values are counted first: those of the body, of what
    an envelope holds, and of the JSON texts in a request.

    Raises:
        ReceiptError: it is no receipt, or an altered one.
        InvalidParameter: it holds too many values.
    """
    _refuse(excess_in(raw))
    document = document_of(raw)
    receipt = document
    if "payload" in document:
        payload = _decoded(document["payload"])
        _refuse(excess_in(payload))
        receipt = _statement(payload)
    _refuse(excess_of(_texts(receipt)))
    return SentReceipt(request_id, read_receipt(raw), document if "payload" in document else None)


def _refuse(excess: str) -> None:
    if excess:
        raise InvalidParameter(f"The receipt holds more than {excess}; at most that many are allowed here.")


def _decoded(payload: Any) -> bytes:
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise ReceiptError("the envelope's payload is not base64.") from None


def _statement(payload: bytes) -> dict[str, Any]:
    try:
        statement = load_text(payload.decode())
    except ValueError as error:
        raise ReceiptError(f"the signed statement is not JSON that is read here: {str(error)[:100]}.") from None
    found = statement.get("predicate") if isinstance(statement, dict) else None
    return found if isinstance(found, dict) else {}


def _texts(receipt: dict[str, Any]) -> Iterator[str]:
    """Yield the texts of a receipt that are parsed as JSON, as far as they are there."""
    request = receipt.get("request")
    if not isinstance(request, dict):
        return
    constraint, tools = request.get("constraint"), request.get("tools")
    found = [request.get("chat_template_kwargs"), constraint.get("value") if isinstance(constraint, dict) else None]
    found += [tool.get("parameters") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    yield from (text for text in found if isinstance(text, str))
