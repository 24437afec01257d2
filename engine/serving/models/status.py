"""What the registry tells of its models, and what it hands out: `ModelStatus` and `Lease`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, Self

from engine.config import ModelConfig, adapter_id
from engine.serving.models.outline import Outline
from engine.serving.models.slot import State
from engine.serving.protocol import EngineProtocol
from engine.types.model_info import LoadProgress, ModelInfo

__all__ = ["Lease", "ModelStatus", "with_adapters"]


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """The state of one entry, or of one of its adapters.

    Attributes:
        detail: progress while it loads; else why it is in this state.
        info: what is known of the model since it was loaded for the first time.
        load: when the entry says that it is loaded.
        required: the server is not ready without it: it is loaded at start, and was not unloaded on purpose since.
        users: requests that wait for it or are answered by it.
        progress: how far its files were read; None where that is not known.
        memory_bytes: what it takes, as far as that is known; None while it is not loaded.
        outline: what its checkpoint says of itself, before it is loaded.
        parent: of an adapter that is served beside its model: the model's id.
    """

    id: str
    state: State
    detail: str
    info: ModelInfo | None = None
    load: Literal["at_start", "on_demand"] = "at_start"
    required: bool = True
    users: int = 0
    progress: LoadProgress | None = None
    memory_bytes: int | None = None
    outline: Outline | None = None
    parent: str | None = None


def with_adapters(status: ModelStatus, config: ModelConfig) -> list[ModelStatus]:
    """Return an entry's state, followed by those of its adapters, which are the same."""
    infos = {info.id: info for info in status.info.adapters.values()} if status.info else {}
    beside = [adapter for adapter in config.adapters if not adapter.merge]
    return [status, *(_with_adapter(status, infos, config, adapter.name) for adapter in beside)]


def _with_adapter(status: ModelStatus, infos: Mapping[str, ModelInfo], config: ModelConfig, name: str) -> ModelStatus:
    found, one = status.outline, adapter_id(config.id, name)
    outline = replace(found, name=adapter_id(found.name, name)) if found is not None else None
    return replace(status, id=one, info=infos.get(one), outline=outline, parent=status.id)


class Lease:
    """A ready engine that does not leave before it is released. For the thread that has acquired it."""

    def __init__(self, engine: EngineProtocol, give_back: Callable[[], None]) -> None:
        self._engine: EngineProtocol | None = engine
        self._give_back = give_back

    @property
    def engine(self) -> EngineProtocol:
        """The engine. Not to be used after `release`."""
        assert self._engine is not None, "the lease was released"
        return self._engine

    def release(self) -> None:
        """Give the engine back. Does nothing the second time."""
        if self._engine is not None:
            self._engine = None
            self._give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()
