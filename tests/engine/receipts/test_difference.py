"""What differs between two receipts, causes first."""

from __future__ import annotations

import dataclasses
from typing import Any

from receipts_for_tests import model_info, receipt_of

from engine import ChatMessage, Receipt, pair_receipts, receipt_differences


def sentences(a: Receipt, b: Receipt, **how: Any) -> list[str]:
    return [difference.sentence for difference in receipt_differences(a, b, **how)]


def with_choice(receipt: Receipt, **changes: Any) -> Receipt:
    [choice] = receipt.choices
    return dataclasses.replace(receipt, choices=(dataclasses.replace(choice, **changes),))


def test_the_same() -> None:
    later = dataclasses.replace(receipt_of(), id="chatcmpl-2", created=6)
    assert later.digest != receipt_of().digest
    assert sentences(receipt_of(), later) == []


def test_each_part() -> None:
    a = receipt_of(messages=(ChatMessage("user", "Hello"),))
    b = receipt_of(
        messages=(ChatMessage("user", "Hi"),),
        params={"temperature": 0.5},
        info=model_info(parts={"transformers": "5.23.0"}, files={"config.json": "3" * 64}),
    )
    b = with_choice(b, token_ids=(10, 40, 12, 2), sha256="0" * 64, finish_reason="length")
    assert sentences(a, b) == [
        'messages.0.content "Hello" → "Hi"',
        "sampling.temperature 1.0 → 0.5",
        "the file config.json differs: 111111111111… → 333333333333…",
        "transformers 5.24.0 → 5.23.0",
        "choice 0, position 1: token 11 → token 40",
        "choice 0: finish_reason stop → length",
    ]
    assert "'<11>' (token 11) → '<40>' (token 40)" in sentences(a, b, text_of=lambda token: f"<{token}>")[4]


def test_bits_alone() -> None:
    a = receipt_of()
    scores = bytearray(a.choices[0].scores or b"")
    scores[8] ^= 1
    [told] = sentences(a, with_choice(a, scores=bytes(scores), bits="0" * 64))
    assert told.startswith(
        "choice 0: the tokens are the same, but scores differ from draw 1 on; log-probabilities by at"
    )


def test_receipts_without_text() -> None:
    a, b = receipt_of(), receipt_of(text=False)
    assert sentences(a, b) == []
    assert sentences(b, receipt_of(text=False, reasoning_effort="low"))[0].startswith("the requests have other digests")


def test_pairs_by_id_then_by_request() -> None:
    def named(name: str, text: str) -> Receipt:
        return dataclasses.replace(receipt_of(messages=(ChatMessage("user", text),)), id=name)

    a = [named("1", "x"), named("2", "y"), named("3", "y"), named("4", "z")]
    b = [named("5", "y"), named("6", "y"), named("1", "other"), named("7", "w")]
    found = [(one and one.id, other and other.id) for one, other in pair_receipts(a, b)]
    assert found == [("1", "1"), ("2", "5"), ("3", "6"), ("4", None), (None, "7")]
