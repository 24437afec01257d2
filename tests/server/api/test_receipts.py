"""Receipts at the endpoints, over a scripted engine: when they are made, what tells of them, and who finds them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import CHAT, Answer, begin, call, run
from fakes import HELLO, INFO, FakeEngine, FakeRegistry, chat, output, word_by_word
from ledger_for_tests import Clock

from engine import (
    ChoiceDelta,
    EngineDead,
    ModelManifest,
    ModelStatus,
    Receipt,
    fingerprint_of,
    generate_key,
    load_private_key,
    load_public_key,
    read_receipt,
    verify_envelope,
)
from server.accounts.charging import Meter
from server.api.receipts.document import parse_receipt
from server.app import create_app
from server.errors import KeepingFault
from server.ledger.records import Limits, Prices
from server.ledger.store import Ledger
from server.receipts.folder import FolderKeeper
from server.receipts.keeping import Keeper, Kept, LedgerKeeper, Written
from server.receipts.service import Receipts
from server.settings import ReceiptSettings, ServerSettings

VERIFY = "/v1/receipts/verify"
KEPT = ReceiptSettings(keep="here")


def make(*engines: FakeEngine | ModelStatus, meter: Meter | None = None, clock: Any = None, **receipts: Any) -> Any:
    """An application whose receipts are made as said; `settings`, `keeper` and `signer` as `Receipts` has them."""
    registry: Any = FakeRegistry(*(engines or (FakeEngine(),)))
    made = Receipts(receipts.pop("settings", None), clock=clock or Clock(), **receipts)
    return create_app(registry, ServerSettings(), meter, made)


def last_chunk(answer: Answer) -> dict[str, Any]:
    chunk, done = answer.events[-2:]
    assert done == "[DONE]"
    assert isinstance(chunk, dict)
    return chunk


def read(value: Any) -> Receipt:
    return read_receipt(json.dumps(value).encode())


@pytest.fixture
def keeper(tmp_path: Path) -> FolderKeeper:
    return FolderKeeper(tmp_path / "kept")


class BadKeeper(Keeper):
    """Cannot keep anything, for now."""

    def __init__(self) -> None:
        self.works = False
        self.gate: threading.Event | None = None

    def put(self, owner: str, written: Written) -> None:
        if self.gate is not None:
            self.gate.wait(30)
        if not self.works:
            raise KeepingFault("no space left on device: /secret/place")

    def get(self, owner: str | None, id: str) -> bytes | None:
        raise KeepingFault("input/output error: /secret/place")

    def list(self, owner: str | None, after: str | None, most: int) -> list[Kept]:
        raise KeepingFault("input/output error: /secret/place")

    def sweep(self, before: float) -> int:
        return 0

    def close(self) -> None:
        pass


# -- made with a reply ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"receipt": False}, {"receipt": None}])
def test_nothing_is_recorded_unless_asked_for(asked: dict[str, Any]) -> None:
    engine = FakeEngine()
    answer = call(make(engine), chat(**asked))
    assert "receipt" not in answer.json
    assert not engine.requests[0].record
    assert engine.requests[0].clock is None


def test_a_receipt_is_beside_the_usage_and_holds_every_choice() -> None:
    engine = FakeEngine()
    answer = call(make(engine), chat(receipt=True, n=2))
    receipt = read(answer.json["receipt"])
    assert engine.requests[0].record
    assert engine.requests[0].clock is not None
    assert (receipt.id, receipt.created) == (answer.json["id"], answer.json["created"])
    assert [choice.token_ids for choice in receipt.choices] == [(0, 1, 2, 3)] * 2
    assert receipt.request["sampling"]["seed"] == answer.json["seed"]
    assert receipt.prompt.token_ids == tuple(range(5))
    assert list(answer.json)[-2:] == ["usage", "receipt"]
    assert read_receipt(answer.body) == receipt, "a reply that was saved can be checked as it is"


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_ends_with_the_receipt(usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    answer = call(make(), chat(receipt=True, stream=True, **options))
    chunk = last_chunk(answer)
    assert chunk["choices"] == []
    assert ("usage" in chunk) == usage
    assert read(chunk["receipt"]).choices[0].token_ids == (0, 1, 2, 3)
    assert sum("receipt" in one for one in answer.events[:-1]) == 1


def test_both_ways_of_sending_give_the_same_receipt() -> None:
    whole = call(make(), chat(receipt=True, seed=3)).json["receipt"]
    streamed = last_chunk(call(make(), chat(receipt=True, seed=3, stream=True)))["receipt"]
    for one in (whole, streamed):
        for name in ("id", "created", "digest"):
            del one[name]
        del one["request"]["clock"]
    assert whole == streamed


def test_a_receipt_without_text_holds_no_text_and_no_token() -> None:
    answer = call(make(), chat(receipt="digest", messages=[{"role": "user", "content": "a secret word"}]))
    receipt = read(answer.json["receipt"])
    assert not receipt.has_text
    assert "secret" not in json.dumps(answer.json["receipt"])
    assert "token_ids" not in json.dumps(answer.json["receipt"])
    assert "x-receipt-form" not in answer.headers


def test_a_server_that_makes_none_with_text_says_that_it_sends_another_form() -> None:
    answer = call(make(settings=ReceiptSettings(text=False)), chat(receipt=True))
    assert not read(answer.json["receipt"]).has_text
    assert answer.headers["x-receipt-form"] == "digest"


@pytest.mark.parametrize(("value", "status"), [("full", 422), ("", 422), (1, 400), ([], 400), ({}, 400)])
def test_other_values_are_refused_by_name(value: Any, status: int) -> None:
    answer = call(make(), chat(receipt=value))
    assert (answer.status, answer.error["param"]) == (status, "receipt")


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_fails_has_no_receipt_and_keeps_none(keeper: FolderKeeper, stream: bool) -> None:
    def fails(request: Any) -> Iterator[Any]:
        yield output(request, [ChoiceDelta(0, "Hel", (0,))], 1)
        yield output(request, [], 1, finished=True, error=EngineDead("the engine has stopped"))

    answer = call(make(FakeEngine(fails), settings=KEPT, keeper=keeper), chat(receipt=True, stream=stream))
    assert b"receipt" not in answer.body
    assert keeper.list(None, None, 9) == []


def test_a_client_that_leaves_gets_none_and_frees_its_place(keeper: FolderKeeper) -> None:
    engine = FakeEngine(lambda request: (None,))
    app = make(engine, settings=ReceiptSettings(keep="here", always=True), keeper=keeper)

    async def main() -> None:
        exchange = begin(app, chat(receipt=True))
        await exchange.until(lambda: bool(engine.open))
        exchange.disconnect()
        await exchange.until(lambda: bool(engine.freed))

    run(main())
    assert keeper.list(None, None, 9) == []


def test_the_prompts_of_a_completion_have_one_each() -> None:
    body = {"model": "fake", "prompt": ["a", "b"], "n": 2, "receipt": True}
    answer = call(make(), body, path="/v1/completions")
    first, second = (read(one) for one in answer.json["receipts"])
    assert (first.id, second.id) == (answer.json["id"], answer.json["id"] + "-1")
    assert [len(one.choices) for one in (first, second)] == [2, 2]
    assert (first.request["prompt"], second.request["prompt"]) == ("a", "b")
    single = call(make(), {**body, "prompt": "a"}, path="/v1/completions")
    assert read(single.json["receipt"]).request["prompt"] == "a"


# -- signed -----------------------------------------------------------------------------------------------------------


def test_a_signed_receipt_is_an_envelope_that_the_public_key_opens(tmp_path: Path) -> None:
    generate_key(tmp_path / "key")
    app = make(signer=load_private_key(tmp_path / "key"))
    answer = call(app, chat(receipt=True))
    public = call(app, path="/v1/receipts/key").json
    (tmp_path / "public").write_text(public["public_key"])
    receipt, signer = verify_envelope(answer.json["receipt"], [load_public_key(tmp_path / "public")])
    assert (receipt.id, signer) == (answer.json["id"], public["key_id"])
    assert read_receipt(answer.body) == receipt
    streamed = last_chunk(call(app, chat(receipt=True, stream=True)))["receipt"]
    assert verify_envelope(streamed, [load_public_key(tmp_path / "public")])


def test_a_server_that_does_not_sign_says_how_it_would() -> None:
    answer = call(make(), path="/api/v1/receipts/key")
    assert (answer.status, answer.error["code"]) == (404, "receipt_not_found")
    assert "sign: KEY.pem" in answer.error["message"]


# -- kept and found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
def test_a_kept_receipt_is_found_as_it_was_sent(keeper: FolderKeeper, prefix: str) -> None:
    app = make(settings=KEPT, keeper=keeper)
    sent = call(app, chat(receipt=True)).json
    found = call(app, path=f"{prefix}/receipts/{sent['id']}")
    assert (found.status, found.json) == (200, sent["receipt"])
    call(app, chat())
    listed = call(app, path=f"{prefix}/receipts").json
    [one] = listed["data"]
    assert (one["id"], one["created"], listed["has_more"]) == (sent["id"], sent["created"], False)


def test_always_keeps_a_receipt_that_is_not_sent(keeper: FolderKeeper) -> None:
    app = make(settings=ReceiptSettings(keep="here", always=True), keeper=keeper)
    answer = call(app, chat())
    assert "receipt" not in answer.json
    assert read(call(app, path=f"/v1/receipts/{answer.json['id']}").json).has_text


def test_a_server_without_text_keeps_none(keeper: FolderKeeper) -> None:
    app = make(settings=ReceiptSettings(keep="here", always=True, text=False), keeper=keeper)
    call(app, chat(messages=[{"role": "user", "content": "a secret word"}]))
    [one] = keeper.list(None, None, 9)
    assert b"secret" not in (keeper.get(None, one.id) or b"")


def test_a_list_comes_in_pages(keeper: FolderKeeper) -> None:
    for number in range(5):
        keeper.put("anonymous", Written(f"chatcmpl-{number}", "m", 1_800_000_000 + number, b"{}"))
    app = make(settings=KEPT, keeper=keeper)
    first = call(app, path="/v1/receipts", query=b"limit=3").json
    rest = call(app, path="/v1/receipts", query=b"limit=3&after=" + first["data"][-1]["id"].encode()).json
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert [one["id"][-1] for one in first["data"] + rest["data"]] == ["4", "3", "2", "1", "0"]
    for wrong in (b"0", b"101", b"-1", b"x", b"1e1", b""):
        answer = call(app, path="/v1/receipts", query=b"limit=" + wrong)
        assert (answer.status, answer.error["param"]) == (422, "limit")


def test_a_server_that_keeps_none_says_how_it_would() -> None:
    for path in ("/v1/receipts", "/v1/receipts/chatcmpl-1"):
        answer = call(make(), path=path)
        assert answer.status == 404
        assert "keep: FOLDER" in answer.error["message"]


@pytest.mark.parametrize("id", ["..", "%2e%2e%2fx", "chatcmpl-0", "x" * 300])
def test_an_unknown_id_is_not_found(keeper: FolderKeeper, id: str) -> None:
    assert call(make(settings=KEPT, keeper=keeper), path=f"/v1/receipts/{id}").status == 404


def test_old_receipts_are_deleted_at_the_start(keeper: FolderKeeper) -> None:
    now = Clock()
    keeper.put("anonymous", Written("chatcmpl-1", "m", int(now()) - 3 * 86_400, b"{}"))
    keeper.put("anonymous", Written("chatcmpl-2", "m", int(now()) - 86_400, b"{}"))
    receipts = Receipts(ReceiptSettings(keep="here", days=2), clock=now, keeper=keeper)
    wait_for(lambda: len(keeper.list(None, None, 9)) == 1)
    receipts.close()
    assert [one.id for one in keeper.list(None, None, 9)] == ["chatcmpl-2"]


def wait_for(condition: Any) -> None:
    for _ in range(12000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not happen")


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_reply_is_not_lost_with_its_receipt(caplog: pytest.LogCaptureFixture) -> None:
    """The disk is full: the reply comes, with its receipt, and says that it was not kept. The log says it once."""
    keeper = BadKeeper()
    app = make(settings=KEPT, keeper=keeper)
    for _ in range(3):
        answer = call(app, chat(receipt=True))
        assert answer.status == 200
        assert read(answer.json["receipt"])
        assert answer.headers["x-receipt-kept"] == "false"
    assert "receipt" in last_chunk(call(app, chat(receipt=True, stream=True)))
    assert caplog.text.count("receipts cannot be kept") == 1
    health = call(app, path="/health/ready")
    assert health.status == 200, "replies can be made"
    assert health.json["receipts"] == "cannot be kept; see the log"
    assert health.json["receipts_not_kept"] == 4
    keeper.works = True
    assert "x-receipt-kept" not in call(app, chat(receipt=True)).headers
    assert "receipts" not in call(app, path="/health/ready").json
    assert caplog.text.count("receipts are kept again; 4 were not") == 1


def test_a_ledger_that_is_locked_does_not_hold_replies(
    file: Path, file_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.ledger.database.BUSY_SECONDS", 0.05)
    app = make(settings=ReceiptSettings(keep="ledger"), keeper=LedgerKeeper(Ledger(file_url, clock)))
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        answer = call(app, chat(receipt=True))
        assert (answer.status, answer.headers["x-receipt-kept"]) == (200, "false")
        assert read(answer.json["receipt"])
        other.execute("ROLLBACK")
    sent = call(app, chat(receipt=True))
    assert "x-receipt-kept" not in sent.headers
    assert call(app, path=f"/v1/receipts/{sent.json['id']}").json == sent.json["receipt"]


def test_a_disk_that_hangs_does_not_hold_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.receipts.service._PATIENCE", 0.05)
    monkeypatch.setattr("server.receipts.service._MOST_WAITING", 3)
    keeper = BadKeeper()
    keeper.gate, keeper.works = threading.Event(), True
    app = make(settings=KEPT, keeper=keeper)

    async def main() -> None:
        for _ in range(5):
            answer = await begin(app, chat(receipt=True)).ended(5.0)
            assert (answer.status, answer.headers["x-receipt-kept"]) == (200, "false")
        assert keeper.gate is not None
        keeper.gate.set()
        wait = begin(app, chat(receipt=True))
        await wait.ended(5.0)

    run(main())


def test_a_fault_is_told_without_its_places() -> None:
    app = make(settings=KEPT, keeper=BadKeeper())
    for path in ("/v1/receipts", "/v1/receipts/chatcmpl-1"):
        answer = call(app, path=path)
        assert (answer.status, answer.error["code"]) == (503, "receipts_unavailable")
        assert "retry-after" in answer.headers
        assert b"secret" not in answer.body


# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_finds_its_own_receipts_only(keeper: FolderKeeper, file_ledger: Ledger, clock: Clock) -> None:
    mine, other = file_ledger.create_key("mine"), file_ledger.create_key("other")
    app = make(meter=Meter(file_ledger, {}, clock), settings=KEPT, keeper=keeper)

    def bearer(secret: str) -> list[tuple[bytes, bytes]]:
        return [(b"authorization", f"Bearer {secret}".encode())]

    id = call(app, chat(receipt=True), headers=bearer(mine.secret)).json["id"]
    path = f"/v1/receipts/{id}"
    assert call(app, path=path).status == 401
    assert call(app, path=path, headers=bearer(mine.secret)).status == 200
    theirs = call(app, path=path, headers=bearer(other.secret))
    unknown = call(app, path="/v1/receipts/chatcmpl-0", headers=bearer(other.secret))
    assert (theirs.status, unknown.status) == (404, 404)
    assert theirs.error["message"].replace(id, "ID") == unknown.error["message"].replace("chatcmpl-0", "ID")
    assert call(app, path="/v1/receipts", headers=bearer(other.secret)).json["data"] == []
    assert len(call(app, path="/v1/receipts", headers=bearer(mine.secret)).json["data"]) == 1
    assert call(app, path="/v1/receipts/key").status == 404, "no key is needed to ask for the public one"


# -- checked ----------------------------------------------------------------------------------------------------------

PARTS = {"weights": "w", "sampler": "1"}
CHECKABLE = dataclasses.replace(
    INFO,
    system_fingerprint=fingerprint_of(PARTS, "vb-"),
    fingerprint_parts=PARTS,
    manifest=ModelManifest("fake-model", (("model.safetensors", "0" * 64),)),
)


def sent_receipt() -> dict[str, Any]:
    receipt = call(make(FakeEngine(info=CHECKABLE)), chat(receipt=True, max_tokens=9)).json["receipt"]
    assert isinstance(receipt, dict)
    return receipt


def test_a_receipt_of_a_model_that_is_not_here_is_not_checkable() -> None:
    receipt = sent_receipt()
    answer = call(make(), receipt, path=VERIFY)
    assert (answer.status, answer.json["verdict"]) == (200, "not_checkable")
    assert "no model with the files" in answer.json["sentence"]
    other = dataclasses.replace(CHECKABLE, manifest=ModelManifest("fake-model", (("model.safetensors", "1" * 64),)))
    answer = call(make(FakeEngine(info=other)), receipt, path=VERIFY)
    assert (answer.status, answer.json["verdict"]) == (200, "not_checkable")
    assert "model.safetensors differs" in answer.json["sentence"]
    loading = ModelStatus("fake", "loading", "reading weights", None)
    assert call(make(loading), receipt, path=VERIFY).error["code"] == "model_loading"


def test_a_check_is_a_request_whose_place_is_freed_when_the_client_leaves() -> None:
    receipt = sent_receipt()
    engine = FakeEngine(lambda request: (None,), info=CHECKABLE)
    app = make(engine)

    async def main() -> None:
        exchange = begin(app, receipt, path=VERIFY)
        await exchange.until(lambda: bool(engine.open))
        exchange.disconnect()
        await exchange.until(lambda: bool(engine.freed))

    run(main())
    assert len(engine.freed) == 1


def test_a_check_is_charged_as_a_prompt(file_ledger: Ledger, clock: Clock) -> None:
    """The receipt's four tokens cost what those of a prompt cost, and no more is held than that."""
    receipt = sent_receipt()
    key = file_ledger.create_key("mine", balance=1000)
    meter = Meter(file_ledger, {"fake": Prices(prompt=3, cached_prompt=3, completion=100)}, clock)
    app = make(FakeEngine(HELLO, info=CHECKABLE), meter=meter)
    secret = [(b"authorization", f"Bearer {key.secret}".encode())]
    assert call(app, receipt, path=VERIFY, headers=secret).status == 200
    run(meter.drain())
    wait_for(lambda: file_ledger.key("mine").held == 0)
    assert file_ledger.key("mine").balance == 1000 - 3 * (5 + 4)


