"""Faults that a test puts into a model's process: imported there, before it loads anything."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Any

import pytest

WORDS = "".join(["SEC", "RET"])
"""What a fault says of a request: not as it stands in a line of a traceback."""


def break_processes(patch: pytest.MonkeyPatch, fault: str) -> None:
    """Have every process that is started from now on install a fault, by the name of a function below."""
    from engine.serving.process import transport

    start = transport._START.replace("; from engine", f"; import broken_engines; broken_engines.{fault}(); from engine")
    assert start != transport._START
    patch.setattr(transport, "_START", start)


def step_raises() -> None:
    """The third step raises, with words that may quote a request."""

    def step(self: Any, honest: Any) -> Any:
        if self._steps >= 2:
            raise KeyError(WORDS)
        return honest(self)

    _wrap_step(step)


def step_never_ends() -> None:
    def step(self: Any, honest: Any) -> Any:
        while self._steps >= 2:
            time.sleep(1)
        return honest(self)

    _wrap_step(step)


def step_faults() -> None:
    """Compiled code reads where nothing is."""

    def step(self: Any, honest: Any) -> Any:
        return ctypes.string_at(0) if self._steps >= 2 else honest(self)

    _wrap_step(step)


def outputs_cannot_be_sent() -> None:
    """Of the request "bad", whose outputs hold something that is not plain data."""
    from engine.engine import Engine

    honest = Engine.step

    def step(self: Any) -> Any:
        outputs = honest(self)
        for output in outputs:
            if output.request_id.startswith("bad#"):
                object.__setattr__(output, "prompt_logprobs", lambda: None)
        return outputs

    Engine.step = step  # type: ignore[method-assign]


def prepare_never_ends() -> None:
    """And says so by an error of its log first."""
    from engine.preparation import Preparer

    def prepare(self: Any, request: Any) -> Any:
        import logging

        logging.getLogger("verbatim.engine").warning("prepares %s", request.request_id, extra={"fields": {"n": 1}})
        time.sleep(600)

    Preparer.prepare = prepare  # type: ignore[method-assign]


def prepare_has_a_fault() -> None:
    from engine.preparation import Preparer

    def prepare(self: Any, request: Any) -> Any:
        raise LookupError(WORDS)

    Preparer.prepare = prepare  # type: ignore[method-assign]


def load_is_killed() -> None:
    """As the kernel does where memory runs out."""
    from engine.loading import loader

    loader._load = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]


def load_has_a_fault() -> None:
    from engine.engine import Engine

    def fault(self: Any, model: Any) -> None:
        raise LookupError("not there")

    Engine.__init__ = fault  # type: ignore[method-assign]


def _wrap_step(step: Any) -> None:
    from engine.engine import Engine

    honest = Engine.step
    Engine.step = lambda self: step(self, honest)  # type: ignore[method-assign]
