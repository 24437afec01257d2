"""`GET /machine` and `GET /keys`: the numbers of `/metrics`, for each only what is theirs to see."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Answer, call
from fakes import INFO, STATS, FakeEngine, chat, make_app
from ledger_for_tests import Clock

from engine import ModelStatus
from server.accounts.charging import Meter
from server.ledger.records import Limits
from server.ledger.store import Ledger
from server.metrics.facts import gpu_names

BUSY = dataclasses.replace(STATS, running=2, waiting=3, steps=9, preemptions=1, blocks_free=2, drafted_tokens=5)


def two_models() -> list[FakeEngine | ModelStatus]:
    return [FakeEngine(stats=BUSY), FakeEngine(info=dataclasses.replace(INFO, id="other"))]


@pytest.fixture
def keys(url: str) -> Iterator[Meter]:
    meter = Meter(Ledger(url, Clock()), {}, Clock())
    yield meter
    meter.close()


def ask(app: Any, path: str, secret: str = "", *headers: tuple[bytes, bytes]) -> Answer:
    given = [(b"authorization", f"Bearer {secret}".encode())] if secret else []
    return call(app, path=path, headers=[*given, *headers])


def test_the_numbers_are_those_of_the_engine() -> None:
    app = make_app(*two_models(), ModelStatus("slow", "loading", "1 of 2 GiB"))
    assert call(app, chat()).status == 200
    told = ask(app, "/api/v1/machine").json
    assert told["may_manage"] is True
    assert set(told["machine"]) == {"processor", "cores", "memory_bytes", "free_memory_bytes", "gpus"}
    assert 0 < told["machine"]["free_memory_bytes"] <= told["machine"]["memory_bytes"]
    busy, idle, slow = told["models"]
    assert (busy["id"], busy["state"], busy["running"], busy["waiting"], busy["preemptions"]) == (
        "fake",
        "ready",
        2,
        3,
        1,
    )
    assert busy["cache"] == {"usage": 0.75, "used_blocks": 6, "blocks": 8, "tokens": 4096}
    assert (busy["prompt_tokens"], busy["cached_tokens"], busy["generation_tokens"]) == (5, 2, 4)
    assert (busy["replies"]["complete"], busy["finish_reasons"]["stop"]) == (1, 1)
    assert (busy["system_fingerprint"], busy["reproducible"]["holds"]) == ("fp_fake", True)
    assert (idle["id"], idle["generation_tokens"]) == ("other", 0)
    assert (slow["state"], slow["detail"], slow["cache"], slow["running"]) == ("loading", "1 of 2 GiB", None, None)
    assert told["server"]["requests"] == 1
    assert told["server"]["ledger"] is None


@pytest.mark.parametrize("stats", [{"alive": False}, {"stalled": True}])
def test_an_engine_that_is_not_well_says_so(stats: dict[str, bool]) -> None:
    app = make_app(FakeEngine(stats=dataclasses.replace(STATS, **stats)))  # type: ignore[arg-type]
    [model] = ask(app, "/v1/machine").json["models"]
    assert model["state"] == ("stalled" if "stalled" in stats else "dead")


def test_a_key_sees_its_models_and_an_admin_everything(keys: Meter) -> None:
    root = keys._ledger.create_key("root", admin=True)
    ada = keys._ledger.create_key("ada", models=["other"])
    app = make_app(*two_models(), meter=keys)
    assert ask(app, "/v1/machine").status == 401
    hers = ask(app, "/v1/machine", ada.secret).json
    assert [model["id"] for model in hers["models"]] == ["other"]
    assert (hers["may_manage"], "server" in hers) == (False, False)
    everything = ask(app, "/v1/machine", root.secret).json
    assert [model["id"] for model in everything["models"]] == ["fake", "other"]
    assert everything["server"]["ledger"] == {
        "usable": True, "faults": 0, "settlements_waiting": 0, "settlements_set_aside": 0,
    }  # fmt: skip


def test_a_stranger_without_keys_sees_no_more_than_a_key() -> None:
    """A server that allows everybody, asked through a proxy."""
    app = make_app(allow_anonymous=True, host="0.0.0.0")
    told = ask(app, "/v1/machine", "", (b"x-forwarded-for", b"10.0.0.7")).json
    assert (told["may_manage"], "server" in told, len(told["models"])) == (False, False, 1)


def test_keys_are_for_admins(keys: Meter) -> None:
    root = keys._ledger.create_key("root", admin=True)
    ada = keys._ledger.create_key("ada", balance=100, limits=Limits(concurrent=2))
    app = make_app(meter=keys)
    assert ask(app, "/v1/keys").status == 401
    refused = ask(app, "/v1/keys", ada.secret)
    assert (refused.status, refused.error["code"]) == (403, "management_not_allowed")
    assert ask(make_app(), "/v1/keys").error["code"] == "no_keys"
    body = chat()
    assert call(app, body, headers=[(b"authorization", f"Bearer {ada.secret}".encode())]).status == 200
    keys._worker.submit(lambda: None).result()
    answer = ask(app, "/v1/keys", root.secret)
    other, one = sorted(answer.json["data"], key=lambda key: key["name"])
    assert (one["name"], one["admin"], one["balance"], one["usage"]["requests"]) == ("root", True, None, 0)
    assert (other["name"], other["admin"], other["balance"], other["limits"]["concurrent"]) == ("ada", False, 91, 2)
    assert other["usage"] == {
        "requests": 1, "prompt_tokens": 5, "cached_tokens": 2, "completion_tokens": 4, "cost": 9,
    }  # fmt: skip
    keys._ledger.revoke("ada")
    again = {key["name"]: key["state"] for key in ask(app, "/v1/keys", root.secret).json["data"]}
    assert again == {"ada": "revoked", "root": "good"}
    with keys._ledger._database.read() as connection:
        hashes = list(connection.exec_driver_sql("SELECT hash FROM keys").scalars())
    for secret in (root.secret, ada.secret, *hashes):
        assert secret.encode() not in answer.body


def test_gpus_are_read_from_the_drivers_files(tmp_path: Path) -> None:
    assert gpu_names(tmp_path / "none") == ()
    for bus, text in (("0000:01:00.0", "Model: \t\t NVIDIA H100\nIRQ: 7\n"), ("0000:02:00.0", "IRQ: 8\n")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(text)
    assert gpu_names(tmp_path) == ("NVIDIA H100",)
