"""`SERIES`: every metric of `/metrics`, declared once: its name, its labels, what it means, and where it is read.

A metric that means the same as one of vLLM's has its name, with our prefix in place of vLLM's. OpenTelemetry's
conventions for generative models (`gen_ai.server.…`) have nothing that vLLM has not, so their names are only noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from server.metrics.histogram import Histogram
from server.metrics.snapshot import STATES, ModelState, Snapshot

__all__ = ["PREFIX", "SERIES", "Series"]

PREFIX: Final = "verbatim:"

Sample = tuple[tuple[str, ...], float | Histogram]
"""The values of the labels, and the value."""


@dataclass(frozen=True, slots=True)
class Series:
    """One metric.

    Attributes:
        name: as Prometheus stores it, without the prefix and without what a histogram adds.
        meaning: one sentence.
        read: a snapshot → its samples.
        peer: what the same is called elsewhere.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    labels: tuple[str, ...]
    meaning: str
    read: Callable[[Snapshot], Iterable[Sample]]
    peer: str = ""


def _loaded(value: Callable[[ModelState], float | None]) -> Callable[[Snapshot], Iterator[Sample]]:
    """Read a number of each model that is loaded; those that have none are left out."""
    return lambda now: (
        ((model.id,), number)
        for model in now.models
        if model.stats is not None and (number := value(model)) is not None
    )


def _stat(name: str) -> Callable[[Snapshot], Iterator[Sample]]:
    return _loaded(lambda model: getattr(model.stats, name))


def _by(counter: str) -> Callable[[Snapshot], Iterator[Sample]]:
    """Read a counter of each model's, by its keys."""
    return lambda now: (
        ((model.id, key), count) for model in now.models for key, count in getattr(model.counts, counter).items()
    )


def _usage(model: ModelState) -> float:
    assert model.stats is not None
    total = model.stats.blocks_total
    return (total - model.stats.blocks_free) / total if total else 0.0


def _states(now: Snapshot) -> Iterator[Sample]:
    for model in now.models:
        if model.served:
            yield from (((model.id, state), float(model.state == state)) for state in STATES)


def _infos(now: Snapshot) -> Iterator[Sample]:
    for model in now.models:
        if (info := model.info) is not None:
            law = "yes" if info.law.holds else "no"
            yield (model.id, info.system_fingerprint, info.device, info.dtype, info.runner, law), 1.0


def _one(value: Callable[[Snapshot], float | None]) -> Callable[[Snapshot], list[Sample]]:
    """Read one number, if there is one."""
    return lambda now: [] if (number := value(now)) is None else [((), number)]


def _ledger(name: str) -> Callable[[Snapshot], list[Sample]]:
    return _one(lambda now: None if now.ledger is None else float(getattr(now.ledger, name)))


def _requests(now: Snapshot) -> Iterator[Sample]:
    yield from now.requests.items()


def _refusals(now: Snapshot) -> Iterator[Sample]:
    yield from (((str(status), code), count) for (status, code), count in now.refusals.items())


def _count(name: str) -> Callable[[Snapshot], Iterator[Sample]]:
    """Read a number of each model's counts."""
    return lambda now: (((model.id,), getattr(model.counts, name)) for model in now.models)


_MODEL: Final = ("model_name",)

