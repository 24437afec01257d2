"""Who may manage a server: with keys the holder of an admin key, without keys its own machine."""

from __future__ import annotations

from typing import Any

import pytest
from ledger_for_tests import Clock

from server.accounts.charging import Meter
from server.accounts.managing import may_manage, require_management
from server.errors import ManagementNotAllowed, classify
from server.ledger.store import Ledger

HERE = ("127.0.0.1", 50000)
HOST = (b"host", b"127.0.0.1:8000")


def scope(client: Any = HERE, *headers: tuple[bytes, bytes], key: Any = None) -> dict[str, Any]:
    return {"type": "http", "client": client, "headers": list(headers), "state": {"key": key}}


@pytest.mark.parametrize(
    ("client", "headers", "allowed"),
    [
        (HERE, [HOST], True),
        (("127.8.9.1", 1), [HOST], True),
        (("::1", 1), [(b"host", b"[::1]:8000")], True),
        (("::ffff:127.0.0.1", 1), [(b"host", b"localhost")], True),
        (HERE, [], True),  # HTTP/1.0
        (("192.168.1.7", 1), [HOST], False),
        (("::ffff:192.168.1.7", 1), [HOST], False),
        (("fe80::1", 1), [HOST], False),
        (("127.0.0.1.evil.test", 1), [HOST], False),
        (("", 0), [HOST], False),
        (None, [HOST], False),
        (HERE, [(b"host", b"rebound.evil.test")], False),
        (HERE, [(b"host", b"127.0.0.1@evil.test")], False),
        (HERE, [HOST, (b"host", b"evil.test")], False),
        (HERE, [HOST, (b"x-forwarded-for", b"127.0.0.1")], False),
        (HERE, [HOST, (b"forwarded", b"for=127.0.0.1")], False),
        (HERE, [HOST, (b"via", b"1.1 proxy")], False),
        (("192.168.1.7", 1), [HOST, (b"x-forwarded-for", b"127.0.0.1")], False),
    ],
)
def test_without_keys_only_this_machine_manages(client: Any, headers: list[tuple[bytes, bytes]], allowed: bool) -> None:
    asked = scope(client, *headers)
    assert may_manage(asked, None) is allowed
    if allowed:
        require_management(asked, None)
        return
    with pytest.raises(ManagementNotAllowed) as refused:
        require_management(asked, None)
    assert classify(refused.value) == (403, "permission_error")
    assert refused.value.code == "management_not_allowed"


def test_with_keys_only_an_admin_key_manages(url: str) -> None:
    """Wherever the request comes from: who is on the machine has no rights by that."""
    ledger = Ledger(url, Clock())
    meter = Meter(ledger, {}, Clock())
    root, ada = ledger.create_key("root", admin=True), ledger.create_key("ada")
    for client in (HERE, ("192.168.1.7", 1), None):
        assert may_manage(scope(client, HOST, key=ledger.authenticate(root.secret)), meter)
        assert not may_manage(scope(client, HOST, key=ledger.authenticate(ada.secret)), meter)
        assert not may_manage(scope(client, HOST), meter)
        with pytest.raises(ManagementNotAllowed, match="--admin"):
            require_management(scope(client, HOST, key=ada.key), meter)
    ledger.revoke("root")
    assert ledger.authenticate(root.secret) is None
    meter.close()
