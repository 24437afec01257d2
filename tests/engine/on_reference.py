"""Load models on the CUDA path with torch's operations in place of kernels, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from graph_stand_in import StandInRecorder, WholeOperations

from engine.compute.cuda.backend import CudaBackend
from engine.compute.cuda.reference import TorchOperations
from engine.loading import loader


class ReferenceBackend(CudaBackend):
    """A CUDA backend whose operations are torch's, and whose graphs are recorded by a stand-in."""

    def __init__(self, *, records: bool = False) -> None:
        operations = WholeOperations(TorchOperations())
        recorder = (lambda: StandInRecorder(operations)) if records else None
        # Large steps take the stand-in long, and `test_graph_replays.py` tries every size.
        super().__init__(torch.device("cpu"), operations, recorder, most_recorded=16)


@contextmanager
def reference_backend(**options: Any) -> Iterator[None]:
    """Let every model that is loaded in the `with` block be computed by a `ReferenceBackend`."""

    def choose(*_: Any) -> ReferenceBackend:
        return ReferenceBackend(**options)

    without_kernels = mock.patch.object(loader, "choose_kernels", return_value=None)
    with without_kernels, mock.patch.object(loader, "choose_backend", choose):
        yield
