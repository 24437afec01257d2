"""`Receipt`, the document: what was asked, of which model, in which environment, and what came of it.

Its bytes are its canonical form (RFC 8785), and its `digest` is the SHA-256 of that form without the digest. So any
change is found, but whoever changes a receipt can compute the digest again: against forgers there is the signature.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from engine.errors import ReceiptError
from engine.receipts.canonical import canonical, sha256
from engine.types.fingerprint_parts import Parts
from engine.types.model_info import ReproducibilityReport
from engine.types.model_manifest import ModelManifest
from engine.types.outputs import ChoiceDelta, FinishReason

__all__ = [
    "NEAR",
    "VERSION",
    "ChoiceRecord",
    "Environment",
    "PromptRecord",
    "Receipt",
    "ServerRecord",
    "Stability",
    "checked_digest",
    "recorded_margins",
]

VERSION: Final = 1
"""The version of the format that this code writes, and the only one that it reads."""

NEAR: Final = 1e-3
"""A margin below this is counted by `Stability.near`."""


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """The program that wrote a receipt."""

    name: str
    version: str
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """The prompt's tokens.

    Attributes:
        tokens: how many there are; sha256: over their ids, each as a uint32, little endian.
        token_ids: the ids; None if they are left out.
    """

    tokens: int
    sha256: str
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Environment:
    """Everything that the bits of a reply depend on beside the request: the fingerprint and its parts, by name."""

    fingerprint: str
    parts: Parts


@dataclass(frozen=True, slots=True)
class Stability:
    """How near a choice was to being another.

    Attributes:
        smallest: the smallest margin; None if no token had a rival.
        position: where it is, counted over the choice's tokens.
        near: how many margins are below `NEAR`.
    """

    smallest: float | None
    position: int | None
    near: int

    @classmethod
    def of(cls, margins: tuple[float | None, ...]) -> Stability:
        known = [(margin, position) for position, margin in enumerate(margins) if margin is not None]
        smallest, position = min(known, default=(None, None))
        return cls(smallest, position, sum(margin < NEAR for margin, _ in known))


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
        model: the manifest of the model's files.
        law: whether the law held where the receipt was written.
        digest: SHA-256 of the canonical form of everything else, as 64 hexadecimal digits.

    Raises:
        ReceiptError: it holds what canonical JSON cannot write.
    """

    id: str
    created: int
    server: ServerRecord
    request: Mapping[str, Any]
    prompt: PromptRecord
    model: ModelManifest
    environment: Environment
    law: ReproducibilityReport
    choices: tuple[ChoiceRecord, ...]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", sha256(canonical(self._content())))

    @property
    def has_text(self) -> bool:
        """Whether the receipt holds the request and the reply, not only their digests."""
        return "sha256" not in self.request

    def to_json(self) -> dict[str, Any]:
        """Return the receipt as plain JSON data, its digest included."""
        return {**self._content(), "digest": self.digest}

    def to_bytes(self) -> bytes:
        """Return the canonical form of `to_json`: what is stored and signed."""
        return canonical(self.to_json())

    def _content(self) -> dict[str, Any]:
        server, model, law = self.server, self.model, self.law
        return {
            "version": VERSION,
            "id": self.id,
            "created": self.created,
            "server": {"name": server.name, "version": server.version, "commit": server.commit},
            "request": dict(self.request),
            "prompt": {
                "tokens": self.prompt.tokens,
                "sha256": self.prompt.sha256,
                **_given("token_ids", _listed(self.prompt.token_ids)),
            },
            "model": {"name": model.name, "digest": model.digest, "resources": model.predicate["resources"]},
            "environment": {"fingerprint": self.environment.fingerprint, "parts": dict(self.environment.parts)},
            "law": {
                "holds": law.holds,
                "reason": law.reason,
                "checks": [{"name": name, "holds": holds} for name, holds in law.checks],
            },
            "choices": [_choice_json(choice) for choice in self.choices],
        }


def _choice_json(choice: ChoiceRecord) -> dict[str, Any]:
    scores = None if choice.scores is None else base64.b64encode(choice.scores).decode()
    stable = choice.stability
    stability = stable and {"smallest": stable.smallest, "position": stable.position, "near": stable.near}
    return {
        "index": choice.index,
        "finish_reason": choice.finish_reason,
        "tokens": choice.tokens,
        "sha256": choice.sha256,
        "bits": choice.bits,
        **_given("token_ids", _listed(choice.token_ids)),
        **_given("scores", scores),
        **_given("margins", _listed(choice.margins)),
        **_given("stability", stability),
    }


def _given(name: str, value: Any) -> dict[str, Any]:
    return {} if value is None else {name: value}


def _listed(values: tuple[Any, ...] | None) -> list[Any] | None:
    return None if values is None else list(values)


def recorded_margins(delta: ChoiceDelta) -> Iterator[float | None]:
    """Return a delta's margins as a receipt holds them: an infinite one is one without a rival."""
    return (None if margin is None or math.isinf(margin) else margin for margin in delta.margins or ())


def checked_digest(receipt: Receipt, digest: str) -> Receipt:
    """Return a receipt whose digest is the one that its bytes tell.

    Raises:
        ReceiptError: the receipt was altered.
    """
    if receipt.digest != digest:
        raise ReceiptError(
            f"the receipt was altered: its digest is {digest[:16]}…, and its content has {receipt.digest[:16]}…."
        )
    return receipt
