"""Read receipts that strangers wrote, within bounds. A receipt that was read does not contradict itself.

A receipt may be laid out for people, with line breaks and spaces: its content is digested, not its bytes. What is
signed are bytes, so a signed receipt must have its canonical form to the letter.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

from engine.errors import ReceiptError
from engine.receipts.canonical import Reader, canonical, digest_of_ids, normal, parse, sha256
from engine.receipts.receipt import (
    VERSION,
    ChoiceRecord,
    Environment,
    PromptRecord,
    Receipt,
    ServerRecord,
    Stability,
    checked_digest,
)
from engine.receipts.reply import is_reply
from engine.receipts.request_record import from_record, recorded_params
from engine.types.model_info import ReproducibilityReport
from engine.types.model_manifest import ModelManifest

__all__ = [
    "MOST_RECEIPT_BYTES",
    "MOST_TOKENS",
    "PAYLOAD_TYPE",
    "PREDICATE_TYPE",
    "STATEMENT_TYPE",
    "document_of",
    "documents_of",
    "of_statement",
    "payload_of",
    "read_document",
    "read_receipt",
    "receipt_of",
]

MOST_RECEIPT_BYTES: Final = 64 << 20
"""Bytes of a receipt that is read."""

MOST_TOKENS: Final = 1 << 20
"""Token ids in a receipt that is read, prompt and choices together."""

_MOST_FILES: Final = 100_000  # of a model
_MOST_PARTS: Final = 10_000  # of a fingerprint; checks of the law

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "urn:verbatim:receipt:v1"
"""What the statement of a signed receipt says. A name, not an address: nobody needs to own a domain for it."""


def read_receipt(data: bytes) -> Receipt:
    """Read a receipt: its JSON, or a DSSE envelope that holds one, whose signature is not checked here.

    A reply of the API that holds a receipt is read as well, and so is a line of a batch's output.

    Raises:
        ReceiptError: it is too large, not JSON, not a receipt, altered, or of a version that this code does not know.
    """
    return read_document(document_of(data))


def read_document(document: dict[str, Any]) -> Receipt:
    """Read a receipt, or the one in an envelope, from parsed JSON. A signature is not checked here.

    Raises:
        ReceiptError: as in `read_receipt`.
    """
    return of_statement(payload_of(document)) if "payload" in document else receipt_of(document)


def document_of(data: bytes) -> dict[str, Any]:
    """Return the receipt or envelope in a text, parsed and not yet checked.

    Raises:
        ReceiptError: it is too large, not JSON, or does not hold exactly one.
    """
    documents, _ = documents_of(data)
    if len(documents) != 1:
        raise ReceiptError(f"this is a reply with {len(documents)} receipts, where one is read.")
    return documents[0]


def documents_of(data: bytes) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return the receipts or envelopes in a text: one, or as many as a reply to several prompts has.

    The second value is the reply around them; None if there is none, or if it is not whole, as the end of a stream.

    Raises:
        ReceiptError: it is too large, not JSON, or holds none.
    """
    if len(data) > MOST_RECEIPT_BYTES:
        raise ReceiptError(f"the receipt has more than {MOST_RECEIPT_BYTES} bytes, which is the most that is read.")
    value = parse(data)
    inside, reply = False, None
    for name in ("response", "body"):  # a line of a batch's output; the event that ends the stream of a response
        if _is_outside(value) and name in value:
            value, inside = value[name], True
    if _is_outside(value):  # a reply of the API
        inside = inside or "choices" in value or value.get("object") == "response" or value.get("type") == "message"
        reply = value if is_reply(value) else None
        value = value.get("receipts", value.get("receipt", None if inside else value))
    found = value if isinstance(value, list) else [value]
    if inside and found in ([], [None]):
        raise ReceiptError("this is a reply without a receipt.")
    if not all(isinstance(one, dict) and ("version" in one or "payload" in one) for one in found) or not found:
        raise ReceiptError("this is JSON, but not a receipt: it has no version.")
    return found, reply


def _is_outside(value: Any) -> bool:
    """Return whether JSON is an object around a receipt, not a receipt or an envelope itself."""
    return isinstance(value, dict) and "version" not in value and "payload" not in value


def payload_of(envelope: dict[str, Any]) -> bytes:
    """Return the payload of a DSSE envelope whose payload is an in-toto statement."""
    read = Reader(envelope, "the envelope", ("payload", "payloadType", "signatures"))
    if read.text("payloadType") != PAYLOAD_TYPE:
        raise ReceiptError(f"the envelope's payload is {read.text('payloadType')!r:.80}, not {PAYLOAD_TYPE!r}.")
    return _bytes_of(read.text("payload"), "the envelope's payload")


