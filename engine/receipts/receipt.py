"""`Receipt`, the document: what was asked, of which model, in which environment, and what came of it.

Its bytes are its canonical form (RFC 8785), and its `digest` is the SHA-256 of that form without the digest.
docs/decisions/0026 describes the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.types.model_info import ReproducibilityReport
from engine.types.outputs import FinishReason

__all__ = ["ChoiceRecord", "Environment", "PromptRecord", "Receipt", "ServerRecord", "Stability", "read_receipt"]

VERSION: Final = 1
"""The version of the format that this code writes, and the only one that it reads."""

MOST_BYTES: Final = 64 << 20
"""Bytes of a receipt that is read."""

MOST_TOKENS: Final = 1 << 20
"""Token ids in a receipt that is read, prompt and choices together."""


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """The program that wrote a receipt."""

    name: str
    version: str
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """The prompt's tokens: how many, the SHA-256 over their ids (uint32, little endian), and the ids."""

    tokens: int
    sha256: str
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Environment:
    """Everything that the bits of a reply depend on beside the request: the fingerprint and its parts, by name."""

    fingerprint: str
    parts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stability:
    """How near a choice was to being another.

    Attributes:
        smallest: the smallest margin; None if no token had a rival.
        position: where it is, counted over the choice's tokens.
        near: how many margins are below 1e-3.
    """

    smallest: float | None
    position: int | None
    near: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRecord:
    """One finished choice.

    Attributes:
        tokens: how many token ids it has; sha256: over them, as in `PromptRecord`.
        token_ids: the ids; None in a receipt without text.
        scores: of each token that was drawn, the raw log-probability and the perturbed score, as float32, little
            endian, one pair after the other; None in a receipt without text.
        bits: the SHA-256 of `scores`.
        margins: see `ChoiceDelta.margins`; None unless the request asked for them.
    """

    index: int
    finish_reason: FinishReason
    tokens: int
    sha256: str
    bits: str
    token_ids: tuple[int, ...] | None = None
    scores: bytes | None = None
    margins: tuple[float | None, ...] | None = None
    stability: Stability | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The record of one request and its reply.

    Attributes:
        id: the completion's id; created: Unix seconds.
        request: the record of the request (`engine.receipts.request_record`); in a receipt without text
            `{"sha256": …}`, the digest of its canonical form.
        model: the manifest of the model's files: `{"name", "digest", "resources": [{"name", "algorithm", "digest"}]}`.
    """

    id: str
    created: int
    server: ServerRecord
    request: Mapping[str, Any]
    prompt: PromptRecord
    model: Mapping[str, Any]
    environment: Environment
    law: ReproducibilityReport
    choices: tuple[ChoiceRecord, ...]

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the canonical form of everything else, as 64 hex digits."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return the receipt as plain JSON data, its digest included."""
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """Return the canonical form of `to_json`: what is stored and signed."""
        raise NotImplementedError


def read_receipt(data: bytes) -> Receipt:
    """Read a receipt: its JSON, or a DSSE envelope that holds one, whose signature is not checked here.

    Raises:
        ReceiptError: it is too large, not JSON, not a receipt, altered, or of a version that this code does not know.
    """
    raise NotImplementedError
