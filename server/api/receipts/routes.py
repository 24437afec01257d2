"""The endpoints of receipts: find one's own, list them, get the public key, have one checked."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine import MOST_TOLERANCE, TOLERANCE, InvalidParameter, Mode, public_pem
from server.accounts.account import account_of
from server.accounts.authentication import key_of
from server.api import openapi
from server.api.admission import Service
from server.api.receipts.checking import check_sent_receipt
from server.errors import ReceiptNotFound
from server.json_text import to_json
from server.receipts.keeping import page_size

__all__ = ["receipt_routes"]


def receipt_routes(service: Service) -> APIRouter:
    """Return the routes below `/receipts`."""
    router = APIRouter(prefix="/receipts")

    @router.get("", summary="The receipts that are kept for this key, newest first.", responses=openapi.RECEIPTS)
    async def receipts(request: Request, after: str | None = None, limit: str | None = None) -> dict[str, Any]:
        group = _counted(service, request)
        most = page_size(limit)
        found = await service.receipts.list(group, after, most + 1)
        shown = [
            {"id": one.id, "object": "receipt", "created": one.created, "model": one.model} for one in found[:most]
        ]
        return {"object": "list", "data": shown, "has_more": len(found) > most}

    @router.get("/key", summary="The public key that this server signs receipts with.", responses=openapi.RECEIPTS)
    async def key() -> dict[str, Any]:
        found = service.receipts.key
        if found is None:
            raise ReceiptNotFound(
                "this server does not sign receipts; `receipts: {sign: KEY.pem}` under `server:` in its models.yaml "
                "would."
            )
        return {"object": "receipt_key", "key_id": found.keyid, "public_key": public_pem(found)}

    @router.post(
        "/verify",
        summary="Check a receipt: compute its reply again as one more request, and compare.",
        openapi_extra={"requestBody": openapi.RECEIPT_BODY},
        responses=openapi.VERIFY,
        response_model=None,
    )
    async def verify(request: Request, mode: str = "verify", tolerance: str | None = None) -> Response:
        report = await check_sent_receipt(service, request, _mode(mode), _tolerance(tolerance))
        return Response(to_json(report.to_json()).encode(), media_type="application/json")

    @router.get("/{receipt_id}", summary="A kept receipt, as it was sent with its reply.", responses=openapi.RECEIPTS)
    async def receipt(receipt_id: str, request: Request) -> Response:
        group = _counted(service, request)
        return Response(await service.receipts.find(group, receipt_id), media_type="application/json")

    return router


def _counted(service: Service, request: Request) -> str:
    """Count a request that costs nothing, and return the group that its key is."""
    account = account_of(service.meter, key_of(request.scope))
    account.count()
    return account.group


def _mode(given: str) -> Mode:
    if given == "verify":
        return "verify"
    if given == "replay":
        return "replay"
    raise InvalidParameter(f"mode must be verify or replay, not {given[:100]!r}.", param="mode")


def _tolerance(given: str | None) -> float:
    try:
        found = TOLERANCE if given is None else float(given[:40])
    except ValueError:
        found = math.nan
    if not 0.0 <= found <= MOST_TOLERANCE:
        raise InvalidParameter(
            f"tolerance must be a number between 0 and {MOST_TOLERANCE:g}, not {str(given)[:100]!r}.", param="tolerance"
        )
    return found
