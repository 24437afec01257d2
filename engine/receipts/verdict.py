"""What a check of a receipt has found: the five verdicts, and the report.

identical       same fingerprint; all tokens, scores and ends are equal, bit by bit
reproduced      another fingerprint; all tokens and ends are equal
consistent      another fingerprint; where tokens differ, rounding may have chosen the other one
refuted         the model would have said something else
not_checkable   nothing can be said: other model files, an unknown version, a receipt without text
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

__all__ = [
    "CLIP",
    "EXPECTED_SCORE",
    "MOST_TOLERANCE",
    "TOLERANCE",
    "CheckReport",
    "ChoiceReport",
    "FirstDifference",
    "Mode",
    "Verdict",
    "worst",
]

Verdict = Literal["identical", "reproduced", "consistent", "refuted", "not_checkable"]

Mode = Literal["verify", "replay"]

TOLERANCE: Final = 1e-2
"""The largest closeness at which another environment's rounding may have chosen the other token."""

MOST_TOLERANCE: Final = 10.0
"""The largest tolerance that may be asked for."""

CLIP: Final = 1.0
"""The most that one token adds to a score: a token that could not be drawn at all has an infinite closeness."""

EXPECTED_SCORE: Final = 1e-3
"""The score stays below this where an honest reply is checked in another environment. Measured (docs/log.md,
2026-11-27): 0 for other kernels, threads and instruction sets, 0.011 for int8 weights in place of float32.

The score is that of Token-DiFR (arXiv 2511.20621): the mean over the drawn tokens of how far, in perturbed scores, the
model's own token was ahead of the reply's, each clipped.
"""

_ORDER: Final = ("identical", "reproduced", "consistent", "refuted", "not_checkable")


@dataclass(frozen=True, slots=True)
class FirstDifference:
    """The first position at which the model draws another token than the receipt holds.

    Attributes:
        position: counted over the choice's tokens, from 0.
        expected, drawn: the receipt's token and the model's; None after the end of one of them.
        expected_text, drawn_text: the same as text, where a tokenizer was at hand.
        closeness: see `TokenCheck.closeness`; None if it is infinite or unknown.
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
        sentence: the verdict for people.
        tokens: token ids in the receipt; drawn: how many of them were drawn, the others were forced.
        different: at how many drawn positions the model draws another token.
        largest_difference: between a raw log-probability here and in the receipt; None where they cannot be paired.
        score: see `EXPECTED_SCORE`; None if nothing was drawn.
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
        model, fingerprint: of the model that computed, in its environment.
        environment: what differs between the receipt's environment and this one, part by part, in words; and where the
            law does not hold.
        signed_by: the id of the key whose signature was checked; None if none was.
    """

    id: str
    digest: str
    verdict: Verdict
    sentence: str
    mode: Mode
    model: str
    fingerprint: str
    tolerance: float
    environment: tuple[str, ...] = ()
    choices: tuple[ChoiceReport, ...] = ()
    signed_by: str | None = None

    @property
    def exit_code(self) -> int:
        """Return 0 for a reply that holds, 1 for one that is refuted, 2 for one that could not be checked."""
        return {"refuted": 1, "not_checkable": 2}.get(self.verdict, 0)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON data: the answer of `POST /v1/receipts/verify`."""
        data = asdict(self)
        data["environment"], data["choices"] = list(data["environment"]), list(data["choices"])
        return {**data, "expected_score": EXPECTED_SCORE}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict that holds for all choices together."""
    return max(verdicts, key=_ORDER.index)
