"""From what the engine says of one choice to a verdict about it. Pure rules; docs/guides/receipts.md explains them."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.receipts.canonical import sha256
from engine.receipts.receipt import ChoiceRecord, recorded_margins
from engine.receipts.verdict import CLIP, ChoiceReport, FirstDifference, Verdict
from engine.types.outputs import ChoiceDelta, FinishReason, TokenCheck

__all__ = ["Rules", "Seen", "judge", "named"]

TextOf = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Rules:
    """By which rules choices are judged.

    Attributes:
        same: whether the receipt's fingerprint is this environment's. Only then a choice can be identical.
        exact: whether whatever is not identical is refuted: the fingerprint is the same, and the law holds.
        tolerance: see `engine.receipts.verdict.TOLERANCE`.
        text_of: a token's text; None to name tokens by their ids alone.
    """

    same: bool
    exact: bool
    tolerance: float
    text_of: TextOf | None = None


@dataclass(slots=True)
class Seen:
    """What the engine has said of one choice so far.

    Attributes:
        token_ids: the tokens that it took.
        checks: of each drawn position, counted over the tokens, the position and what was found there.
        margins: one for each token; empty where they were not asked for.
        goes_on: the receipt's tokens have ended, but the model would not have ended here.
        apart: the choice was generated again, and another token than the receipt's was drawn: the rest is another text.
    """

    token_ids: list[int] = field(default_factory=list)
    checks: list[tuple[int, TokenCheck]] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    goes_on: bool = False
    apart: bool = False

    def follow(self, delta: ChoiceDelta) -> None:
        """Add a delta of a choice that takes the receipt's tokens.

        Its first token was drawn. A second check is of a token that could not be taken, behind the others.
        """
        start = len(self.token_ids)
        places = (start, start + len(delta.token_ids))
        self.checks.extend(zip(places, delta.checks, strict=False))
        self.goes_on = self.goes_on or delta.goes_on
        self._take(delta)

    def replay(self, delta: ChoiceDelta, expected: tuple[int, ...]) -> None:
        """Add a delta of a choice that is generated again. Its first token was drawn, if it has scores."""
        start = len(self.token_ids)
        for offset, token in enumerate(delta.token_ids):
            place = start + offset
            if self.apart:
                break
            if place >= len(expected):
                self.apart = self.goes_on = True
                break
            self.apart = token != expected[place]
            if self.apart or (offset == 0 and delta.scores):
                score = delta.scores[0] if offset == 0 and delta.scores else (-math.inf, -math.inf)
                check = TokenCheck(expected[place], token, *score, closeness=math.inf if self.apart else 0.0)
                self.checks.append((place, check))
        self._take(delta)

    def _take(self, delta: ChoiceDelta) -> None:
        self.token_ids.extend(delta.token_ids)
        self.margins.extend(recorded_margins(delta))
        self.finish_reason = delta.finish_reason or self.finish_reason

    @property
    def scores(self) -> bytes:
        """The scores as a receipt holds them."""
        return b"".join(struct.pack("<ff", check.logprob, check.perturbed) for _, check in self.checks)


def judge(choice: ChoiceRecord, seen: Seen, rules: Rules) -> ChoiceReport:
    """Return the verdict about a choice of which the engine has said all."""
    assert choice.token_ids is not None
    apart = [(place, check) for place, check in seen.checks if check.drawn != check.expected]
    first = _first(apart, rules) if apart else None
    difference = _largest_difference(choice, seen)
    verdict, sentence = _verdict(choice, choice.token_ids, seen, first, difference, rules)
    return ChoiceReport(
        index=choice.index,
        verdict=verdict,
        sentence=sentence,
        tokens=choice.tokens,
        drawn=len(seen.checks),
        different=len(apart),
        largest_difference=difference,
        score=_score([check for _, check in seen.checks]),
        first=first or _end(choice.token_ids, seen, rules),
    )


def named(token: int | None, text_of: TextOf | None) -> str:
    """Return how a sentence names a token."""
    if token is None:
        return "the end"
    return f"token {token}" if text_of is None else f"{text_of(token)!r:.100} (token {token})"


def _verdict(
    choice: ChoiceRecord,
    expected: tuple[int, ...],
    seen: Seen,
    first: FirstDifference | None,
    difference: float | None,
    rules: Rules,
) -> tuple[Verdict, str]:
    """Return the verdict and its sentence. What no rounding explains is looked for first."""
    beyond = [
        (place, check)
        for place, check in seen.checks
        if check.drawn != check.expected and (rules.exact or not check.closeness <= rules.tolerance)
    ]
    if beyond:
        return "refuted", _refutation(*beyond[0], rules)
    if ends := _other_end(choice, expected, seen):
        return "refuted", ends
    if wrong := _no_scores(choice, seen):
        return "refuted", wrong
    if first is not None:
        count, drawn = sum(check.drawn != check.expected for _, check in seen.checks), len(seen.checks)
        return "consistent", (
            f"{drawn - count} of {drawn} drawn tokens are the same, and at the others the scores are within "
            f"{rules.tolerance:g}, which another rounding explains; the first is at position {first.position}, where "
            f"the receipt has {named(first.expected, rules.text_of)} and this model draws "
            f"{named(first.drawn, rules.text_of)}, {first.closeness:.3g} ahead."
        )
    other = _other_bits(choice, seen)
    if rules.same and other is None:
        return "identical", f"all {choice.tokens} tokens and {len(seen.checks)} scores are equal in every bit."
    if rules.exact:
        return "refuted", f"the environment is the same, but {other}."
    return "reproduced", (
        f"all {choice.tokens} tokens are the same; log-probabilities differ by at most {_told(difference)}, perturbed "
        f"scores by at most {_told(_largest_difference(choice, seen, perturbed=True))}."
    )


def _refutation(place: int, check: TokenCheck, rules: Rules) -> str:
    ours = f"at position {place} the receipt has {named(check.expected, rules.text_of)}, but this model draws "
    ours += named(check.drawn, rules.text_of)
    if check.closeness == math.inf:
        return f"{ours}."
    if rules.exact:
        return f"{ours}, {check.closeness:.3g} ahead; the environment is the same, so no rounding explains it."
    return f"{ours}, {check.closeness:.3g} ahead, more than the tolerance of {rules.tolerance:g}."


def _other_end(choice: ChoiceRecord, expected: tuple[int, ...], seen: Seen) -> str | None:
    """Say how the reply ends otherwise than in the receipt; None if it ends as it does there.

    Where a reply ends follows from its tokens, without rounding.
    """
    if len(seen.token_ids) < len(expected):
        reason, place = seen.finish_reason, len(seen.token_ids)
        return f"the reply ends after {place} tokens ({reason}), but the receipt has {len(expected)}."
    if seen.goes_on:
        return f"the receipt ends after {len(expected)} tokens ({choice.finish_reason}), but this model goes on."
    if seen.finish_reason != choice.finish_reason:
        return f"the finish reason is {seen.finish_reason}, but the receipt has {choice.finish_reason}."
    return None


def _no_scores(choice: ChoiceRecord, seen: Seen) -> str | None:
    """Say why the receipt's scores cannot be those of its tokens, however the environment rounds; None if they can.

    Which tokens are drawn follows from the tokens before them; and a token that was drawn had a finite score.
    """
    theirs = choice.scores or b""
    if len(theirs) != 8 * len(seen.checks):
        return f"{len(seen.checks)} tokens were drawn, and the receipt holds the scores of {len(theirs) // 8}."
    for (place, check), pair in zip(seen.checks, struct.iter_unpack("<ff", theirs), strict=True):
        ours = (check.logprob, check.perturbed)
        if check.drawn == check.expected and any(
            math.isfinite(a) and not math.isfinite(b) for a, b in zip(ours, pair, strict=True)
        ):
            return (
                f"at position {place} the receipt has the log-probability {pair[0]:.9g} and the perturbed score "
                f"{pair[1]:.9g}, which no token that was drawn has."
            )
    return None


def _other_bits(choice: ChoiceRecord, seen: Seen) -> str | None:
    """Say where scores or margins differ from the receipt's, in any bit; None if they are the same."""
    scores = seen.scores
    if sha256(scores) != choice.bits:
        theirs = choice.scores or b""
        if len(theirs) != len(scores):
            return f"{len(scores) // 8} tokens were drawn, and the receipt holds the scores of {len(theirs) // 8}"
        for i, (place, check) in enumerate(seen.checks):
            if theirs[8 * i : 8 * i + 8] != scores[8 * i : 8 * i + 8]:
                logprob, perturbed = struct.unpack_from("<ff", theirs, 8 * i)
                return (
                    f"at position {place} the log-probability is {check.logprob:.9g} and the perturbed score "
                    f"{check.perturbed:.9g}, and the receipt has {logprob:.9g} and {perturbed:.9g}"
                )
    if choice.margins is not None and (found := tuple(seen.margins)) != choice.margins:
        other = next((i for i, pair in enumerate(zip(found, choice.margins, strict=False)) if pair[0] != pair[1]), None)
        return "the margins are others" if other is None else f"the margin at position {other} is another"
    return None


