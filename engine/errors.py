"""The exception tree. Knows nothing of HTTP: the server keeps the one table from these classes to status codes.

VerbatimError
├── RequestError              the caller's fault; refused before anything is generated
│   ├── InvalidFormat         a wrong type or shape
│   │   ├── TemplateRefused          the model's chat template rejects these messages (its own words)
│   │   └── ContextLengthExceeded    the prompt does not fit; carries both numbers
│   ├── InvalidParameter      right type, value out of range or impossible combination
│   │   └── Unsupported              a known field that this model or build cannot honour
│   └── ModelNotFound
├── ConfigError               models.yaml or the command line
├── LoadError                 the checkpoint cannot be loaded
│   ├── LoadInterrupted              the process that loaded it has ended; another may not
│   └── NotEnoughMemory              carries needed and free bytes
├── ReceiptError              a receipt cannot be read, or its signature does not hold
├── ReplyFault                a fault of this program, in reading or checking one reply; the engine goes on
└── Unavailable               not the caller's fault; the same request may succeed later or on another server
    ├── QueueFull
    ├── QueueTimeout                 the request has waited for `max_queue_seconds`
    ├── ModelLoading
    ├── ModelInUse                   it serves requests or is being loaded, and so cannot be unloaded
    ├── NoRoom                       no model can leave for this one; carries needed and free bytes, and who holds them
    ├── EngineDead                   carries the cause
    ├── OutOfMemory                  this request's step did not fit; the engine goes on
    └── NumericalFault               the model produced a value that is not finite
"""

from __future__ import annotations

import contextlib
import errno
import os
import traceback
from collections.abc import Iterator
from typing import Any

__all__ = [
    "ConfigError",
    "ContextLengthExceeded",
    "EngineDead",
    "InvalidFormat",
    "InvalidParameter",
    "LoadError",
    "LoadInterrupted",
    "ModelInUse",
    "ModelLoading",
    "ModelNotFound",
    "NoRoom",
    "NotEnoughMemory",
    "NumericalFault",
    "OutOfMemory",
    "QueueFull",
    "QueueTimeout",
    "ReceiptError",
    "ReplyFault",
    "RequestError",
    "TemplateRefused",
    "Unavailable",
    "Unsupported",
    "VerbatimError",
]


class VerbatimError(Exception):
    """Base of everything this project raises on purpose.

    Attributes:
        message: one sentence for the person who reads it; names the value and the limit.
        code: a stable identifier for programs.
        param: dotted path of the offending field (`messages.0.role`), or None.
        details: further numbers, shown beside the message (`prompt_tokens`, `context_length`, …).
    """

    code = "error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross from the engine to the server as data; keyword-only arguments need help to be pickled.
        return _rebuild, (type(self), self.message, self.param, self.code, self.details)


def _rebuild(
    cls: type[VerbatimError], message: str, param: str | None, code: str, details: dict[str, Any]
) -> VerbatimError:
    return cls(message, param=param, code=code, **details)


class RequestError(VerbatimError):
    code = "invalid_request"


class InvalidFormat(RequestError):
    code = "invalid_format"


class TemplateRefused(InvalidFormat):
    code = "template_refused"


class ContextLengthExceeded(InvalidFormat):
    code = "context_length_exceeded"


class InvalidParameter(RequestError):
    code = "invalid_parameter"


class Unsupported(InvalidParameter):
    code = "unsupported_parameter"


class ModelNotFound(RequestError):
    code = "model_not_found"


class ConfigError(VerbatimError):
    code = "config_error"


class LoadError(VerbatimError):
    code = "load_error"


class LoadInterrupted(LoadError):
    code = "load_interrupted"


class NotEnoughMemory(LoadError):
    code = "not_enough_memory"


class ReceiptError(VerbatimError):
    code = "invalid_receipt"


class ReplyFault(VerbatimError):
    code = "internal_error"


class Unavailable(VerbatimError):
    code = "unavailable"


class QueueFull(Unavailable):
    code = "queue_full"


class QueueTimeout(Unavailable):
    code = "queue_timeout"


class ModelLoading(Unavailable):
    code = "model_loading"


class ModelInUse(Unavailable):
    code = "model_in_use"


class NoRoom(Unavailable):
    """There is no room for a model. `details["holders"]`: the loaded ones, as `{"id", "memory_bytes"}`."""

    code = "no_room"


class EngineDead(Unavailable):
    code = "engine_dead"


class OutOfMemory(Unavailable):
    code = "out_of_memory"


class NumericalFault(Unavailable):
    code = "numerical_fault"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters, without its full stop; else its type."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def one_line(message: str | BaseException, most: int = 400) -> str:
    """Return a text or an error's whole message on one line of at most `most` characters; else the error's type.

    The text may be a stranger's: characters that control a terminal are dropped.
    """
    text = str(message)[: 4 * most]
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not text and isinstance(message, BaseException):
        return type(message).__name__
    return text if len(text) <= most else f"{text[:most]} …"


def trace_lines(error: BaseException | None) -> list[str]:
    """Return the lines of a traceback: where an exception and those that caused it were raised, the earliest first.

    Their words are left out, for they may quote a request, unless they come from the operating system or torch.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return [line for found in reversed(seen) for line in _trace_of(found)]


def _trace_of(error: BaseException) -> list[str]:
    kind = type(error)
    lines = ["Traceback (most recent call last):"]
    lines += "".join(traceback.format_tb(error.__traceback__)).splitlines()
    lines.append(f"{kind.__module__}.{kind.__qualname__}: {_harmless_words(error)}".replace("builtins.", "", 1))
    if isinstance(error, BaseExceptionGroup):
        lines += ["    " + line for inner in error.exceptions for line in _trace_of(inner)]
    return lines


def _harmless_words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"[Errno {error.errno}] {os.strerror(error.errno)}"
    if isinstance(error, MemoryError) or type(error).__module__.partition(".")[0] == "torch":
        return str(error)[:500]
    return "(its words are left out: they may quote a request)"


def panicked(error: BaseException) -> bool:
    """Tell whether an error is a panic of a library in Rust (tokenizers, llguidance), which is no `Exception`."""
    return type(error).__name__ == "PanicException"


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out; torch's allocator for the CPU raises a plain RuntimeError."""
    said = str(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}  # torch is not imported here
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)  # of a mapping
        or "OutOfMemoryError" in kinds
        or "not enough memory" in said
        or "can't allocate memory" in said
    )


@contextlib.contextmanager
def panics_caught() -> Iterator[None]:
    """Raise a panic of a library in Rust as a `RuntimeError`: it is no Exception, and callers expect one."""
    try:
        yield
    except BaseException as error:
        if panicked(error):
            raise RuntimeError(f"a library panicked: {error}"[:300]) from error
        raise
