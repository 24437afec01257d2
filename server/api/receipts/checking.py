"""Checks a receipt as one more request in the batch: admitted, charged and abandoned like any other.

Its tokens are computed as drafts, at the speed of a prompt, and so each is charged as one of a prompt. `replay`
generates them, at the price of a reply.
"""

from __future__ import annotations

import dataclasses
import functools
import secrets
from typing import Final

from fastapi import Request

from engine import (
    CheckReport,
    EngineProtocol,
    Mode,
    ModelStatus,
    PreparedRequest,
    Receipt,
    ReceiptCheck,
    RequestError,
    Unavailable,
    verify_envelope,
)
from server.accounts.account import Account, account_of
from server.accounts.authentication import key_of
from server.api.admission import Service
from server.api.generation import lease, unless_disconnected
from server.api.models.leasing import engine_of
from server.api.receipts.document import SentReceipt, parse_receipt
from server.errors import ClientGone

__all__ = ["check_sent_receipt"]

_STARTING: Final = ("waiting", "loading")
"""States of a model that may turn out to be the one that is wanted."""


async def check_sent_receipt(service: Service, request: Request, mode: Mode, tolerance: float) -> CheckReport:
    """Admit, read and check the receipt in a request's body.

    Raises:
        ReceiptError: it is no receipt, or an altered one.
        VerbatimError: the request is refused, or cannot be computed at the moment.
        ClientGone: the client left.
    """
    account = account_of(service.meter, key_of(request.scope))
    account.admit()
    async with service.bodies.of(request, account.group, parse_receipt) as checked:
        sent = await checked("check-" + secrets.token_hex(16))
        signed_by = await service.receipts.check(account.group, lambda: _signed_by(service, sent))
        engine = await _engine_for(service, account, request, sent.receipt)
        if engine is None:
            return dataclasses.replace(_no_model(sent.receipt, mode, tolerance), signed_by=signed_by)
        request.scope["state"]["told"] = {"model": engine.info.id, "completion": sent.request_id}
        checking = _Checking(service, account, engine, sent, tolerance)
        report = await unless_disconnected(checking.run(mode), request.receive)
    if report is None:
        raise ClientGone
    return dataclasses.replace(report, signed_by=signed_by)


class _Checking:
    """One check under way."""

    def __init__(
        self, service: Service, account: Account, engine: EngineProtocol, sent: SentReceipt, tolerance: float
    ) -> None:
        self._check = functools.partial(service.receipts.check, account.group)
        self._account, self._engine, self._sent, self._tolerance = account, engine, sent, tolerance
        self._metrics = service.metrics

    async def run(self, mode: Mode) -> CheckReport:
        """Check the receipt. A replay that draws another token elsewhere is followed by a `verify`, which tells why."""
        check, report = await self._once(mode, self._sent.request_id)
        if check.differs_elsewhere:
            _, followed = await self._once("verify", self._sent.request_id + "-1")
            report = dataclasses.replace(followed, mode=mode)
        return report

    async def _once(self, mode: Mode, request_id: str) -> tuple[ReceiptCheck, CheckReport]:
        engine, account = self._engine, self._account
        check = ReceiptCheck(
            self._sent.receipt, engine.info, mode=mode, tolerance=self._tolerance, text_of=engine.token_text
        )
        prepared = None
        try:
            request = await self._check(lambda: check.request(request_id, group=account.group))
            if request is not None:
                made = await engine.prepare(dataclasses.replace(request, context_limit=account.context_limit))
                prepared = await self._check(lambda: check.prepared(made))
            if prepared is not None:
                await self._compute(check, prepared)
        except RequestError as error:
            return check, check.refused(error)
        return check, await self._check(check.report)

    async def _compute(self, check: ReceiptCheck, prepared: PreparedRequest) -> None:
        self._account.admit_prompt(len(prepared.prompt_token_ids))
        watch = self._metrics.reply(self._engine.info.id)
        async with lease(self._engine, (prepared,), self._account, watch) as outputs:
            async for output in outputs:
                if isinstance(output.error, Unavailable):
                    raise output.error
                check.add(output)


def _signed_by(service: Service, sent: SentReceipt) -> str | None:
    """Return the id of this server's key if it has signed the receipt; None if it is signed by others, or not at all.

    Raises:
        ReceiptError: the signature is said to be this server's, and does not hold.
    """
    key, envelope = service.receipts.key, sent.envelope
    if key is None or envelope is None:
        return None
    signatures = envelope.get("signatures")
    named = [one.get("keyid") for one in signatures if isinstance(one, dict)] if isinstance(signatures, list) else []
    return verify_envelope(envelope, [key])[1] if key.keyid in named else None


async def _engine_for(service: Service, account: Account, request: Request, receipt: Receipt) -> EngineProtocol | None:
    """Return the engine that can say most about a receipt; None if no model here has its files or its name.

    A model that was never loaded is known by the name of its checkpoint, and loaded to see whether it has the files.

    Raises:
        ModelLoading: none that was loaded has, and one is still loading since the server has started.
        ClientGone, VerbatimError: as `engine_of`.
    """

    def nearness(status: ModelStatus) -> tuple[bool, bool, bool]:
        if status.info is None:
            named = status.outline is not None and status.outline.name == receipt.model.name
            return False, False, named and status.state != "failed"
        manifest = status.info.manifest
        return (
            manifest.files == receipt.model.files,
            status.info.system_fingerprint == receipt.environment.fingerprint,
            manifest.name == receipt.model.name,
        )

    usable = [status for status in service.registry.list() if account.may_use(status.id)]
    best = max(usable, key=nearness, default=None)
    if best is None or not any(nearness(best)):
        best = next((status for status in usable if status.info is None and status.state in _STARTING), None)
    return None if best is None else await engine_of(service.registry, account, request, best.id)


def _no_model(receipt: Receipt, mode: Mode, tolerance: float) -> CheckReport:
    return CheckReport(
        id=receipt.id,
        digest=receipt.digest,
        verdict="not_checkable",
        sentence=f"this server has no model with the files of the receipt's, {receipt.model.name!r:.200}.",
        mode=mode,
        model="",
        fingerprint="",
        tolerance=tolerance,
    )
