"""The verdicts, from what an engine would say. No engine computes: `tests/engine/test_verification.py` has one."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
from typing import Any

import pytest
from receipts_for_tests import PROMPT, SCORES, TOKENS, model_info, outputs_of, prepared_of, receipt_of

from engine import (
    TOLERANCE,
    CheckReport,
    ChoiceDelta,
    InvalidParameter,
    ModelInfo,
    Receipt,
    ReceiptCheck,
    ReplyFault,
    ReproducibilityReport,
    RequestOutput,
    TokenCheck,
    Unsupported,
    Usage,
)

ELSEWHERE = {"torch": "2.14.0"}
LAWLESS = ReproducibilityReport(False, "it does not.")
DRAWN = (10, 11, 2)
"""The tokens of the receipt that were drawn; 12 was forced."""


def deltas(**changes: Any) -> list[ChoiceDelta]:
    """What an engine says that follows the receipt's tokens. `changes`: by `check0` to `check2`, fields of a check."""
    checks = [
        TokenCheck(**{"expected": token, "drawn": token, "logprob": a, "perturbed": b, **changes.pop(f"check{i}", {})})
        for i, (token, (a, b)) in enumerate(zip(DRAWN, SCORES, strict=True))
    ]
    parts = ((TOKENS[:1], checks[:1]), (TOKENS[1:3], checks[1:2]), (TOKENS[3:], checks[2:]))
    found = [ChoiceDelta(0, "", tokens, checks=tuple(some)) for tokens, some in parts]
    return [*found[:-1], dataclasses.replace(found[-1], finish_reason="stop", **changes)]


def check(
    receipt: Receipt | None = None, info: ModelInfo | None = None, said: list[ChoiceDelta] | None = None, **how: Any
) -> CheckReport:
    tool = ReceiptCheck(receipt or receipt_of(), info or model_info(), text_of=lambda token: f"<{token}>", **how)
    request = tool.request("check")
    if request is None:
        return tool.report()
    prepared = tool.prepared(prepared_of())
    if prepared is None:
        return tool.report()
    assert prepared.record
    assert prepared.follow == (None if how.get("mode") == "replay" else (TOKENS,))
    for delta in deltas() if said is None else said:
        tool.add(RequestOutput("check", (delta,), Usage(3, 1)))
    return tool.report()


def test_identical() -> None:
    report = check()
    assert (report.verdict, report.exit_code) == ("identical", 0)
    assert report.sentence == "all 4 tokens and 3 scores are equal in every bit."
    [choice] = report.choices
    assert (choice.drawn, choice.different, choice.largest_difference, choice.score) == (3, 0, 0.0, 0.0)
    assert report.environment == ()


def test_reproduced() -> None:
    report = check(info=model_info(parts=ELSEWHERE), said=deltas(check1={"logprob": -1.501}))
    assert (report.verdict, report.exit_code) == ("reproduced", 0)
    assert report.sentence == (
        "all 4 tokens are the same; log-probabilities differ by at most 0.001, perturbed scores by at most 0."
    )
    assert report.environment == ("torch 2.13.0 → 2.14.0",)


def test_consistent() -> None:
    said = deltas(check1={"drawn": 40, "closeness": 0.003})
    report = check(info=model_info(parts=ELSEWHERE), said=said)
    assert (report.verdict, report.exit_code) == ("consistent", 0)
    assert report.sentence.startswith("2 of 3 drawn tokens are the same")
    assert (
        "position 1, where the receipt has '<11>' (token 11) and this model draws '<40>' (token 40)" in report.sentence
    )
    [choice] = report.choices
    assert (choice.different, choice.score) == (1, pytest.approx(0.001))
    assert choice.first is not None
    assert dataclasses.astuple(choice.first) == (1, 11, 40, "<11>", "<40>", 0.003)


