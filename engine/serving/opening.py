"""`open_engine`: load an entry, and serve it. Imports neither torch nor the engine before it has to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from engine.config import ModelConfig
from engine.errors import VerbatimError
from engine.serving.protocol import EngineProtocol
from engine.types.model_info import LoadProgress

__all__ = ["Progress", "open_engine"]

Progress = Callable[[LoadProgress], None]


def open_engine(
    config: ModelConfig,
    *,
    pull: bool = False,
    progress: Progress | None = None,
    beside: Sequence[Mapping[str, int]] = (),
    on_death: Callable[[VerbatimError], None] | None = None,
) -> EngineProtocol:
    """Load a model and start its engine. Returns once it is ready; whoever gets it closes it.

    Args:
        pull: fetch what is not in the hub's cache.
        progress: told how far it is.
        beside: `step_bytes` of the engines that run already on this machine, for a GPU's budget.
        on_death: called once, on a thread of the engine's, if it stops without `close`, with what every request is
            told. Must not close the engine itself, which would wait for that thread.

    Raises:
        LoadError: whatever is wrong, in one sentence; NotEnoughMemory with `needed` and `free` bytes.
    """
    import torch

    from engine.engine import Engine
    from engine.loading.loader import load
    from engine.serving.async_engine import AsyncEngine
    from engine.serving.protocol import Ended, Event

    class Watched(AsyncEngine):
        step_bytes: Mapping[str, int] = {}

        def _emit(self, event: Event) -> None:
            super()._emit(event)
            if isinstance(event, Ended) and not self._closed and on_death is not None:
                on_death(event.error)

    others: Any = [
        SimpleNamespace(step_bytes={torch.device(name): size for name, size in steps.items()}) for steps in beside
    ]
    say = (lambda text: progress(LoadProgress(text=text))) if progress is not None else None
    model = load(config, pull=pull, progress=say, beside=others)
    engine = Watched(Engine(model))
    engine.step_bytes = {str(device): size for device, size in model.step_bytes.items()}
    return engine
