"""Decides who may manage the server: load and unload models, and see what concerns all of its users.

With keys it is whoever sends an admin key. Without keys it is whoever is on this machine: a connection from a loopback
address, for a loopback name, that no proxy says it has forwarded. A proxy on this machine that says nothing of its kind
cannot be told from a user here: such a server needs keys.
"""

from __future__ import annotations

from typing import Final

from starlette.types import Scope

from server.accounts.authentication import key_of
from server.accounts.charging import Meter
from server.errors import ManagementNotAllowed
from server.hosts import is_loopback, parse_authority

__all__ = ["may_manage", "require_management"]

_FORWARDED: Final = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via"})
"""Headers by which proxies say for whom they ask. They can be forged, but only to have less rights."""


def may_manage(scope: Scope, meter: Meter | None) -> bool:
    """Return whether the sender of an authenticated request may manage the server.

    Args:
        scope: the request's ASGI scope.
        meter: that of the server's keys; None: it has none.
    """
    if meter is not None:
        key = key_of(scope)
        return key is not None and key.admin
    client = scope.get("client")
    address = "" if client is None else str(client[0])
    if not _is_here(f"[{address}]" if ":" in address else address):
        return False
    hosts = [value.decode("latin-1").strip() for name, value in scope["headers"] if name == b"host"]
    if not all(map(_is_here, hosts)):
        return False  # a page whose name was made to resolve to this machine
    return not any(name in _FORWARDED for name, _ in scope["headers"])


def _is_here(authority: str) -> bool:
    """Return whether `host[:port]` always means this machine."""
    found = parse_authority(authority)
    return found is not None and is_loopback(found.name)


def require_management(scope: Scope, meter: Meter | None) -> None:
    """Refuse a request whose sender may not manage the server.

    Raises:
        ManagementNotAllowed: as `may_manage` says.
    """
    if may_manage(scope, meter):
        return
    if meter is not None:
        raise ManagementNotAllowed(
            "this needs an admin key, and the request's key is none: `verbatim keys create NAME --admin` makes one."
        )
    raise ManagementNotAllowed(
        "a server without keys lets only its own machine do this: send it there to 127.0.0.1 and through no proxy, or "
        "give the server keys, one of them made with --admin."
    )