@pytest.mark.parametrize(
    ("parts", "said", "words"),
    [
        # Same environment: whatever differs refutes.
        ({}, deltas(check1={"drawn": 40, "closeness": 1e-9}), "draws '<40>' (token 40), 1e-09 ahead; the environment"),
        ({}, deltas(check2={"logprob": -2.2500002}), "at position 3 the log-probability is -2.2500002 "),
        ({}, deltas(check2={"perturbed": 3.0}), "the perturbed score 3, and the receipt has -2.25 and 3.5"),
        ({}, deltas()[:1] + deltas()[2:], "the reply ends after 2 tokens (stop), but the receipt has 4"),
        # Another one: what rounding cannot explain.
        (ELSEWHERE, deltas(check0={"drawn": 40, "closeness": 0.02}), "0.02 ahead, more than the tolerance of 0.01"),
        (ELSEWHERE, deltas(check0={"drawn": 40, "closeness": math.inf}), "this model draws '<40>' (token 40)."),
        (ELSEWHERE, deltas(goes_on=True), "the receipt ends after 4 tokens (stop), but this model goes on"),
        (ELSEWHERE, deltas()[:2], "ends after 3 tokens"),
    ],
)
def test_refuted(parts: dict[str, Any], said: list[ChoiceDelta], words: str) -> None:
    report = check(info=model_info(parts=parts), said=said)
    assert (report.verdict, report.exit_code) == ("refuted", 1)
    assert words in report.sentence


def with_scores(*pairs: tuple[float, float]) -> Receipt:
    receipt = receipt_of()
    scores = b"".join(struct.pack("<ff", *pair) for pair in pairs)
    choice = dataclasses.replace(receipt.choices[0], scores=scores, bits=hashlib.sha256(scores).hexdigest())
    return dataclasses.replace(receipt, choices=(choice,))


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ((), "3 tokens were drawn, and the receipt holds the scores of 0."),
        (SCORES[:2], "3 tokens were drawn, and the receipt holds the scores of 2."),
        ((*SCORES, SCORES[0]), "3 tokens were drawn, and the receipt holds the scores of 4."),
        ((SCORES[0], (math.nan, math.nan), SCORES[2]), "at position 1 the receipt has the log-probability nan"),
        ((SCORES[0], SCORES[1], (-math.inf, 3.5)), "at position 3 the receipt has the log-probability -inf"),
        ((SCORES[0], SCORES[1], (-2.25, math.inf)), "the perturbed score inf, which no token that was drawn has."),
    ],
)
def test_scores_that_no_rounding_gives_are_refuted_everywhere(pairs: Any, words: str) -> None:
    report = check(with_scores(*pairs), model_info(parts=ELSEWHERE))
    assert (report.verdict, words in report.sentence) == ("refuted", True)
    assert check(with_scores(*pairs)).verdict == "refuted"


def test_the_largest_difference_covers_every_score() -> None:
    """A number that is none, after one that is, must not pass as the smaller one."""
    receipt = with_scores((-0.5, 1.25), (math.nan, 0.75), (-2.25, 1e30))
    report = check(receipt, model_info(parts=ELSEWHERE), deltas(check1={"drawn": 40, "closeness": 0.003}))
    assert (report.verdict, report.choices[0].largest_difference) == ("consistent", None)
    report = check(with_scores(*SCORES[:2], (-2.25, 1e30)), model_info(parts=ELSEWHERE))
    assert report.sentence.endswith("perturbed scores by at most 1e+30.")


def test_another_end_is_refuted() -> None:
    said = deltas()
    said[-1] = dataclasses.replace(said[-1], finish_reason="length")
    report = check(info=model_info(parts=ELSEWHERE), said=said)
    assert (report.verdict, report.sentence) == ("refuted", "the finish reason is length, but the receipt has stop.")


