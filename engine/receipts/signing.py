"""Sign receipts with Ed25519, and check signatures: a DSSE envelope around an in-toto Statement v1.

Keys, envelope and signature are securesystemslib's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner, SSlibKey

from engine.receipts.receipt import Receipt

__all__ = ["generate_key", "load_private_key", "load_public_key", "public_pem", "sign_receipt", "verify_envelope"]


def generate_key(path: Path) -> SSlibKey:
    """Write a new private key to `path` (PEM, PKCS 8, mode 0600) and its public half to `path` with `.pub` added.

    Raises:
        ReceiptError: a file is there already, or cannot be written.
    """
    raise NotImplementedError


def load_private_key(path: Path) -> CryptoSigner:
    """Load a private key.

    Raises:
        ReceiptError: the file cannot be read, or holds no Ed25519 key without a password.
    """
    raise NotImplementedError


def load_public_key(path: Path) -> SSlibKey:
    """Load a public key (PEM).

    Raises:
        ReceiptError: the file cannot be read, or holds no Ed25519 key.
    """
    raise NotImplementedError


def public_pem(key: SSlibKey) -> str:
    """Return a public key as PEM."""
    raise NotImplementedError


def sign_receipt(receipt: Receipt, key: CryptoSigner) -> dict[str, Any]:
    """Return the envelope of a signed receipt, as plain JSON data."""
    raise NotImplementedError


def verify_envelope(envelope: dict[str, Any], keys: Sequence[SSlibKey]) -> tuple[Receipt, str]:
    """Check an envelope's signature; return its receipt and the id of the key that has signed it.

    Raises:
        ReceiptError: it is no envelope, none of `keys` has signed it, or its payload is no receipt.
    """
    raise NotImplementedError
