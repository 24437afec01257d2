"""`Registry`: the models of one process, by id. Loads them one after the other in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from engine.config import ModelConfig
from engine.errors import EngineDead, ModelLoading, ModelNotFound, VerbatimError
from engine.serving.adapter_view import views
from engine.serving.opening import open_engine
from engine.serving.protocol import EngineProtocol
from engine.types.model_info import LoadProgress, ModelInfo

log = logging.getLogger("verbatim.engine")


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """The state of one entry, or of one of its adapters. `detail`: progress while it loads, the reason once it failed.

    `parent`: of an adapter that is served beside its model: the model's id.
    """

    id: str
    state: Literal["loading", "ready", "failed"]
    detail: str
    info: ModelInfo | None = None
    parent: str | None = None


def with_adapters(status: ModelStatus, config: ModelConfig) -> list[ModelStatus]:
    """Return an entry's state, followed by those of its adapters, which are the same."""
    infos = {info.id: info for info in status.info.adapters.values()} if status.info else {}
    beside = [replace(status, id=one, info=infos.get(one), parent=status.id) for one in config.adapter_ids]
    return [status, *beside]


class Registry:
    """Owns the engines of a process: its loading thread makes them, `close` ends them."""

    def __init__(
        self,
        configs: Sequence[ModelConfig],
        *,
        pull: bool = False,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        self._configs = {config.id: config for config in configs}
        self._bases = {adapter: config.id for config in configs for adapter in config.adapter_ids}
        self._pull = pull
        self._on_progress = on_progress
        self._engines: dict[str, EngineProtocol] = {}
        self._details = dict.fromkeys(self._configs, "waiting for its turn")
        self._failures: dict[str, str] = {}
        self._closing = False
        self._lock = threading.Lock()  # guards the hand-over of a fresh engine against close
        self._thread = threading.Thread(target=self._load_all, name="model-loader", daemon=True)

    def start(self) -> None:
        """Start to load in the background."""
        self._thread.start()

    def get(self, model_id: str) -> EngineProtocol:
        """Return the engine of a model.

        Raises:
            ModelNotFound: no entry has this id; names those that exist.
            ModelLoading: not yet.
            EngineDead: it could not be loaded.
        """
        engine = self._engines.get(model_id)
        if engine is not None:
            return engine
        if model_id in self._bases:
            return views(self.get(self._bases[model_id]))[model_id]
        if model_id not in self._configs:
            known = ", ".join(sorted([*self._configs, *self._bases]))
            raise ModelNotFound(f"the model {model_id!r} does not exist; there is: {known}.", param="model")
        if model_id in self._failures:
            raise EngineDead(f"{model_id} could not be loaded: {self._failures[model_id]}")
        raise ModelLoading(f"{model_id} is loading ({self._details[model_id]}).")

    def list(self) -> list[ModelStatus]:
        """Return the state of every entry, in the order of the configuration, each followed by its adapters."""
        return [
            status for config in self._configs.values() for status in with_adapters(self._status(config.id), config)
        ]

    def wait(self) -> None:
        """Wait until every entry is loaded or has failed."""
        self._thread.join()

    def close(self) -> bool:
        """Stop loading and close every engine. Safe to call twice. False if one did not end and was left behind."""
        with self._lock:
            self._closing = True
            engines = list(self._engines.values())
        with ThreadPoolExecutor(max(1, len(engines))) as closers:  # side by side: waiting for one may take long
            return all(closers.map(lambda engine: engine.close(), engines))

    def _status(self, model_id: str) -> ModelStatus:
        engine = self._engines.get(model_id)
        if engine is not None:
            return ModelStatus(model_id, "ready", "ready", engine.info)
        if model_id in self._failures:
            return ModelStatus(model_id, "failed", self._failures[model_id])
        return ModelStatus(model_id, "loading", self._details[model_id])

    def _load_all(self) -> None:
        served: list[EngineProtocol] = []
        for model_id, config in self._configs.items():
            if self._closing:
                return
            try:
                engine = open_engine(
                    config,
                    pull=self._pull,
                    progress=partial(self._note, model_id),
                    beside=[other.step_bytes for other in served],
                )
            except VerbatimError as error:
                self._failures[model_id] = error.message
                self._say(model_id, f"failed: {error.message}")
                continue
            except Exception as error:
                log.exception("loading %s failed", model_id)
                self._failures[model_id] = f"{type(error).__name__}: {error}"
                self._say(model_id, f"failed: {self._failures[model_id]}")
                continue
            with self._lock:
                closing = self._closing
                if not closing:
                    self._engines[model_id] = engine
            if closing:
                engine.close()
                return
            served.append(engine)
            self._say(model_id, "ready")

    def _note(self, model_id: str, progress: LoadProgress) -> None:
        if progress.text != self._details[model_id]:
            self._say(model_id, progress.text)

    def _say(self, model_id: str, text: str) -> None:
        self._details[model_id] = text
        if self._on_progress:
            self._on_progress(f"{model_id}: {text}")