SERIES: Final[tuple[Series, ...]] = (
    Series("num_requests_running", "gauge", _MODEL, "Choices that are computed now.", _stat("running"), "vLLM"),
    Series("num_requests_waiting", "gauge", _MODEL, "Choices that wait for their turn.", _stat("waiting"), "vLLM"),
    Series(
        "kv_cache_usage_perc", "gauge", _MODEL, "The part of the cache that is in use, 0 to 1.", _loaded(_usage), "vLLM"
    ),
    Series(
        "kv_cache_tokens",
        "gauge",
        _MODEL,
        "Tokens that the cache holds.",
        _loaded(lambda model: None if model.info is None else model.info.cache_tokens),
    ),
    Series(
        "prefix_cache_queries_total",
        "counter",
        _MODEL,
        "Tokens of prompts that were looked for in the prefix cache.",
        _count("prompt_tokens"),
        "vLLM",
    ),
    Series(
        "prefix_cache_hits_total",
        "counter",
        _MODEL,
        "Tokens of prompts that were found in the prefix cache.",
        _count("cached_tokens"),
        "vLLM",
    ),
    Series(
        "prompt_tokens_total",
        "counter",
        _MODEL,
        "Tokens of prompts, those found in the cache included.",
        _count("prompt_tokens"),
        "vLLM",
    ),
    Series(
        "generation_tokens_total",
        "counter",
        _MODEL,
        "Generated tokens, of all choices.",
        _count("generation_tokens"),
        "vLLM",
    ),
    Series(
        "num_preemptions_total",
        "counter",
        _MODEL,
        "Choices that were set back for want of cache, since the model was loaded.",
        _stat("preemptions"),
        "vLLM",
    ),
    Series(
        "spec_decode_num_draft_tokens_total",
        "counter",
        _MODEL,
        "Draft tokens that were computed, since the model was loaded.",
        _stat("drafted_tokens"),
        "vLLM",
    ),
    Series(
        "spec_decode_num_accepted_tokens_total",
        "counter",
        _MODEL,
        "Draft tokens that were kept, since the model was loaded.",
        _stat("accepted_tokens"),
        "vLLM",
    ),
    Series("engine_steps_total", "counter", _MODEL, "Steps, since the model was loaded.", _stat("steps")),
    Series(
        "request_success_total",
        "counter",
        (*_MODEL, "finished_reason"),
        "Choices that ended, by their finish reason.",
        _by("reasons"),
        "vLLM",
    ),
    Series(
        "replies_total",
        "counter",
        (*_MODEL, "outcome"),
        "Replies, each once, by how they ended: complete, disconnected, error.",
        _by("outcomes"),
    ),
    Series(
        "time_to_first_token_seconds",
        "histogram",
        _MODEL,
        "From a request's body to its reply's first token.",
        _count("first_token"),
        "vLLM, `gen_ai.server.time_to_first_token`",
    ),
    Series(
        "inter_token_latency_seconds",
        "histogram",
        _MODEL,
        "Between two steps of a reply, per token that the longer of its choices got.",
        _count("between_tokens"),
        "vLLM",
    ),
    Series(
        "request_time_per_output_token_seconds",
        "histogram",
        _MODEL,
        "The mean time of a token after the first ones, once for each prompt of a reply.",
        _count("per_token"),
        "vLLM, `gen_ai.server.time_per_output_token`",
    ),
    Series(
        "e2e_request_latency_seconds",
        "histogram",
        _MODEL,
        "From a request's body to the last token of a reply that is complete.",
        _count("whole"),
        "vLLM, `gen_ai.server.request.duration`",
    ),
    Series(
        "request_queue_time_seconds",
        "histogram",
        _MODEL,
        "From the engine's queue to the first step, once for each prompt of a reply.",
        _count("queue_time"),
        "vLLM",
    ),
    Series(
        "model_state",
        "gauge",
        (*_MODEL, "state"),
        f"1 for the state that a model is in, 0 for the others: {', '.join(STATES)}.",
        _states,
    ),
    Series(
        "model_memory_bytes",
        "gauge",
        _MODEL,
        "Memory that a loaded model takes.",
        _loaded(lambda model: model.memory_bytes),
    ),
    Series(
        "model_info",
        "gauge",
        (*_MODEL, "system_fingerprint", "device", "dtype", "runner", "reproducible"),
        "Always 1: what a loaded model is.",
        _infos,
    ),
    Series(
        "http_requests_total",
        "counter",
        ("endpoint", "method", "status"),
        "HTTP exchanges that ended, by endpoint, method, status; `other`: no endpoint; `none`: the client left before.",
        _requests,
        "`http.server.request.duration`",
    ),
    Series(
        "http_requests_active",
        "gauge",
        (),
        "HTTP exchanges under way, this one included.",
        _one(lambda now: now.active),
        "`http.server.active_requests`",
    ),
    Series(
        "refusals_total",
        "counter",
        ("status", "code"),
        "Answers that are an error, by status and `error.code`.",
        _refusals,
    ),
    Series("connections", "gauge", (), "Open connections.", _one(lambda now: now.connections)),
    Series(
        "connections_max", "gauge", (), "Connections that may be open at once.", _one(lambda now: now.max_connections)
    ),
    Series(
        "request_bodies_bytes",
        "gauge",
        (),
        "Memory of bodies that are read or parsed.",
        _one(lambda now: now.body_bytes),
    ),
    Series(
        "request_bodies_bytes_max", "gauge", (), "Memory that there is for them.", _one(lambda now: now.max_body_bytes)
    ),
    Series(
        "ledger_up", "gauge", (), "Whether the ledger could be used when it was last asked: 1 or 0.", _ledger("usable")
    ),
    Series(
        "ledger_faults_total",
        "counter",
        (),
        "Calls of the ledger that failed because it could not be used.",
        _ledger("faults"),
    ),
    Series(
        "ledger_settlements_waiting",
        "gauge",
        (),
        "Requests that have ended and are not written to the ledger yet.",
        _ledger("waiting"),
    ),
    Series(
        "ledger_settlements_set_aside",
        "gauge",
        (),
        "Settlements that the ledger refused and nobody has seen (`verbatim keys check`).",
        _ledger("aside"),
    ),
    Series(
        "build_info",
        "gauge",
        ("version",),
        "Always 1: the version of this server.",
        lambda now: [((now.version,), 1.0)],
    ),
)
