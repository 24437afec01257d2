"""Keys as the command line prints them: as a table, or as JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from server.ledger.records import Key

__all__ = ["as_dict", "table_of"]


def as_dict(key: Key) -> dict[str, Any]:
    """Return a key as `--json` prints it, without its secret."""
    return {
        "id": key.id,
        "name": key.name,
        "shown": key.shown,
        "state": state_of(key),
        "created": key.created,
        "expires": key.expires,
        "revoked": key.revoked,
        "models": list(key.models),
        "admin": key.admin,
        "balance": key.balance,
        "held": key.held,
        **asdict(key.limits),
    }


def state_of(key: Key) -> str:
    """Return `good`, `revoked` or `expired`."""
    return key.state(time.time())  # noqa: TID251


def table_of(found: Sequence[Key]) -> Table:
    """Return keys as a table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "key", "state", "rights", "balance", "limits", "models"):
        table.add_column(column, overflow="fold", no_wrap=column in ("key", "state"))
    for key in found:
        limits = key.limits
        said = [
            (limits.requests_per_minute, "requests a minute"),
            (limits.tokens_per_minute, "tokens a minute"),
            (limits.concurrent, "at once"),
            (limits.context, "tokens of context"),
        ]
        balance = "" if key.balance is None else str(key.balance) + (f", {key.held} held" if key.held else "")
        table.add_row(
            escape(key.name),
            key.shown,
            state_of(key),
            "admin" if key.admin else "use",
            balance or "not metered",
            ", ".join(f"{number} {what}" for number, what in said if number) or "none",
            escape(", ".join(key.models) or "all"),
        )
    return table
