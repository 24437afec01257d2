"""What the books are made of: keys, limits, prices, settled requests, and what can be wrong. Knows no database."""

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
"""Of a balance, an amount and a limit: what every reader of JSON keeps exactly."""


class LedgerFault(VerbatimError):
    """The database cannot be used: locked, full, damaged, gone. Nothing was changed."""

    code = "ledger_fault"


class Locked(LedgerFault):
    """The database works, and somebody else keeps a lock on what was to be written."""


class Unwritable(LedgerFault):
    """The database works, and will never take these values."""


class NoBalance(VerbatimError):
    """The key's balance does not cover the request."""

    code = "insufficient_balance"


class UnknownKey(VerbatimError):
    """No key has this id or name."""

    code = "unknown_key"


@dataclass(frozen=True, slots=True)
class Prices:
    """Of one token, in micro-credits. At one each, a balance counts tokens."""

    prompt: int = 1
    cached_prompt: int = 1
    completion: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one key; None is no limit of its own."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is stored: never the secret, which nobody can show again.

    `balance`: None is not metered. `held`: of it, set aside for requests that run. `models`: empty is all of them.
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

    def usable(self, now: float) -> bool:
        """Neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made, with the secret that is shown this once."""

    key: Key
    secret: str


@dataclass(frozen=True, slots=True)
class Settled:
    """A request that has ended: what it used and cost, and what is needed to repeat it. Never its text."""

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
    """What a request costs; cached tokens of the prompt have a price of their own."""
    cold, cached = usage.prompt_tokens - usage.cached_tokens, usage.cached_tokens
    return cold * prices.prompt + cached * prices.cached_prompt + usage.completion_tokens * prices.completion


def read_since(text: str | None) -> float | None:
    """A date (`2026-11-01`, from its first second UTC) or Unix seconds, as Unix seconds.

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
