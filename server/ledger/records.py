"""The records of the ledger: keys, limits, prices, settled requests, and its errors. Knows no database."""

from __future__ import annotations

import contextlib
import datetime as dt
import math
from dataclasses import dataclass
from typing import Final

from engine import InvalidParameter, Usage, VerbatimError

__all__ = [
    "LARGEST", "Key", "LedgerFault", "Limits", "Locked", "NewKey", "NoBalance", "Prices", "Settled",
    "UnknownKey", "Unwritable", "cost_of", "read_since",
]  # fmt: skip

LARGEST: Final = 2**53 - 1
"""The largest balance, amount and limit: every JSON reader represents integers up to this exactly."""


class LedgerFault(VerbatimError):
    """The database cannot be used: locked, full, damaged, gone. Nothing was changed."""

    code = "ledger_fault"


class Locked(LedgerFault):
    """The database works, but another process holds a lock on the row to be written."""


class Unwritable(LedgerFault):
    """The database works, but it cannot store these values."""


class NoBalance(VerbatimError):
    """The key's balance does not cover the request."""

    code = "insufficient_balance"


class UnknownKey(VerbatimError):
    """No key has this id or name."""

    code = "unknown_key"


@dataclass(frozen=True, slots=True)
class Prices:
    """The price of one token of each kind, in micro-credits. With the defaults a balance counts tokens."""

    prompt: int = 1
    cached_prompt: int = 1
    completion: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one key; None means no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is stored, without its secret.

    Attributes:
        shown: the beginning of the secret, to recognise it by.
        balance: None means that the key is not metered.
        held: the part of the balance that is set aside for running requests.
        models: the models that it may use; empty means all.
        admin: whether it may manage the server (`server/accounts/managing.py`).
    """

    id: str
    name: str
    shown: str
    created: float
    expires: float | None
    revoked: float | None
    models: tuple[str, ...]
    balance: int | None
    held: int
    limits: Limits
    admin: bool = False

    def usable(self, now: float) -> bool:
        """Return whether the key is neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)

    def state(self, now: float) -> str:
        """Return `good`, `revoked` or `expired`."""
        return "revoked" if self.revoked is not None else "good" if self.usable(now) else "expired"


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just created, with its secret."""

    key: Key
    secret: str


@dataclass(frozen=True, slots=True)
class Settled:
    """A request that has ended: what it used, what it cost, and what is needed to repeat it. Never its text."""

    request_id: str
    key_id: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cost: int
    seed: int
    fingerprint: str
    finish_reason: str
    started: float
    ended: float


def cost_of(usage: Usage, prices: Prices) -> int:
    """Return the cost of a request. Cached prompt tokens have their own price."""
    cold, cached = usage.prompt_tokens - usage.cached_tokens, usage.cached_tokens
    return cold * prices.prompt + cached * prices.cached_prompt + usage.completion_tokens * prices.completion


def read_since(text: str | None) -> float | None:
    """Parse a date (`2026-11-01`: its first second, UTC) or Unix seconds into Unix seconds.

    Raises:
        InvalidParameter: it is neither.
    """
    if text is None:
        return None
    try:
        return dt.datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=dt.UTC).timestamp()
    except ValueError:
        pass
    with contextlib.suppress(ValueError):
        if math.isfinite(seconds := float(text)):
            return seconds
    raise InvalidParameter(f"since must be a date like 2026-11-01 or Unix seconds, not {text[:100]!r}.", param="since")