def test_a_check_answers_to_the_limits_of_its_key(file_ledger: Ledger, clock: Clock) -> None:
    receipt = sent_receipt()
    key = file_ledger.create_key("mine", limits=Limits(requests_per_minute=1))
    app = make(FakeEngine(info=CHECKABLE), meter=Meter(file_ledger, {}, clock))
    secret = [(b"authorization", f"Bearer {key.secret}".encode())]
    answers = [call(app, receipt, path=VERIFY, headers=secret).status for _ in range(2)]
    assert answers == [200, 429]


BOMBS = {
    "no JSON": b"x",
    "nothing": b"",
    "no receipt": b"{}",
    "a list": b"[]",
    "nesting": b'{"version":1,"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "values": b'{"version":1,"a":[' + b'"",' * 500_000 + b'""]}',
    "values in an envelope": b'{"payload":"' + b"W1tdLFtdXQ" * 2 + b'","payloadType":"x","signatures":[]}',
    "an integer": b'{"version":1,"a":' + b"9" * 5000 + b"}",
    "a name twice": b'{"version":1,"version":1}',
    "another version": b'{"version":2}',
    "no payload": b'{"payload":7}',
}


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS)
def test_what_is_no_receipt_is_refused_with_one_sentence(body: bytes) -> None:
    engine = FakeEngine()
    answer = call(make(engine), body, path=VERIFY)
    assert answer.status == 422
    assert len(answer.error["message"]) < 300
    assert engine.requests == []


