"""What a check of a receipt has found, and the rules that lead to a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

__all__ = ["TOLERANCE", "CheckReport", "ChoiceReport", "FirstDifference", "Verdict"]

Verdict = Literal["identical", "reproduced", "consistent", "refuted", "not_checkable"]

Mode = Literal["verify", "replay"]

TOLERANCE: Final = 1e-2
"""The largest closeness at which another environment's rounding may have chosen the other token."""


@dataclass(frozen=True, slots=True)
class FirstDifference:
    """The first position at which the model draws another token than the receipt holds.

    Attributes:
        position: counted over the choice's tokens.
        expected, drawn: the receipt's token and the model's; `expected_text`, `drawn_text`: as text, where a tokenizer
            was at hand.
        closeness: see `TokenCheck.closeness`; None if it is infinite.
    """

    position: int
    expected: int | None
    drawn: int | None
    expected_text: str | None = None
    drawn_text: str | None = None
    closeness: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceReport:
    """What a check has found about one choice.

    Attributes:
        tokens: token ids in the receipt; drawn: how many of them were drawn, the others were forced.
        different: at how many drawn positions the model draws another token.
        largest_difference: of a raw log-probability to the receipt's; None where the receipt holds no scores.
        score: the Token-DiFR score, see `engine.receipts.judgement`.
        sentence: the verdict for people.
    """

    index: int
    verdict: Verdict
    sentence: str
    tokens: int
    drawn: int = 0
    different: int = 0
    largest_difference: float | None = None
    score: float | None = None
    first: FirstDifference | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What a check has found about a receipt. `verdict` is the worst of its choices'.

    Attributes:
        id, digest: the receipt's.
        environment: what differs between the receipt's environment and this one, part by part, in words.
        signed_by: the id of the key whose signature was checked; None if none was.
    """

    id: str
    digest: str
    verdict: Verdict
    sentence: str
    mode: Mode
    model: str
    fingerprint: str
    """That of the environment in which the check ran."""
    tolerance: float
    environment: tuple[str, ...] = ()
    choices: tuple[ChoiceReport, ...] = ()
    signed_by: str | None = None

    @property
    def exit_code(self) -> int:
        """Return 0 for a reply that holds, 1 for one that is refuted, 2 for one that could not be checked."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON data: the answer of `POST /v1/receipts/verify`."""
        raise NotImplementedError