def test_what_the_grammar_cannot_take_is_refuted() -> None:
    """The engine takes the tokens up to there, and names what it was forced to write instead."""
    cut = [deltas()[0]]
    cut.append(
        ChoiceDelta(
            0,
            "",
            TOKENS[1:2],
            checks=(TokenCheck(11, 11, -1.5, 0.75), TokenCheck(12, 13, -math.inf, -math.inf, math.inf)),
            finish_reason="length",
            goes_on=True,
        )
    )
    report = check(info=model_info(parts=ELSEWHERE), said=cut)
    assert report.verdict == "refuted"
    assert "at position 2 the receipt has '<12>' (token 12), but this model draws '<13>' (token 13)" in report.sentence
    assert report.to_json()["choices"][0]["first"]["closeness"] is None


def test_without_the_law_the_same_fingerprint_promises_no_bits() -> None:
    info = model_info(law=LAWLESS)
    receipt = receipt_of(info=info)
    assert check(receipt, info).verdict == "identical"
    report = check(receipt, info, said=deltas(check1={"logprob": -1.5001}))
    assert (report.verdict, report.environment) == ("reproduced", ("the law does not hold here: it does not.",))
    assert check(receipt, info, said=deltas(check1={"drawn": 40, "closeness": 0.003})).verdict == "consistent"
    assert check(receipt, info, said=deltas(check1={"drawn": 40, "closeness": 0.3})).verdict == "refuted"


def test_a_receipt_cannot_soften_the_rules_by_its_own_word() -> None:
    """Whether the law holds in this environment is known here; a receipt of it that says otherwise was altered."""
    for receipt, info, held in (
        (receipt_of(info=model_info(law=LAWLESS)), model_info(), "holds"),
        (receipt_of(), model_info(law=LAWLESS), "does not hold"),
    ):
        report = check(receipt, info, said=deltas(check1={"logprob": -6.5}))
        assert (report.verdict, report.exit_code) == ("not_checkable", 2)
        assert f"in its environment, which is this one, the law {held}." in report.sentence
    report = check(receipt_of(info=model_info(law=LAWLESS)), model_info(parts=ELSEWHERE))
    assert report.environment[-1] == "the receipt says that the law did not hold where it was written"


def test_equal_fingerprints_of_other_parts_are_another_environment() -> None:
    """A fingerprint has 64 bits: two environments may share one."""
    info = model_info(parts=ELSEWHERE, system_fingerprint=model_info().system_fingerprint)
    report = check(info=info)
    assert (report.verdict, report.environment) == ("reproduced", ("torch 2.13.0 → 2.14.0",))


def test_the_tolerance_is_the_callers() -> None:
    said = deltas(check1={"drawn": 40, "closeness": 0.5})
    assert check(info=model_info(parts=ELSEWHERE), said=said, tolerance=0.6).verdict == "consistent"
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(InvalidParameter, match="tolerance must be between 0 and 10"):
            check(tolerance=wrong)
    assert TOLERANCE == 0.01


@pytest.mark.parametrize(
    ("receipt", "info", "words"),
    [
        (receipt_of(text=False), model_info(), "holds a digest of its request"),
        (receipt_of(), model_info(files={"config.json": "3" * 64, "new": "4" * 64}), "config.json differs, new is new"),
        (receipt_of(), model_info(parts={"sampler": 2}), "by version 1 of the sampler, and this program has version 2"),
        (receipt_of(info=model_info(system_fingerprint="vb-0")), model_info(), "its environment was altered"),
        (receipt_of(), model_info(vocab_size=11), "the receipt holds token 11, and this model has 11 tokens"),
    ],
)
def test_not_checkable(receipt: Receipt, info: ModelInfo, words: str) -> None:
    report = check(receipt, info)
    assert (report.verdict, report.exit_code, report.choices) == ("not_checkable", 2, ())
    assert words in report.sentence


def prompt_report(info: ModelInfo, tokens: tuple[int, ...], receipt: Receipt | None = None) -> CheckReport:
    tool = ReceiptCheck(receipt or receipt_of(), info)
    assert tool.request("check") is not None
    assert tool.prepared(dataclasses.replace(prepared_of(), prompt_token_ids=tokens)) is None
    return tool.report()