def of_statement(payload: bytes) -> Receipt:
    """Return the receipt of an in-toto statement, whose bytes must be its canonical form.

    Raises:
        ReceiptError: they are not, or it is a statement about something else.
    """
    value = parse(payload, "the signed statement")
    if canonical(value) != payload:
        raise ReceiptError("the signed statement is not canonical JSON (RFC 8785).")
    read = Reader(value, "the statement", ("_type", "subject", "predicateType", "predicate"))
    if read.any("_type") != STATEMENT_TYPE or read.any("predicateType") != PREDICATE_TYPE:
        raise ReceiptError(
            f"what is signed is {read.any('predicateType')!r:.80}, not a receipt of this version, {PREDICATE_TYPE!r}."
        )
    receipt = receipt_of(read.any("predicate"))
    if read.any("subject") != [{"name": receipt.id, "digest": {"sha256": receipt.digest}}]:
        raise ReceiptError("the signed statement is about another receipt than the one that it holds.")
    return receipt


def receipt_of(value: Any) -> Receipt:
    """Return the receipt of parsed JSON.

    Raises:
        ReceiptError: it is not one.
    """
    value = normal(value)
    if not isinstance(value, dict) or "version" not in value:
        raise ReceiptError("this is JSON, but not a receipt: it has no version.")
    if value["version"] != VERSION or isinstance(value["version"], bool):
        raise ReceiptError(f"the receipt has version {value['version']!r:.40}; this program reads version {VERSION}.")
    read = Reader(
        value,
        "",
        ("version", "id", "created", "server", "request", "prompt", "model", "environment", "law", "choices", "digest"),
    )
    receipt = Receipt(
        id=read.text("id"),
        created=read.integer("created"),
        server=_server(read.any("server")),
        request=read.object("request"),
        prompt=_prompt(read.any("prompt")),
        model=_model(read.any("model")),
        environment=_environment(read.any("environment")),
        law=_law(read.any("law")),
        choices=tuple(_choice(choice, f"choices.{i}") for i, choice in enumerate(read.list("choices"))),
    )
    checked_digest(receipt, read.sha256("digest"))
    _check_whole(receipt)
    return receipt


def _check_whole(receipt: Receipt) -> None:
    """Refuse a receipt whose parts contradict each other."""
    tokens = receipt.prompt.tokens + sum(choice.tokens for choice in receipt.choices)
    if tokens > MOST_TOKENS:
        raise ReceiptError(f"the receipt holds {tokens} tokens; at most {MOST_TOKENS} are read.")
    if [choice.index for choice in receipt.choices] != list(range(len(receipt.choices))):
        raise ReceiptError("choices must be numbered from 0.")
    if not receipt.has_text:
        Reader(receipt.request, "request", ("sha256",)).sha256("sha256")
        if receipt.prompt.token_ids or any(choice.token_ids or choice.scores for choice in receipt.choices):
            raise ReceiptError("the receipt holds tokens, but only the digest of its request.")
        return
    params = recorded_params(from_record(receipt.request, receipt.id))
    if params.n != len(receipt.choices):
        raise ReceiptError(f"the request asks for {params.n} choices, and the receipt holds {len(receipt.choices)}.")
    for choice in receipt.choices:
        where = f"choices.{choice.index}"
        if choice.token_ids is None or choice.scores is None:
            raise ReceiptError(f"{where} lacks token_ids or scores, though the receipt holds its request.")
        if choice.tokens > (params.max_tokens or 0):
            raise ReceiptError(f"{where} has {choice.tokens} tokens, more than max_tokens, {params.max_tokens}.")
        if not choice.tokens and params.max_tokens:
            raise ReceiptError(
                f"{where} has no tokens, but max_tokens is {params.max_tokens}: a reply has at least one."
            )
        if choice.stability is not None and choice.margins is None:
            raise ReceiptError(f"{where} holds stability, but not the margins that it is of.")
        if (choice.margins is not None) != params.margins:
            raise ReceiptError(f"{where} must hold margins if the request asks for them, and only then.")


def _server(value: Any) -> ServerRecord:
    read = Reader(value, "server", ("name", "version", "commit"))
    return ServerRecord(read.text("name"), read.text("version"), read.text_or_none("commit"))


def _prompt(value: Any) -> PromptRecord:
    read = Reader(value, "prompt", ("tokens", "sha256"), ("token_ids",))
    return PromptRecord(read.integer("tokens", 1), read.sha256("sha256"), _ids(read))


