"""What ends a request in the engine: which faults of a step are whose. Steps nothing."""

from __future__ import annotations

import logging

from engine.compute.model_runner import ForwardResult
from engine.errors import NumericalFault, ReplyFault, VerbatimError
from engine.sampling.answers import Described, Sampled
from engine.scheduling.schedule import Draw, Schedule

__all__ = ["Drawn", "reply_fault", "step_faults"]

log = logging.getLogger("verbatim.engine")

Drawn = Sampled | VerbatimError
"""What a draw has come to: a token, or why there is none."""


def reply_fault(request_id: str, error: BaseException) -> VerbatimError:
    """Return the error that a request ends with, and log it if it was not expected."""
    if isinstance(error, VerbatimError):
        return error
    log.error("%s: a fault in reading its reply", request_id, exc_info=error)
    return ReplyFault(f"this reply could not be read: {type(error).__name__}; the log has the details.")


def step_faults(
    schedule: Schedule,
    result: ForwardResult,
    drawn: list[tuple[Draw, Drawn]],
    described: list[Described | NumericalFault],
) -> dict[str, VerbatimError]:
    """Return the requests that this step ends, and why: by the forward pass, the first draw, or a prompt's score."""
    faults: dict[str, VerbatimError] = {}
    for number, (chunk, finite) in enumerate(zip(schedule.chunks, result.finite(), strict=True)):
        if number in result.errors:
            faults[chunk.sequence.request_id] = result.errors[number]
        elif not finite:
            faults[chunk.sequence.request_id] = NumericalFault(
                "the model computed keys or values that are not finite; its weights may be damaged."
            )
    for draw, found in drawn:
        if isinstance(found, VerbatimError) and not draw.index:
            faults.setdefault(draw.sequence.request_id, found)
    for score, what in zip(schedule.scores, described, strict=True):
        if isinstance(what, NumericalFault):
            faults.setdefault(score.sequence.request_id, what)
    return faults
