"""The account of one request: what it may ask for, and who pays for it. Exists for every request.

Where a server has keys it is a `KeyAccount`. Where it has none it is an `Account`, which allows everything and charges
nothing, so that no caller has to ask which of the two it has.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from engine import ModelInfo, ModelNotFound, PreparedRequest, RequestStream
from server.accounts.charging import Charge, Meter
from server.ledger.records import Key

__all__ = ["Account", "KeyAccount", "account_of"]


class Account:
    """The account of a request that came without a key: nothing is limited, held or charged.

    Attributes:
        group: identifies the key. Requests of different groups are scheduled fairly, and share no prompts in the
            prefix cache.
        context_limit: tokens of prompt and reply together that a request may have; None: as many as the model has.
        sent: whether a part of the reply has reached the client. Whoever sends it says so.
    """

    group = ""
    context_limit: int | None = None

    def __init__(self) -> None:
        self.sent = False

    def may_use(self, model: str) -> bool:
        """Return whether a model exists for this account."""
        return True

    def admit(self) -> None:
        """Count a request before its body is read.

        Raises:
            RateLimited: it is one too many in a minute.
            NoBalance: nothing is left to pay any request with.
        """

    def count(self) -> None:
        """Count a request that costs nothing, before its body is read.

        Raises:
            RateLimited: it is one too many in a minute.
        """

    def admit_model(self, model: str) -> None:
        """Raise `ModelNotFound` for a model that this account may not use."""

    def admit_prompt(self, tokens: int) -> None:
        """Count the tokens of a prompt.

        Raises:
            RateLimited: they are too many in a minute.
        """

    @asynccontextmanager
    async def charged(self, requests: Sequence[PreparedRequest], model: ModelInfo) -> AsyncIterator[None]:
        """Hold the most that a reply can cost while it is made; afterwards charge what was computed for it.

        `requests`: those of the engine that the reply is made of. They are charged as one.

        Raises:
            NoBalance: the balance does not cover it.
            RateLimited: more requests of the key would run than may run at once.
            LedgerFault: the database cannot be written.
        """
        yield

    def runs(self, outputs: RequestStream) -> None:
        """Note that the engine has accepted one of the requests and answers it with these outputs."""


class KeyAccount(Account):
    """The account of a request that came with a key."""

    def __init__(self, meter: Meter, key: Key) -> None:
        super().__init__()
        self._meter = meter
        self._key = key
        self._charge: Charge | None = None
        self.group = key.id
        self.context_limit = key.limits.context

    def may_use(self, model: str) -> bool:
        return not self._key.models or model in self._key.models

    def admit(self) -> None:
        self._meter.admit(self._key)

    def count(self) -> None:
        self._meter.limits.count_request(self._key)

    def admit_model(self, model: str) -> None:
        if not self.may_use(model):
            known = ", ".join(self._key.models)
            raise ModelNotFound(f"the model {model[:200]!r} does not exist; there is: {known}.", param="model")

    def admit_prompt(self, tokens: int) -> None:
        self._meter.limits.count_prompt(self._key, tokens)

    @asynccontextmanager
    async def charged(self, requests: Sequence[PreparedRequest], model: ModelInfo) -> AsyncIterator[None]:
        async with self._meter.charge(self._key, requests, model) as self._charge:
            try:
                yield
            finally:
                self._charge.sent = self.sent

    def runs(self, outputs: RequestStream) -> None:
        assert self._charge is not None, "a request runs inside `charged`"
        self._charge.outputs.append(outputs)


def account_of(meter: Meter | None, key: Key | None) -> Account:
    """Return the account of a request with this key."""
    return Account() if meter is None or key is None else KeyAccount(meter, key)