def test_another_prompt() -> None:
    """With the same parts, the request was changed; with another template, nobody can tell."""
    report = prompt_report(model_info(), (5, 9, 7))
    assert (report.verdict, report.sentence) == (
        "refuted",
        "the prompt is not that of the request: they part at token 1.",
    )
    report = prompt_report(model_info(), (*PROMPT, 8), receipt_of(prompt_ids=False))
    assert report.sentence == "the prompt is not that of the request: it has 4 tokens here, and 3 there."
    report = prompt_report(model_info(parts={"prompt_format": 2, **ELSEWHERE}), (5, 9, 7))
    assert report.verdict == "not_checkable"
    assert report.sentence.endswith("(they part at token 1), of other parts: prompt_format 1 → 2.")


def test_limits_that_change_the_request() -> None:
    tool = ReceiptCheck(receipt_of(), model_info())
    assert tool.prepared(prepared_of(max_tokens=3)) is None
    assert tool.report().sentence == "this model's limits change the request: max_tokens 8 → 3."


def test_what_the_engine_refuses_cannot_be_checked() -> None:
    tool = ReceiptCheck(receipt_of(), model_info())
    report = tool.refused(Unsupported("it does not think."))
    assert (report.verdict, report.exit_code) == ("not_checkable", 2)
    assert "this model refuses the request: it does not think." in report.sentence
    tool = ReceiptCheck(receipt_of(), model_info())
    tool.add(RequestOutput("check", (), Usage(0, 0), True, ReplyFault("a fault.")))
    assert tool.report().verdict == "not_checkable"


def test_margins_are_checked_where_the_environment_is_the_same() -> None:
    receipt = receipt_of(params={"margins": True})

    def run(margin: float) -> CheckReport:
        tool = ReceiptCheck(receipt, model_info())
        assert tool.prepared(prepared_of(margins=True)) is not None
        told = ((0.5,), (margin, None), (0.25,))
        for delta, margins in zip(deltas(), told, strict=True):
            tool.add(RequestOutput("check", (dataclasses.replace(delta, margins=margins),), Usage(3, 1)))
        return tool.report()

    assert run(0.0005).verdict == "identical"
    assert "the margin at position 1 is another" in run(0.5).sentence


def replayed(tokens: tuple[int, ...] = TOKENS) -> list[ChoiceDelta]:
    said = [delta for output in outputs_of() for delta in output.deltas]
    return [
        dataclasses.replace(delta, token_ids=part)
        for delta, part in zip(said, (tokens[:1], tokens[1:3], tokens[3:]), strict=True)
    ]


def test_replay() -> None:
    assert check(said=replayed(), mode="replay").verdict == "identical"
    report = check(said=replayed((10, 40, 41, 42)), mode="replay")
    assert (report.verdict, report.choices[0].first and report.choices[0].first.drawn) == ("refuted", 40)
    report = check(said=replayed((10, 11, 12, 2, 5)), mode="replay")
    assert "this model goes on" in report.sentence
    report = check(said=replayed((10, 11, 13, 2)), mode="replay")
    assert "at position 2 the receipt has '<12>'" in report.sentence


def test_several_choices_have_the_worst_verdict() -> None:
    receipt = receipt_of(params={"n": 2})
    for changes, verdict in (({}, "identical"), ({"check0": {"drawn": 40, "closeness": 0.001}}, "refuted")):
        tool = ReceiptCheck(receipt, model_info())
        assert tool.prepared(prepared_of(n=2)) is not None
        for index, said in enumerate((deltas(), deltas(**changes))):
            for delta in said:
                tool.add(RequestOutput("check", (dataclasses.replace(delta, index=index),), Usage(3, 1)))
        report = tool.report()
        assert report.verdict == verdict
        assert report.sentence.startswith("all 8 tokens of 2 choices" if verdict == "identical" else "choice 1: at")
