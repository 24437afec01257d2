"""`Counts`: what the server has counted since its start, by model, endpoint and refusal. Knows no engine and no text.

Every label is one of a set that the configuration and the code bound: ids of models that are served, endpoints as the
routes spell them, methods, statuses, codes of errors. Nothing that a client chooses becomes a label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from server.metrics.histogram import LATENCY, PER_TOKEN, Histogram, Throughput

__all__ = ["METHODS", "OTHER", "OUTCOMES", "REASONS", "Counts", "ModelCounts"]

OUTCOMES: Final = ("complete", "disconnected", "error")
"""How a reply ended: every choice has ended; its client left before; an error ended it."""
REASONS: Final = ("stop", "length", "tool_calls")
"""Why a choice ended, as `finish_reason` says."""
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
OTHER: Final = "other"
"""The label of every method that is none of these, and of every path that is no endpoint."""


@dataclass(slots=True)
class ModelCounts:
    """What was counted and measured of one model's replies. Tokens are those of the replies' usage.

    Attributes:
        prompt_tokens: computed or found in the cache; of a reply that was aborted, as far as its prompt was computed.
        cached_tokens: those of them that were found in the cache.
        generation_tokens: over all choices.
        outcomes: replies by how they ended; each is counted once.
        reasons: choices by why they ended.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    outcomes: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(OUTCOMES, 0)))
    reasons: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REASONS, 0)))
    queue_time: Histogram = field(default_factory=lambda: Histogram(LATENCY))
    first_token: Histogram = field(default_factory=lambda: Histogram(LATENCY))
    between_tokens: Histogram = field(default_factory=lambda: Histogram(PER_TOKEN))
    per_token: Histogram = field(default_factory=lambda: Histogram(PER_TOKEN))
    whole: Histogram = field(default_factory=lambda: Histogram(LATENCY))
    prompt_rate: Throughput = field(default_factory=Throughput)
    generation_rate: Throughput = field(default_factory=Throughput)


class Counts:
    """What one application has counted. Used on its event loop.

    Attributes:
        requests: finished HTTP exchanges by endpoint, method and status; `none` where no status could be sent.
        refusals: answers that are an error, by status and `error.code`.
        active: HTTP exchanges under way.
    """

    def __init__(self) -> None:
        self._models: dict[str, ModelCounts] = {}
        self.requests: Counter[tuple[str, str, str]] = Counter()
        self.refusals: Counter[tuple[int, str]] = Counter()
        self.active = 0

    def of_model(self, model_id: str) -> ModelCounts:
        """Return what was counted of a model. `model_id`: of one that is served, never of one that was asked for."""
        return self._models.setdefault(model_id, ModelCounts())

    def models(self) -> Iterable[str]:
        """The models of which something was counted, those that are not served any more included."""
        return tuple(self._models)
