"""One request with its answer, and the split that it belongs to. Knows no skill: those are drawn in talk.py, tasks.py,
memory.py and tools.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Split = Literal["train", "test"]
HELD_OUT: Final = 16
"""One key in this many belongs to evaluation."""


@dataclass(frozen=True)
class Call:
    """A request and the one call that answers it."""

    request: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exchange:
    """One request with its answer.

    `key`: names the combination. `thought`: what stands between the thinking tags when the model is asked to think.
    `short`: the answer in one word, if there is one. `calls`: tool calls, made before `answer` is given from `results`.
    `free`: several answers are right, so an exact match means nothing. `basic`: can only be learnt by heart (6 * 7), so
    that training has all of it and evaluation none. `copied`: what the answer takes from the conversation as it stands there.
    """

    skill: str
    key: str
    user: str
    answer: str
    thought: str
    short: str | None = None
    calls: tuple[Call, ...] = ()
    results: tuple[str, ...] = ()
    free: bool = False
    basic: bool = False
    copied: tuple[str, ...] = ()


def split_of(key: str) -> Split:
    """The split that a combination belongs to, for good."""
    digest = hashlib.sha256(key.encode()).digest()
    return "test" if digest[0] % HELD_OUT == 0 else "train"
