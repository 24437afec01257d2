"""A library that is compiled for ARM and runs in an emulator, called like one that `ctypes` has loaded.

The other processor has a memory of its own. So the memory that a call's pointers lead to is sent along: the storage of
the tensor, or the ctypes object, in which an address lies, whole, and what those point to in turn. Afterwards what came
back is written over it. The tensors and objects are found among those that are alive, so a new function of the library
needs nothing here.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import gc
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

import pytest
from torch import Tensor

from engine.compute.cpu import kernel_file, kernels
from engine.compute.cpu.kernels import Kernels
from engine.scheduling.block_pool import BLOCK_SIZE

COMPILER: Final = "aarch64-linux-gnu-gcc"
EMULATOR: Final = "qemu-aarch64"
_ROOT: Final = Path("/usr/aarch64-linux-gnu")  # where Debian puts the C library for the other processor
_UNKNOWN: Final = -(2**63)
_INTEGERS: Final = (ctypes.c_long, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t)


def compile_for_arm(source: Path, target: Path, *flags: str) -> Path:
    """Compile a C file for ARM; the test is skipped where there is no such compiler, or no emulator."""
    for program in (COMPILER, EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    subprocess.run([COMPILER, *flags, str(source), "-o", str(target)], check=True, timeout=300)
    return target


def emulated(program: Path, processor: str, *arguments: str) -> list[str]:
    """Return the command that runs a program on a processor of ARM."""
    return [EMULATOR, "-L", str(_ROOT), "-cpu", processor, str(program), *arguments]


@contextlib.contextmanager
def emulated_kernels(folder: Path, processor: str, flags: Sequence[str]) -> Iterator[Kernels]:
    """Compile the kernels for ARM, and run them in the emulator.

    Args:
        folder: for what is compiled.
        processor: the one to emulate, in qemu's names.
        flags: which instructions to use, and how to optimise.
    """
    flags = (*flags, *kernel_file.FLAGS, f"-DBLOCK_SIZE={BLOCK_SIZE}")
    library = EmulatedLibrary(compile_for_arm(kernels._SOURCE, folder / "kernels.so", *flags), folder, processor)
    try:
        yield Kernels(cast(ctypes.CDLL, library))
    finally:
        library.close()


class EmulatedLibrary:
    """Looks like a `ctypes.CDLL`. At most one at a time; `close` ends the emulator."""

    def __init__(self, library: Path, folder: Path, processor: str) -> None:
        """Start the emulator. folder: for the program that calls the library; processor: which one, in qemu's names."""
        host = compile_for_arm(Path(__file__).with_name("arm_host.c"), folder / "arm_host", "-O1", "-Wall", "-Werror")
        self._memory = _Memory()
        self._process = subprocess.Popen(
            emulated(host, processor, str(library)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        function = _Function(self, name)
        setattr(self, name, function)
        return function

    def close(self) -> None:
        """End the emulator."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()
        self._memory.close()

    def _exchange(self, name: str, call: _Call, kind: int) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(call.message(name, kind))
        self._process.stdin.flush()
        result: Any = struct.unpack("<q", self._read(8, name))[0]
        if result == _UNKNOWN:
            raise AttributeError(f"the library has no function {name}")
        if kind == 2:
            result = self._read(result, name)
        for start, size in call.returned():
            ctypes.memmove(start, self._read(size, name), size)
        return result

    def _read(self, size: int, name: str) -> bytes:
        assert self._process.stdout is not None
        found = self._process.stdout.read(size)
        if len(found) < size:
            raise RuntimeError(f"{name} ended the emulated processor with status {self._process.wait()}")
        return found


class _Function:
    argtypes: Sequence[Any] = ()
    restype: Any = None

    def __init__(self, library: EmulatedLibrary, name: str) -> None:
        self._library, self._name = library, name

    def __call__(self, *arguments: Any) -> Any:
        assert len(arguments) == len(self.argtypes), f"{self._name} takes {len(self.argtypes)} arguments"
        call = _Call(self._library._memory)
        for kind, value in zip(self.argtypes, arguments, strict=True):
            if kind is ctypes.c_float:
                call.floats.append(float(value))
            elif kind is ctypes.c_void_p:
                call.point(_address(value))
            else:
                assert kind in _INTEGERS, kind
                call.integers.append(int(value))
        return self._library._exchange(self._name, call, {None: 0, ctypes.c_char_p: 2}.get(self.restype, 1))


def _address(value: Any) -> int:
    """Return where a pointer leads to: None, an address, what `ctypes.byref` makes, or a ctypes object."""
    if value is None or isinstance(value, int):
        return value or 0
    return ctypes.addressof(getattr(value, "_obj", value))


class _Call:
    """The arguments of a call, and the memory that they lead to."""

    def __init__(self, memory: _Memory) -> None:
        self.integers: list[int] = []
        self.floats: list[float] = []
        self._memory, self._records = memory.sizes()
        self._starts = sorted(self._memory)
        self._buffers: dict[int, int] = {}  # where each begins: its number
        self._pointers: list[tuple[int, int, int, int]] = []

    def point(self, address: int) -> None:
        """Add a pointer as an argument."""
        if address:
            self._pointers.append((-1, 8 * len(self.integers), *self._place(address)))
        self.integers.append(0)

    def message(self, name: str, kind: int) -> bytes:
        """Return the call as arm_host.c reads it."""
        counts = (len(self.integers), len(self.floats), len(self._buffers), len(self._pointers), kind)
        parts = [struct.pack("<64s5q", name.encode(), *counts)]
        parts.append(struct.pack(f"<{counts[0]}q{counts[1]}f", *self.integers, *self.floats))
        for start in self._buffers:
            size = self._memory[start]
            parts += [struct.pack("<q", size), ctypes.string_at(start, size)]
        parts += [struct.pack("<4q", *pointer) for pointer in self._pointers]
        return b"".join(parts)

    def returned(self) -> list[tuple[int, int]]:
        """Return start and size of the memory that comes back: all but what holds pointers."""
        records = {pointer[0] for pointer in self._pointers}
        return [(start, self._memory[start]) for start, number in self._buffers.items() if number not in records]

    def _place(self, address: int) -> tuple[int, int]:
        """Return the buffer in which an address lies, and its offset there."""
        found = self._find(address)
        assert found is not None, f"nothing that is alive is at {address:#x}"
        if found not in self._buffers:
            self._buffers[found] = len(self._buffers)
            if found in self._records:
                self._follow(found)
        return self._buffers[found], address - found

    def _find(self, address: int) -> int | None:
        at = bisect.bisect_right(self._starts, address) - 1
        start = self._starts[at] if at >= 0 else 0
        return start if at >= 0 and address < start + self._memory[start] else None

    def _follow(self, record: int) -> None:
        """Find the pointers in a record: words that are the address of something alive."""
        number = self._buffers[record]
        for at, word in enumerate(struct.iter_unpack("<Q", ctypes.string_at(record, self._memory[record] // 8 * 8))):
            if self._find(word[0]) is not None:
                self._pointers.append((number, 8 * at, *self._place(word[0])))


class _Memory:
    """The tensors' storages and the ctypes objects that are alive.

    Those that were alive at the beginning are kept, and kept apart (`gc.freeze`): a call looks only through what came
    later, which is quick.
    """

    def __init__(self) -> None:
        self._old = _arrays()
        gc.freeze()

    def close(self) -> None:
        """Undo what was done to the garbage collector."""
        self._old.clear()
        gc.unfreeze()

    def sizes(self) -> tuple[dict[int, int], set[int]]:
        """Return start and size in bytes of each, and the starts of the ctypes objects: pointers may be in them."""
        sizes: dict[int, int] = {}
        records = set()
        for one in (*self._old, *_arrays()):
            if isinstance(one, Tensor):
                storage = one.untyped_storage() if one.device.type == "cpu" else None
                start, size = (storage.data_ptr(), storage.nbytes()) if storage else (0, 0)
            else:
                start, size = ctypes.addressof(one), ctypes.sizeof(one)
                records.add(start)
            sizes[start] = max(sizes.get(start, 0), size)
        sizes.pop(0, None)
        return sizes, records


def _arrays() -> list[Any]:
    kinds = (Tensor, ctypes.Array, ctypes.Structure)
    return [one for one in gc.get_objects() if issubclass(type(one), kinds)]
