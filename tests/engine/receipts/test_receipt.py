"""The document: what is written is read, every change is found, and what is no receipt is refused."""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings, strategies as st
from receipts_for_tests import PROMPT, SCORES, TOKENS, receipt_of

from engine import Receipt, ReceiptError, read_receipt
from engine.receipts import reading


def sealed(document: dict[str, Any]) -> bytes:
    """A changed document with the digest that it then has: what a forger would write."""
    content = {name: value for name, value in document.items() if name != "digest"}
    return rfc8785.dumps({**content, "digest": hashlib.sha256(rfc8785.dumps(content)).hexdigest()})


RECEIPTS = {
    "plain": receipt_of(),
    "choices": receipt_of(params={"n": 3}),
    "margins": receipt_of(params={"margins": True}),
    "no prompt ids": receipt_of(prompt_ids=False),
    "no text": receipt_of(text=False, params={"margins": True}),
}


@pytest.mark.parametrize("name", RECEIPTS)
def test_what_is_written_is_read(name: str) -> None:
    receipt = RECEIPTS[name]
    data = receipt.to_bytes()
    assert data == rfc8785.dumps(json.loads(data))
    assert read_receipt(data) == receipt
    assert read_receipt(data + b"\n") == receipt
    assert read_receipt(json.dumps(receipt.to_json(), indent=2).encode()) == receipt
    assert receipt.digest == json.loads(data)["digest"]


def test_a_receipt_holds_what_was_drawn() -> None:
    receipt = receipt_of(params={"margins": True})
    [choice] = receipt.choices
    scores = b"".join(struct.pack("<ff", *pair) for pair in SCORES)
    assert (choice.token_ids, choice.tokens, choice.scores) == (TOKENS, 4, scores)
    assert choice.bits == hashlib.sha256(scores).hexdigest()
    assert choice.sha256 == hashlib.sha256(struct.pack("<4I", *TOKENS)).hexdigest()
    assert receipt.prompt.token_ids == PROMPT
    assert choice.margins == (0.5, 0.0005, None, 0.25)
    assert choice.stability is not None
    assert dataclasses.astuple(choice.stability) == (0.0005, 1, 1)
    assert receipt.to_json()["request"]["clock"] == "2026-11-26T12:30:15.000250"


def test_a_receipt_without_text_tells_neither_request_nor_reply() -> None:
    """Scores are left out, too: with the seed, a perturbed score may tell its token."""
    document = receipt_of(text=False, params={"margins": True}).to_json()
    [choice] = document["choices"]
    assert set(document["request"]) == {"sha256"}
    assert set(document["prompt"]) == {"tokens", "sha256"}
    assert set(choice) == {"index", "finish_reason", "tokens", "sha256", "bits", "stability"}
    whole = receipt_of(params={"margins": True}).to_json()
    assert document["request"]["sha256"] == hashlib.sha256(rfc8785.dumps(whole["request"])).hexdigest()


def test_a_reply_of_the_api_and_a_line_of_a_batch_are_read() -> None:
    receipt = receipt_of()
    body = {"id": "chatcmpl-1", "usage": {"total": 3}, "seed": 2**62, "receipt": receipt.to_json()}
    assert read_receipt(json.dumps(body).encode()) == receipt
    assert read_receipt(json.dumps({"custom_id": "a", "response": {"body": body}}).encode()) == receipt


def _leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not parts:
        yield place
        return
    for key, part in list(parts):
        yield from _leaves(part, (*place, key))


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if value is None:
        return "text"
    if isinstance(value, str):
        return ("1" if value[:1] == "0" else "0") + value[1:]
    return [*value, 1] if isinstance(value, list) else {**value, "x": 1}


@pytest.mark.parametrize("name", RECEIPTS)
def test_every_single_change_is_found(name: str) -> None:
    """Without a signature: the digest covers everything."""
    document = RECEIPTS[name].to_json()
    places = list(_leaves(document))
    assert len(places) > 30
    for place in places:
        other = copy.deepcopy(document)
        inner = other
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = changed(inner[place[-1]])
        with pytest.raises(ReceiptError):
            read_receipt(json.dumps(other).encode())
        with pytest.raises(ReceiptError):
            read_receipt(json.dumps({key: value for key, value in document.items() if key != place[0]}).encode())


def edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(document: dict[str, Any]) -> None:
        *places, last = path.split(".")
        inner: Any = document
        for place in places:
            inner = inner[int(place)] if isinstance(inner, list) else inner[place]
        inner[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("version", 2, "the receipt has version 2; this program reads version 1"),
        ("version", "1", "the receipt has version '1'"),
        ("extra", 1, "extra is not known in a receipt of this version"),
        ("prompt.token_ids", [5, 6], "prompt: tokens and sha256 are not those of token_ids"),
        ("prompt.token_ids", [5, 6, -7], "prompt.token_ids must be a list of token ids"),
        ("prompt.token_ids", [5, 6, 7.5], "prompt.token_ids must be a list of token ids"),
        ("prompt.tokens", 0, "prompt.tokens must be an integer of at least 1"),
        ("prompt.sha256", "abc", "prompt.sha256 must be a SHA-256 in 64 hexadecimal digits"),
        ("model.digest", "0" * 64, "model.digest is not that of its files"),
        ("model.resources.0.algorithm", "md5", "model.resources.0.algorithm must be sha256"),
        ("environment.parts", {"a": []}, "environment.parts must be at most"),
        ("environment.parts", [], "environment.parts must be an object"),
        ("law.holds", "yes", "law.holds must be true or false"),
        ("law.checks", [{"name": "batch", "holds": False}], "law.holds is true, though one of law.checks does not"),
        ("choices.0.index", 1, "choices must be numbered from 0"),
        ("choices.0.finish_reason", "bored", "choices.0.finish_reason must be stop or length or tool_calls"),
        ("choices.0.scores", "###", "choices.0.scores is not base64"),
        ("choices.0.scores", "AAAA", "choices.0.scores must hold a pair of float32"),
        ("choices.0.scores", base64.b64encode(b"\0" * 8).decode(), "choices.0.bits is not the digest of its scores"),
        ("choices.0.tokens", 3, "choices.0: tokens and sha256 are not those of token_ids"),
        ("choices.0.margins", [1, 2, 3, 4], "choices.0.stability is not that of its margins"),
        ("choices.0.stability", {"smallest": 1, "position": 0, "near": 0}, "choices.0 holds stability, but not the"),
        ("request.sampling.n", 2, "the request asks for 2 choices, and the receipt holds 1"),
        ("request.sampling.max_tokens", 3, "choices.0 has 4 tokens, more than max_tokens, 3"),
        ("request.sampling.margins", True, "choices.0 must hold margins if the request asks for them"),
        ("request", {"sha256": "0" * 64}, "the receipt holds tokens, but only the digest of its request"),
        ("request", {"sha256": "0" * 64, "prompt": ""}, "request.prompt is not known"),
        ("request", 1, "request must be an object"),
        ("created", 2**53, "cannot be written as canonical JSON"),
        ("created", 1e400, "cannot be written as canonical JSON"),
        ("id", "\ud800", "cannot be written as canonical JSON|not valid Unicode"),
    ],
)
def test_contradictions_are_refused_even_with_the_right_digest(path: str, value: Any, message: str) -> None:
    document = receipt_of().to_json()
    edit(path, value)(document)
    try:
        data = sealed(document)
    except ValueError:
        data = json.dumps(document).encode()
    with pytest.raises(ReceiptError, match=message):
        read_receipt(data)


@pytest.mark.parametrize("order", [(0, 0, 1), (1, 0), (0, 1, 0)])
def test_a_model_names_each_file_once_and_in_order(order: tuple[int, ...]) -> None:
    """Among two digests of one name, the comparison with the model's files would see one."""
    document = receipt_of().to_json()
    files = document["model"]["resources"]
    document["model"]["resources"] = [files[i] for i in order]
    digests = b"".join(bytes.fromhex(files[i]["digest"]) for i in order)
    document["model"]["digest"] = hashlib.sha256(digests).hexdigest()
    with pytest.raises(ReceiptError, match=r"model\.resources must name each file once, in the order of their paths"):
        read_receipt(sealed(document))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the receipt is not JSON"),
        (b"not json", "the receipt is not JSON"),
        (b"\xff\xfe", "the receipt is not UTF-8: byte 0 is 0xff"),
        (b"[]", "not a receipt"),
        (b"1", "not a receipt"),
        (b'{"a": 1}', "not a receipt: it has no version"),
        (b'{"version": 1, "version": 1}', "the key 'version' stands twice"),
        (b'{"version": NaN}', "NaN is not a number"),
        (b'{"version": 1, "id": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested"),
        (b'{"version": 1, "id": ' + b"[" * 60 + b"1" * 41 + b"]" * 60 + b"}", "a number of 41 digits"),
        (b'{"version": 1}', "id is missing"),
        (b"[" + b"1," * 6_100_000 + b"1]", "more than 6000000 are not read"),
    ],
)
def test_what_is_no_receipt_is_refused_in_one_sentence(data: bytes, message: str) -> None:
    with pytest.raises(ReceiptError, match=message) as caught:
        read_receipt(data)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_a_receipt_is_bounded() -> None:
    with pytest.raises(ReceiptError, match="more than 67108864 bytes"):
        read_receipt(b" " * (reading.MOST_RECEIPT_BYTES + 1))


def test_a_million_tokens_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = receipt_of(params={"max_tokens": 2**21})
    monkeypatch.setattr(reading, "MOST_TOKENS", 6)
    with pytest.raises(ReceiptError, match="the receipt holds 7 tokens; at most 6 are read"):
        read_receipt(receipt.to_bytes())
    monkeypatch.setattr(reading, "MOST_TOKENS", 7)
    assert read_receipt(receipt.to_bytes()) == receipt


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_noise_is_refused_or_read(data: st.DataObject) -> None:
    """Whatever happens to its bytes, a receipt is the same or refused."""
    receipt: Receipt = RECEIPTS["margins"]
    raw = bytearray(receipt.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(ReceiptError):
        assert read_receipt(bytes(raw)) == receipt
