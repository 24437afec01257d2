"""`Snapshot`: the numbers of one moment, from the objects that have them. Everything that tells numbers tells these.

Reading it asks no model, no database and no disk: it takes as long while models load and while the ledger hangs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Final

from engine import EngineStats, ModelInfo, ModelStatus, Registry, VerbatimError
from server.accounts.charging import LedgerState, Meter
from server.metrics.counts import Counts, ModelCounts
from server.metrics.replies import ReplyWatch
from server.wire.bodies import BodyMemory
from server.wire.connections import Connections

__all__ = ["STATES", "Metrics", "ModelState", "Snapshot", "server_version"]

STATES: Final = ("ready", "loading", "waiting", "unloading", "unloaded", "failed", "dead", "stalled")
"""What a model may be: those of `GET /v1/models`, and `stalled`: a step takes longer than the stall limit."""
_DISTRIBUTION: Final = "verbatim-server"


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model at one moment.

    Attributes:
        state: one of `STATES`.
        detail: progress, or the reason, in words.
        served: whether it has an entry now; False of one that only has counts, from before the configuration changed.
        stats: of its engine, since it was loaded; None while it is not.
        memory_bytes: what it takes while it is loaded; None where that is not known.
    """

    id: str
    state: str
    detail: str
    served: bool
    info: ModelInfo | None
    stats: EngineStats | None
    memory_bytes: int | None
    counts: ModelCounts


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The numbers of one moment.

    Attributes:
        now: seconds, by the clock of the counts.
        uptime: seconds since the application was made.
        refusals: answers that are an error, by status and code; those before there was a request included.
        connections, max_connections: None where the application does not know them.
        ledger: None where there are no keys.
    """

    now: float
    version: str
    uptime: float
    models: tuple[ModelState, ...]
    requests: Mapping[tuple[str, str, str], int]
    active: int
    refusals: Mapping[tuple[int, str], int]
    connections: int | None
    max_connections: int | None
    body_bytes: int
    max_body_bytes: int
    ledger: LedgerState | None


class Metrics:
    """What one application counts, and the moment's numbers of all that it consists of. Used on its event loop."""

    def __init__(
        self,
        registry: Registry,
        meter: Meter | None,
        bodies: BodyMemory,
        connections: Connections | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = Counts()
        self.clock = clock
        self.version = server_version()
        self._registry, self._meter, self._bodies, self._connections = registry, meter, bodies, connections
        self._began = clock()

    def reply(self, model_id: str, began: float | None = None) -> ReplyWatch:
        """Return what counts one reply of a model that is served. `began`: when its body had been read; None: now."""
        return ReplyWatch(self.counts.of_model(model_id), self.clock, self.clock() if began is None else began)

    def snapshot(self) -> Snapshot:
        """Read all numbers."""
        now, opened = self.clock(), self._connections
        listed = [self._model(status) for status in self._registry.list()]
        served = {model.id for model in listed}
        gone = [name for name in self.counts.models() if name not in served]
        earlier = Counter[tuple[int, str]]() if opened is None else opened.refusals
        return Snapshot(
            now=now,
            version=self.version,
            uptime=now - self._began,
            models=(*listed, *(self._former(name) for name in gone)),
            requests=dict(self.counts.requests),
            active=self.counts.active,
            refusals=self.counts.refusals + earlier,
            connections=None if opened is None else len(opened),
            max_connections=None if opened is None else opened.limit,
            body_bytes=self._bodies.taken.total(),
            max_body_bytes=self._bodies.size,
            ledger=None if self._meter is None else self._meter.state(),
        )

    def _model(self, status: ModelStatus) -> ModelState:
        state, detail, stats = str(status.state), status.detail, None
        beside = status.parent is not None  # an adapter: its engine is its model's, and counted there
        if state == "ready":
            try:
                stats = self._registry.get(status.id).stats()
            except VerbatimError as error:
                state, detail = "dead", error.message
            else:
                state = "dead" if not stats.alive else "stalled" if stats.stalled else state
        return ModelState(
            id=status.id,
            state=state,
            detail=detail,
            served=True,
            info=status.info,
            stats=None if beside else stats,
            memory_bytes=None if beside else status.memory_bytes or (stats.resident_bytes if stats else None) or None,
            counts=self.counts.of_model(status.id),
        )

    def _former(self, name: str) -> ModelState:
        """A model that had replies, and has no entry any more."""
        return ModelState(name, "unloaded", "", False, None, None, None, self.counts.of_model(name))


def server_version() -> str:
    """Return the version of this server; `unknown` where it was never installed."""
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:  # run from a folder
        return "unknown"
