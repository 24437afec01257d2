"""Signed receipts: an envelope that other tools can read, and one sentence for whatever is wrong with one."""

from __future__ import annotations

import base64
import copy
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from receipts_for_tests import receipt_of
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey

from engine import (
    ReceiptError,
    generate_key,
    load_private_key,
    load_public_key,
    public_pem,
    read_receipt,
    sign_receipt,
    verify_envelope,
)
from engine.receipts.reading import PAYLOAD_TYPE


@pytest.fixture
def keys(tmp_path: Path) -> tuple[CryptoSigner, SSlibKey]:
    public = generate_key(tmp_path / "key")
    assert load_public_key(tmp_path / "key.pub").keyid == public.keyid
    return load_private_key(tmp_path / "key"), public


def test_a_signed_receipt_is_an_in_toto_statement(keys: tuple[CryptoSigner, SSlibKey]) -> None:
    receipt = receipt_of()
    envelope = sign_receipt(receipt, keys[0])
    statement = json.loads(base64.b64decode(envelope["payload"]))
    assert (envelope["payloadType"], statement["_type"]) == (PAYLOAD_TYPE, "https://in-toto.io/Statement/v1")
    assert statement["subject"] == [{"name": receipt.id, "digest": {"sha256": receipt.digest}}]
    assert statement["predicate"] == json.loads(receipt.to_bytes())
    before = copy.deepcopy(envelope)
    assert verify_envelope(envelope, [keys[1]]) == (receipt, keys[1].keyid)
    assert envelope == before
    assert read_receipt(json.dumps(envelope).encode()) == receipt


def test_a_key_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = generate_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert (tmp_path / "key.pub").read_text() == public_pem(key)
    with pytest.raises(ReceiptError, match="exists already"):
        generate_key(path)
    path.unlink()
    with pytest.raises(ReceiptError, match=r"key\.pub exists already"):
        generate_key(path)
    assert not path.exists()
    with pytest.raises(ReceiptError, match="cannot write"):
        generate_key(tmp_path / "nowhere" / "key")


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    generate_key(tmp_path / "key")
    (tmp_path / "noise").write_bytes(b"\0" * 100)
    other = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "other").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for name in ("noise", "key.pub", "other"):
        with pytest.raises(ReceiptError, match="holds no private Ed25519 key"):
            load_private_key(tmp_path / name)
    for name in ("noise", "key", "other"):
        with pytest.raises(ReceiptError, match="holds no public Ed25519 key"):
            load_public_key(tmp_path / name)
    with pytest.raises(ReceiptError, match="cannot read"):
        load_public_key(tmp_path / "nothing")


def test_another_key_has_not_signed(keys: tuple[CryptoSigner, SSlibKey], tmp_path: Path) -> None:
    stranger = generate_key(tmp_path / "stranger")
    envelope = sign_receipt(receipt_of(), keys[0])
    with pytest.raises(ReceiptError, match="is not signed by the key that was given"):
        verify_envelope(envelope, [stranger])
    with pytest.raises(ReceiptError, match="is not signed by the key that was given"):
        verify_envelope({**envelope, "signatures": []}, [stranger])
    assert verify_envelope(envelope, [stranger, keys[1]])[1] == keys[1].keyid


def _flip(text: str) -> str:
    data = bytearray(base64.b64decode(text))
    data[len(data) // 2] ^= 1
    return base64.b64encode(bytes(data)).decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(payload=_flip(e["payload"])), "signature does not hold"),
        (lambda e: e["signatures"][0].update(sig=_flip(e["signatures"][0]["sig"])), "signature does not hold"),
        (lambda e: e["signatures"][0].update(sig="AAAA"), "signature does not hold"),
        (lambda e: e["signatures"][0].update(sig=5), "signatures cannot be read"),
        (lambda e: e["signatures"][0].pop("sig"), "signatures cannot be read"),
        (lambda e: e.update(signatures=[1]), "signatures cannot be read"),
        (lambda e: e.update(signatures=[e["signatures"][0]] * 2), "signatures cannot be read"),
        (lambda e: e.update(signatures=[e["signatures"][0]] * 17), "at most 16 are read"),
        (lambda e: e.update(signatures={}), "signatures must be a list"),
        (lambda e: e.update(payloadType="text/plain"), "payload is 'text/plain'"),
        (lambda e: e.update(payload="#"), "payload is not base64"),
        (lambda e: e.update(more=1), "more is not known"),
        (lambda e: e.pop("payload"), "payload is missing"),
    ],
)
def test_a_broken_envelope(
    keys: tuple[CryptoSigner, SSlibKey], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    envelope = sign_receipt(receipt_of(), keys[0])
    change(envelope)
    with pytest.raises(ReceiptError, match=message):
        verify_envelope(envelope, [keys[1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"), "what is signed is 'https://slsa.dev"),
        (lambda s: s["subject"][0].update(name="other"), "about another receipt"),
        (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "about another receipt"),
        (lambda s: s["predicate"].update(created=6), "the receipt was altered"),
        (lambda s: s["predicate"].update(version=9), "version 9"),
        (lambda s: s.update(more=1), "the statement.more is not known"),
    ],
)
def test_another_payload_is_refused_even_if_the_signature_holds(
    keys: tuple[CryptoSigner, SSlibKey], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    import rfc8785

    statement = json.loads(base64.b64decode(sign_receipt(receipt_of(), keys[0])["payload"]))
    change(statement)
    envelope = Envelope(rfc8785.dumps(statement), PAYLOAD_TYPE, {})
    envelope.sign(keys[0])
    with pytest.raises(ReceiptError, match=message):
        verify_envelope(envelope.to_dict(), [keys[1]])


def test_a_signed_payload_must_be_canonical(keys: tuple[CryptoSigner, SSlibKey]) -> None:
    """What is signed are bytes: two spellings of one receipt would be two signed documents."""
    payload = base64.b64decode(sign_receipt(receipt_of(), keys[0])["payload"])
    for other in (payload + b"\n", payload.replace(b'"created":5', b'"created":5.0'), payload.replace(b":", b": ", 1)):
        envelope = Envelope(other, PAYLOAD_TYPE, {})
        envelope.sign(keys[0])
        with pytest.raises(ReceiptError, match="is not canonical JSON"):
            verify_envelope(envelope.to_dict(), [keys[1]])
