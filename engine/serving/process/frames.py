"""Frames on a pipe: a length, then a pickle of plain data. Knows no engine.

Pickle is safe here: both ends are this program, and the pipes are inherited descriptors without an address, which no
other process can open. Yet a model's process reads what strangers wrote (checkpoints, requests). So the parent takes
no name out of a pickle but those of the data it expects (`plain_only`): what breaks a model's process cannot make its
parent call anything. The process refuses to send what would not be taken, so that one odd answer ends nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from types import ModuleType
from typing import Any, BinaryIO, Final, Protocol

from engine import errors
from engine.serving import protocol
from engine.serving.process import messages
from engine.types import outputs

__all__ = ["MOST", "FrameError", "framed", "read_frame", "write_all"]

MOST: Final = 1 << 30
"""Bytes of one frame. The largest that is expected are the log-probabilities of a long prompt, some 60 MB."""
_HEAD: Final = 4
_REBUILD: Final = errors.VerbatimError("").__reduce__()[0]
"""What an error is made again by."""
_BUILTINS: Final = frozenset({"MemoryError", "RuntimeError", "bytearray", "complex", "frozenset", "range", "set"})
_MODULES: Final = frozenset({errors.__name__, protocol.__name__, messages.__name__})


class FrameError(Exception):
    """A message that is too long, or a pipe that holds none."""


class Raw(Protocol):
    """An end of a pipe that is written to, without a buffer."""

    def write(self, data: memoryview, /) -> int | None: ...


def framed(message: object, *, plain_only: bool = False) -> bytes:
    """Return a message as it travels.

    Args:
        plain_only: refuse what `read_frame` with `plain_only` would not take.

    Raises:
        FrameError: it has more than `MOST` bytes.
        Exception: whatever pickle raises of something that is not plain data.
    """
    file = io.BytesIO(bytes(_HEAD))
    file.seek(_HEAD)
    if plain_only:
        _PlainPickler(file, pickle.HIGHEST_PROTOCOL).dump(message)
    else:
        pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL)
        pickler.dispatch_table = _REDUCERS
        pickler.dump(message)
    size = file.tell() - _HEAD
    if size > MOST:
        raise FrameError(f"a message of {size} bytes is over {MOST}")
    view = file.getbuffer()
    view[:_HEAD] = size.to_bytes(_HEAD)
    del view
    return file.getvalue()


def read_frame(file: BinaryIO, *, plain_only: bool) -> Any:
    """Read the next message; None where the pipe has ended, be it within a message.

    Args:
        plain_only: take only data that a model's process has to tell.

    Raises:
        FrameError: what comes is no message.
    """
    head = file.read(_HEAD)
    size = int.from_bytes(head)
    if size > MOST:
        raise FrameError(f"a message of {size} bytes is over {MOST}")
    data = file.read(size) if len(head) == _HEAD else b""
    if not data or len(data) < size:
        return None
    try:
        return _PlainUnpickler(io.BytesIO(data)).load() if plain_only else pickle.loads(data)
    except Exception as error:
        raise FrameError(f"{type(error).__name__}: {error}") from error


def write_all(file: Raw, data: bytes) -> None:
    """Write a whole frame, waiting for the reader where the pipe is full.

    Raises:
        OSError, ValueError: the other end, or this one, is closed.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) or 0 :]


class _PlainUnpickler(pickle.Unpickler):
    """Knows the classes of data that an engine tells, and no other name."""

    def find_class(self, module: str, name: str) -> Any:
        if _is_expected(module, name):
            found = super().find_class(module, name)
            if (isinstance(found, type) and found.__module__ == module) or found is _REBUILD:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is not expected from a model's process")


class _PlainPickler(pickle.Pickler):
    """Takes apart what `_PlainUnpickler` puts together, and nothing else."""

    def reducer_override(self, value: Any) -> Any:
        """Called for whatever is neither a number, a text nor a container of Python's own."""
        cls = type(value)
        reducer = _REDUCERS.get(cls)
        if reducer is not None:
            return reducer(value)
        named = value if cls is type or value is _REBUILD else cls
        if not _is_expected(named.__module__, named.__qualname__):
            raise pickle.PicklingError(f"{named.__module__}.{named.__qualname__} is no data of a model's process")
        return NotImplemented


def _is_expected(module: str, name: str) -> bool:
    if "." in name:
        return False
    if module == "builtins":
        return name in _BUILTINS
    return module.startswith("engine.types.") or module in _MODULES or module == "datetime"


def _reducer(cls: type) -> Callable[[Any], tuple[type, tuple[Any, ...]]]:
    """Return a function that takes an object apart into its class and the values that make it again.

    Several times faster than what a frozen dataclass with slots does by itself.
    """
    names = [item.name for item in fields(cls)]
    if len(names) == 1:
        only = attrgetter(names[0])
        return lambda value: (cls, (only(value),))
    values = attrgetter(*names)
    return lambda value: (cls, values(value))


def _plain_classes(*modules: ModuleType) -> list[type]:
    return [
        found
        for module in modules
        for found in vars(module).values()
        if isinstance(found, type) and found.__module__ == module.__name__ and hasattr(found, "__dataclass_fields__")
    ]


_REDUCERS: Final = {cls: _reducer(cls) for cls in _plain_classes(outputs, protocol, messages) if fields(cls)}