def _ids(read: Reader) -> tuple[int, ...] | None:
    """Return the token ids of an object, if it has them: as many as it says, with the digest that it says."""
    if not read.has("token_ids"):
        return None
    ids = read.ids("token_ids")
    if len(ids) != read.integer("tokens") or digest_of_ids(ids) != read.sha256("sha256"):
        raise ReceiptError(f"{read.where}: tokens and sha256 are not those of token_ids.")
    return ids


def _model(value: Any) -> ModelManifest:
    read = Reader(value, "model", ("name", "digest", "resources"))
    files = []
    for i, resource in enumerate(read.list("resources")[: _MOST_FILES + 1]):
        one = Reader(resource, f"model.resources.{i}", ("name", "algorithm", "digest"))
        one.one_of("algorithm", "sha256")
        files.append((one.text("name"), one.sha256("digest")))
    if len(files) > _MOST_FILES:
        raise ReceiptError(f"model.resources holds more than {_MOST_FILES} files.")
    manifest = ModelManifest(read.text("name"), tuple(files))
    if manifest != ModelManifest.of(manifest.name, dict(files)):
        raise ReceiptError("model.resources must name each file once, in the order of their paths.")
    if manifest.digest != read.any("digest"):
        raise ReceiptError("model.digest is not that of its files.")
    return manifest


def _environment(value: Any) -> Environment:
    read = Reader(value, "environment", ("fingerprint", "parts"))
    parts = read.object("parts")
    if len(parts) > _MOST_PARTS or not all(
        part is None or isinstance(part, str | int | float) for part in parts.values()
    ):
        raise ReceiptError(f"environment.parts must be at most {_MOST_PARTS} texts, numbers, true, false or null.")
    return Environment(read.text("fingerprint"), parts)


def _law(value: Any) -> ReproducibilityReport:
    read = Reader(value, "law", ("holds", "reason", "checks"))
    checks = [Reader(one, f"law.checks.{i}", ("name", "holds")) for i, one in enumerate(read.list("checks"))]
    law = ReproducibilityReport(
        read.flag("holds"), read.text("reason"), tuple((one.text("name"), one.flag("holds")) for one in checks)
    )
    # The other way round is possible: a backend may promise less than the checks find.
    if law.holds and not all(holds for _, holds in law.checks):
        raise ReceiptError("law.holds is true, though one of law.checks does not hold.")
    return law


def _choice(value: Any, where: str) -> ChoiceRecord:
    names = ("index", "finish_reason", "tokens", "sha256", "bits")
    read = Reader(value, where, names, ("token_ids", "scores", "margins", "stability"))
    finish: Any = read.one_of("finish_reason", "stop", "length", "tool_calls")
    tokens, bits = read.integer("tokens"), read.sha256("bits")
    scores = _bytes_of(read.text("scores"), f"{where}.scores") if read.has("scores") else None
    if scores is not None and (len(scores) % 8 or len(scores) > 8 * tokens):
        raise ReceiptError(f"{where}.scores must hold a pair of float32 for at most each token.")
    if scores is not None and sha256(scores) != bits:
        raise ReceiptError(f"{where}.bits is not the digest of its scores.")
    margins = _margins(read, tokens) if read.has("margins") else None
    stability = _stability(read.any("stability"), where) if read.has("stability") else None
    if margins is not None and Stability.of(margins) != stability:
        raise ReceiptError(f"{where}.stability is not that of its margins.")
    return ChoiceRecord(
        index=read.integer("index"),
        finish_reason=finish,
        tokens=tokens,
        sha256=read.sha256("sha256"),
        bits=bits,
        token_ids=_ids(read),
        scores=scores,
        margins=margins,
        stability=stability,
    )


def _margins(read: Reader, tokens: int) -> tuple[float | None, ...]:
    margins = read.list("margins")
    known = [margin for margin in margins if margin is not None]
    if len(margins) != tokens or any(isinstance(m, bool) or not isinstance(m, int | float) for m in known):
        raise ReceiptError(f"{read.where}.margins must hold a number or null for each token.")
    return tuple(None if margin is None else float(margin) for margin in margins)


def _stability(value: Any, where: str) -> Stability:
    read = Reader(value, f"{where}.stability", ("smallest", "position", "near"))
    smallest, near = read.any("smallest"), read.integer("near")
    if smallest is None:
        if read.any("position") is not None or near:
            raise ReceiptError(f"{read.where} has a position or a count, but no smallest margin.")
        return Stability(None, None, 0)
    if isinstance(smallest, bool) or not isinstance(smallest, int | float):
        raise ReceiptError(f"{read.where}.smallest must be a number or null.")
    return Stability(float(smallest), read.integer("position"), near)


def _bytes_of(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ReceiptError(f"{where} is not base64.") from None
