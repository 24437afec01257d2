"""Receipts of a real engine, end to end over HTTP: a server checks what it has sent, in its batch."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from asgi import CHAT, begin, call, run
from ledger_for_tests import Clock

from engine import AsyncEngine, Registry, generate_key, load_private_key
from server.accounts.charging import Meter
from server.app import create_app
from server.ledger.records import Prices
from server.ledger.store import Ledger
from server.receipts.folder import FolderKeeper
from server.receipts.service import Receipts
from server.settings import ReceiptSettings

VERIFY = "/v1/receipts/verify"

ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0},
    "choices": {"n": 3, "temperature": 1.3},
    "penalties": {"frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"5": -3.5}},
    "stop": {"stop": ["a", "e"], "max_tokens": 20},
    "a form": {"guided_regex": "[a-c]{4}"},
    "margins": {"margins": True, "logprobs": True, "top_logprobs": 2},
    "no tokens": {"max_tokens": 0},
}


def chat(**fields: Any) -> dict[str, Any]:
    asked = {"max_tokens": 8, "seed": 11, "receipt": True, **fields}
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hello there"}], **asked}


def receipt_of(app: Any, body: dict[str, Any]) -> dict[str, Any]:
    answer = call(app, body)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = (answer.events[-2] if body.get("stream") else answer.json)["receipt"]
    return found


@pytest.fixture
def app(registry: Registry, engine: AsyncEngine) -> Any:
    return create_app(registry)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", ASKED.values(), ids=ASKED)
def test_what_was_sent_is_identical(app: Any, fields: dict[str, Any], stream: bool) -> None:
    receipt = receipt_of(app, chat(stream=stream, **fields))
    for mode in (b"verify", b"replay"):
        report = call(app, receipt, path=VERIFY, query=b"mode=" + mode).json
        assert (report["verdict"], report["mode"]) == ("identical", mode.decode()), report["sentence"]
        assert report["id"] == receipt["id"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Hello"},
        {"prompt": [1, 2, 3]},
        {"prompt": "Hello", "add_special_tokens": False},
        {"prompt": ["Hello", "there", "you"], "n": 2},
        {"prompt": "Hello", "echo": True, "logprobs": 1},
        {"prompt": "Hello", "max_tokens": 0, "echo": True, "logprobs": 0},
    ],
)
def test_completions_have_receipts_that_hold(app: Any, fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "max_tokens": 5, "seed": 3, "receipt": True, **fields}
    answer = call(app, body, path="/v1/completions")
    assert answer.status == 200, answer.body
    receipts = answer.json.get("receipts") or [answer.json["receipt"]]
    assert len(receipts) == (len(fields["prompt"]) if "n" in fields else 1)
    for receipt in receipts:
        report = call(app, receipt, path=VERIFY).json
        assert report["verdict"] == "identical", report["sentence"]


def test_a_forged_token_is_refuted_with_its_text(app: Any) -> None:
    """Whoever alters a reply can make its digests fit; the model says something else all the same."""
    from engine import read_receipt
    from engine.receipts.canonical import canonical, digest_of_ids, sha256

    receipt = receipt_of(app, chat(temperature=0))
    forged = copy.deepcopy(receipt)
    choice = forged["choices"][0]
    choice["token_ids"][2] = (choice["token_ids"][2] + 1) % 100
    choice["sha256"] = digest_of_ids(choice["token_ids"])
    del forged["digest"]
    forged["digest"] = sha256(canonical(forged))
    assert read_receipt(json.dumps(forged).encode()).digest != receipt["digest"]
    report = call(app, forged, path=VERIFY).json
    assert report["verdict"] == "refuted"
    first = report["choices"][0]["first"]
    assert first["position"] == 2
    assert (first["expected"], first["drawn"]) == (choice["token_ids"][2], receipt["choices"][0]["token_ids"][2])
    assert first["drawn_text"]


def test_checks_and_replies_share_a_batch(app: Any) -> None:
    """A check beside replies changes no bit of either."""
    receipt = receipt_of(app, chat())
    alone = call(app, chat(seed=5)).json["choices"]

    async def main() -> None:
        checks = [begin(app, receipt, path=VERIFY) for _ in range(2)]
        replies = [begin(app, chat(seed=5)) for _ in range(2)]
        answers = await asyncio.gather(*(one.ended() for one in (*checks, *replies)))
        assert [answer.json["verdict"] for answer in answers[:2]] == ["identical"] * 2
        assert [answer.json["choices"] for answer in answers[2:]] == [alone] * 2

    run(main())


def test_a_receipt_without_text_and_one_of_other_limits_cannot_be_checked(app: Any, engine: AsyncEngine) -> None:
    report = call(app, receipt_of(app, chat(receipt="digest")), path=VERIFY).json
    assert report["verdict"] == "not_checkable"
    assert "digest" in report["sentence"]


def test_keys_keep_sign_and_check(
    registry: Registry, engine: AsyncEngine, file_ledger: Ledger, clock: Clock, tmp_path: Path
) -> None:
    """All at once, as a shared server has it: a signed receipt is kept for its key, found, checked and charged."""
    generate_key(tmp_path / "key")
    key = file_ledger.create_key("mine", balance=10_000)
    meter = Meter(file_ledger, {"tiny": Prices(prompt=1, cached_prompt=1, completion=100)}, clock)
    receipts = Receipts(
        ReceiptSettings(keep="here", always=True),
        clock=clock,
        keeper=FolderKeeper(tmp_path / "kept"),
        signer=load_private_key(tmp_path / "key"),
    )
    app = create_app(registry, meter=meter, receipts=receipts)
    bearer = [(b"authorization", f"Bearer {key.secret}".encode())]
    sent = call(app, {**chat(), "receipt": False}, headers=bearer).json
    assert "receipt" not in sent
    envelope = call(app, path=f"/v1/receipts/{sent['id']}", headers=bearer).json
    run(meter.drain())
    before = file_ledger.key("mine").balance
    report = call(app, envelope, path=VERIFY, headers=bearer).json
    assert (report["verdict"], report["signed_by"]) == ("identical", receipts.key and receipts.key.keyid)
    run(meter.drain())
    after = file_ledger.key("mine").balance
    usage = sent["usage"]
    assert before is not None
    assert after is not None
    assert before - after == usage["prompt_tokens"] + usage["completion_tokens"]
    assert call(app, path=CHAT, method="GET", headers=bearer).status == 405
