"""Say whether the compiled kernels for CPUs can be had on this machine, without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.cache_folder import cache_folder
from engine.compute.cpu.kernels import Kernels, NoKernels
from engine.errors import LoadError

__all__ = ["cpu_kernels", "kernel_folder"]


def cpu_kernels(progress: Callable[[str], None] | None = None) -> str:
    """Load the kernels, compiled first if need be (some twenty seconds), and return the instruction set that they use.

    Where they do not use a matrix unit that the processor announces, it says why.

    Raises:
        LoadError: there are none here; the message says why and what would help.
    """
    try:
        kernels = Kernels.load(progress=progress)
        return kernels.matrix_unit.describe(kernels.target)
    except NoKernels as error:
        raise LoadError(f"{str(error).rstrip('.')}.") from None


def kernel_folder() -> Path | None:
    """Return the folder in which compiled kernels are kept; None where this user has no home."""
    return cache_folder()
