"""Sign receipts with Ed25519, and check signatures: a DSSE envelope around an in-toto Statement v1.

Keys, envelope and signature are securesystemslib's. Formats: https://github.com/secure-systems-lab/dsse and
https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import Error as SecurityError
from securesystemslib.signer import CryptoSigner, SSlibKey

from engine.errors import ReceiptError
from engine.receipts.canonical import Reader, canonical
from engine.receipts.reading import PAYLOAD_TYPE, PREDICATE_TYPE, STATEMENT_TYPE, of_statement, payload_of
from engine.receipts.receipt import Receipt

__all__ = ["generate_key", "load_private_key", "load_public_key", "public_pem", "sign_receipt", "verify_envelope"]

_MOST_KEY_BYTES: Final = 1 << 16
_MOST_SIGNATURES: Final = 16


def generate_key(path: Path) -> SSlibKey:
    """Write a new private key to `path` (PEM, PKCS 8, mode 0600) and its public half to `path` with `.pub` added.

    Raises:
        ReceiptError: a file is there already, or cannot be written.
    """
    signer = CryptoSigner.generate_ed25519()
    public = path.with_name(path.name + ".pub")
    if public.exists():
        raise ReceiptError(f"{public} exists already; a key is never overwritten.")
    _write_new(path, signer.private_bytes, 0o600)
    _write_new(public, public_pem(signer.public_key).encode(), 0o644)
    return signer.public_key


def _write_new(path: Path, content: bytes, mode: int) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise ReceiptError(f"{path} exists already; a key is never overwritten.") from None
    except OSError as error:
        raise ReceiptError(f"cannot write {path}: {error.strerror}.") from None
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def load_private_key(path: Path) -> CryptoSigner:
    """Load a private key.

    Raises:
        ReceiptError: the file cannot be read, or holds no Ed25519 key without a password.
    """
    try:
        key = load_pem_private_key(_key_bytes(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ReceiptError(f"{path} holds no private Ed25519 key in PEM without a password.")
    return CryptoSigner(key)


def load_public_key(path: Path) -> SSlibKey:
    """Load a public key (PEM).

    Raises:
        ReceiptError: the file cannot be read, or holds no Ed25519 key.
    """
    try:
        key = load_pem_public_key(_key_bytes(path))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ReceiptError(f"{path} holds no public Ed25519 key in PEM.")
    return SSlibKey.from_crypto(key)


def _key_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_KEY_BYTES)
    except OSError as error:
        raise ReceiptError(f"cannot read {path}: {error.strerror}.") from None


def public_pem(key: SSlibKey) -> str:
    """Return a public key as PEM."""
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.keyval["public"]))
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def sign_receipt(receipt: Receipt, key: CryptoSigner) -> dict[str, Any]:
    """Return the envelope of a signed receipt, as plain JSON data."""
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": receipt.id, "digest": {"sha256": receipt.digest}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": receipt.to_json(),
    }
    envelope = Envelope(canonical(statement), PAYLOAD_TYPE, {})
    envelope.sign(key)
    data: dict[str, Any] = envelope.to_dict()
    return data


def verify_envelope(envelope: dict[str, Any], keys: Sequence[SSlibKey]) -> tuple[Receipt, str]:
    """Check an envelope's signature; return its receipt and the id of the key that has signed it.

    The signature comes first: nothing of the payload is read before it holds.

    Raises:
        ReceiptError: it is no envelope, none of `keys` has signed it, or its payload is no receipt.
    """
    payload = payload_of(envelope)
    signatures = Reader(envelope, "the envelope", ("payload", "payloadType", "signatures")).list("signatures")
    if len(signatures) > _MOST_SIGNATURES:
        raise ReceiptError(f"the envelope holds {len(signatures)} signatures; at most {_MOST_SIGNATURES} are read.")
    try:
        read = Envelope.from_dict(copy.deepcopy(envelope))  # it takes its argument apart
    except (KeyError, TypeError, AttributeError, ValueError, SecurityError) as error:
        raise ReceiptError(f"the envelope's signatures cannot be read: {str(error)[:100]}.") from None
    known = {key.keyid for key in keys}
    if not known & set(read.signatures):
        raise ReceiptError("the receipt is not signed by the key that was given.")
    try:
        accepted = read.verify(list(keys), 1)
    except SecurityError:
        raise ReceiptError("the receipt's signature does not hold: the receipt or the signature was altered.") from None
    return of_statement(payload), next(iter(accepted))
