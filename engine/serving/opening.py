"""`open_engine`: load an entry, and serve it on a thread or in a process of its own, as the entry says.

Imports neither torch nor the engine before it has to: a server whose models have processes of their own needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from engine.config import ModelConfig
from engine.errors import VerbatimError
from engine.serving.client import EngineClient
from engine.serving.process.transport import ProcessTransport
from engine.serving.protocol import EngineProtocol
from engine.serving.teller import Progress, Teller

__all__ = ["Progress", "open_engine"]


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
        progress: told how far it is. Called one at a time, while this function runs; not always on its thread.
        beside: `step_bytes` of the engines that run already on this machine, for a GPU's budget.
        on_death: called once, on a thread of the engine's, if it stops without `close`, with what every request is
            told. Must not close the engine itself, which would wait for that thread.

    Raises:
        LoadError: whatever is wrong, in one sentence; NotEnoughMemory with `needed` and `free` bytes. The process that
            loaded it has ended by then.
    """
    if _has_its_own_process(config):
        return EngineClient(ProcessTransport.open(config, pull, progress, beside), config, on_death)
    from engine.engine import Engine
    from engine.loading.loader import load
    from engine.serving.async_engine import AsyncEngine

    teller = Teller(progress or (lambda _: None))
    model = load(config, pull=pull, progress=teller.say, read=teller.read, beside=beside)
    return AsyncEngine(Engine(model), on_death)


def _has_its_own_process(config: ModelConfig) -> bool:
    return config.isolation == "process"
