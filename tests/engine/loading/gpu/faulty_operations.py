"""Operations of the CUDA path with one fault each, for trials that have to find it. Computed by torch."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor

from engine.compute.cuda.reference import TorchOperations


class Crashes(TorchOperations):
    """As an illegal instruction in a driver's library would."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError


class Exits(TorchOperations):
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        os.write(2, b"a library has its say\n")
        os._exit(3)


class Raises(TorchOperations):
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        raise RuntimeError("Triton Error [CUDA]: invalid argument\nsecond line")


class NoMemory(TorchOperations):
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


class Talks(TorchOperations):
    """Prints where the answers go."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        print("autotuning …", flush=True)
        os.write(1, b'{"check": "attention"')
        return super().silu_mul(gate_up)


class WrongAttention(TorchOperations):
    def attend(self, *arguments: Any) -> Tensor:
        return super().attend(*arguments) * 1.5


def fault(name: str, change: Any) -> TorchOperations:
    """Operations of which one, by its name, has its result changed by `change(result, first argument)`."""
    operations = TorchOperations()
    right = getattr(operations, name)

    def wrong(first: Any, *rest: Any) -> Any:
        return change(right(first, *rest), first)

    setattr(operations, name, wrong)
    return operations