def test_json_within_texts_is_counted_before_it_is_parsed() -> None:
    receipt = sent_receipt()
    receipt["request"]["chat_template_kwargs"] = '{"a":[' + "[]," * 300_000 + "[]]}"
    answer = call(make(), receipt, path=VERIFY)
    assert (answer.status, "200000 values" in answer.error["message"]) == (422, True)


def test_an_altered_receipt_is_refused() -> None:
    receipt = sent_receipt()
    receipt["choices"][0]["finish_reason"] = "length"
    answer = call(make(FakeEngine(info=CHECKABLE)), receipt, path=VERIFY)
    assert (answer.status, answer.error["code"]) == (422, "invalid_receipt")
    assert "altered" in answer.error["message"]


def test_a_signature_that_is_said_to_be_this_servers_must_hold(tmp_path: Path) -> None:
    generate_key(tmp_path / "key")
    app = make(FakeEngine(info=CHECKABLE), signer=load_private_key(tmp_path / "key"))
    envelope = call(app, chat(receipt=True, max_tokens=9)).json["receipt"]
    assert call(app, envelope, path=VERIFY).json["signed_by"] == call(app, path="/v1/receipts/key").json["key_id"]
    good = envelope["signatures"][0]["sig"]
    envelope["signatures"][0]["sig"] = ("B" if good[0] == "A" else "A") + good[1:]
    answer = call(app, envelope, path=VERIFY)
    assert (answer.status, answer.error["code"]) == (422, "invalid_receipt")


