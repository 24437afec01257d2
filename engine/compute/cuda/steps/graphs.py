"""CUDA graphs: a step's operations recorded once, and launched again without Python. Knows no model and no table.

A graph holds the very tensors that it was recorded with. What differs from step to step therefore stands in tensors
that stay where they are (`engine.compute.cuda.steps.buffers`), and what a graph computes is overwritten by its next
replay. Bits are those of the same operations launched one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.devices.gpu import CAPTURE, recording_stream

__all__ = ["CudaRecorder", "Graph", "NoWaits", "NotCapturable", "Recorder", "buckets", "smallest"]


class NotCapturable(Exception):
    """The operations cannot be recorded: they read a number back from the device, or their shapes depend on data."""


class Graph(Protocol):
    """A recorded step."""

    output: Tensor
    """What the recorded function returned; each replay overwrites it."""

    def replay(self) -> None:
        """Launch the recorded operations."""


class Recorder(Protocol):
    """Records graphs that share one pool of memory: they never run at the same time."""

    def record(self, run: Callable[[], Tensor]) -> Graph:
        """Record what a function launches.

        Raises:
            NotCapturable: it cannot be recorded.
        """


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self._graph, self.output = graph, output

    def replay(self) -> None:
        self._graph.replay()


class CudaRecorder:
    """Records on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, run: Callable[[], Tensor]) -> Graph:
        """Record what a function launches: see `Recorder`.

        It runs twice before: once to compile kernels and allocate workspaces, and once to find out whether it waits for
        the GPU. A capture that fails would leave torch's allocator in a state in which no memory is given back.
        """
        with CAPTURE, torch.cuda.device(self._device):
            stream = recording_stream(self._device)
            stream.wait_stream(torch.cuda.current_stream())
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(stream):
                    run()
                    with NoWaits():  # type: ignore[no-untyped-call]
                        run()
                    # Threads of other models go on meanwhile.
                    with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                        output = run()
            except (torch.OutOfMemoryError, NotCapturable):
                raise
            except RuntimeError as error:
                raise NotCapturable(str(error).split("\n", 1)[0]) from error
            finally:
                torch.cuda.current_stream().wait_stream(stream)
        return _CudaGraph(graph, output)


_READS: Final = "_local_scalar_dense bincount equal is_nonzero item masked_select nonzero unique_dim"
_WAITS: Final = frozenset(f"aten::{name}" for name in _READS.split())
"""Operations that read a number back, or whose result has a shape that depends on numbers."""


class NoWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode in which what waits for the device raises NotCapturable: on this thread, and on no other."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name: str = func._schema.name
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()}
        out = None if name in _WAITS else func(*args, **(kwargs or {}))
        made = {t.device.type for t in tree_leaves(out) if isinstance(t, Tensor)}
        if name in _WAITS or len(given | made) > 1:
            raise NotCapturable(f"{name.removeprefix('aten::')} waits for the device")
        return out


def buckets(most: int) -> tuple[int, ...]:
    """Return the numbers of rows that steps are padded to: powers of two, and the last one is `most`."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return tuple(sizes)


def smallest(sizes: tuple[int, ...], count: int) -> int:
    """Return the smallest of ascending sizes that is at least `count`."""
    return next(size for size in sizes if size >= count)