def _first(apart: list[tuple[int, TokenCheck]], rules: Rules) -> FirstDifference:
    place, check = apart[0]
    return FirstDifference(
        place,
        check.expected,
        check.drawn,
        rules.text_of(check.expected) if rules.text_of else None,
        rules.text_of(check.drawn) if rules.text_of else None,
        check.closeness if math.isfinite(check.closeness) else None,
    )


def _end(expected: tuple[int, ...], seen: Seen, rules: Rules) -> FirstDifference | None:
    """Return where one of the two has ended, if all common tokens are the same."""
    place = len(seen.token_ids)
    if place < len(expected):
        return FirstDifference(place, expected[place], None, rules.text_of(expected[place]) if rules.text_of else None)
    if seen.goes_on:
        return FirstDifference(len(expected), None, None)
    return None


def _largest_difference(choice: ChoiceRecord, seen: Seen, *, perturbed: bool = False) -> float | None:
    """Return the largest difference between a raw log-probability here and in the receipt.

    None where they cannot be paired, or one difference is no finite number. `perturbed`: of the perturbed scores.
    """
    theirs = choice.scores or b""
    if len(theirs) != 8 * len(seen.checks):
        return None
    ours = (check.perturbed if perturbed else check.logprob for _, check in seen.checks)
    pairs = zip(struct.iter_unpack("<ff", theirs), ours, strict=True)
    gaps = [0.0 if there[perturbed] == here else abs(there[perturbed] - here) for there, here in pairs]
    return max(gaps, default=0.0) if all(map(math.isfinite, gaps)) else None


def _told(difference: float | None) -> str:
    return "an unknown amount" if difference is None else f"{difference:.3g}"


def _score(checks: list[TokenCheck]) -> float | None:
    return sum(min(check.closeness, CLIP) for check in checks) / len(checks) if checks else None