@pytest.mark.parametrize("query", [b"mode=guess", b"tolerance=x", b"tolerance=-1", b"tolerance=11", b"tolerance=nan"])
def test_how_to_check_is_one_of_what_there_is(query: bytes) -> None:
    answer = call(make(FakeEngine(info=CHECKABLE)), sent_receipt(), path=VERIFY, query=query)
    assert (answer.status, answer.error["param"]) == (422, query.split(b"=")[0].decode())


def test_a_reply_that_was_saved_is_read_as_its_receipt() -> None:
    body = call(make(FakeEngine(word_by_word("a", "b"))), chat(receipt=True)).body
    assert parse_receipt(body, "check-1").receipt.choices[0].token_ids == (0, 1)
    assert call(make(), path=CHAT, method="GET").status == 405


# -- many at once -----------------------------------------------------------------------------------------------------


def test_receipts_of_replies_that_end_together_are_all_kept(keeper: FolderKeeper) -> None:
    """However many: a disk that works, but slowly, loses none."""
    put = keeper.put

    def slow(owner: str, written: Written) -> None:
        time.sleep(0.002)
        put(owner, written)

    keeper.put = slow  # type: ignore[method-assign]

    async def keep() -> list[bool]:
        receipts = Receipts(KEPT, clock=Clock(), keeper=keeper)
        written = [[Written(f"chatcmpl-{n}-{i}", "m", 1, b"{}") for i in range(3)] for n in range(200)]
        try:
            return await asyncio.gather(*(receipts.keep("", some) for some in written))
        finally:
            assert receipts.health() == {}
            receipts.close()

    assert asyncio.run(keep()) == [True] * 200


def test_a_keeper_that_fails_in_an_unknown_way_loses_no_reply() -> None:
    class Odd(BadKeeper):
        def put(self, owner: str, written: Written) -> None:
            raise ZeroDivisionError

    answer = call(make(settings=ReceiptSettings(keep="here", always=True), keeper=Odd()), chat())
    assert answer.status == 200
    assert answer.json["choices"][0]["message"]["content"]
