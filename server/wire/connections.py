"""Limits the number of open connections, and chooses which one to close for a new one. Knows no HTTP."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Final, Literal, Protocol

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

__all__ = ["Connections", "Waits", "room_for_connections"]

_RESERVE: Final = 256
"""File descriptors kept for everything else: files of models, the database, pipes, the log."""
_ENOUGH: Final = 65_536
"""File descriptors requested from the system. More would be of no use, and some systems refuse larger requests."""

Waits = Literal["idle", "body", "no"]
"""What the server waits for from a client: a request (`idle`), the rest of a body, or nothing."""


class Connection(Protocol):
    def give_up(self) -> None:
        """Close at once and drop what waits to be sent."""


class Connections:
    """The open connections of a server. Those that wait for their clients are ordered by how long they have waited."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._all: dict[Connection, Waits] = {}
        self._waiting: dict[Waits, dict[Connection, None]] = {"idle": {}, "body": {}, "no": {}}
        self.refusals: Counter[tuple[int, str]] = Counter()
        """What was refused before there was a request, by status and code."""

    def __len__(self) -> int:
        return len(self._all)

    def admit(self, one: Connection) -> bool:
        """Admit a new connection. At the limit, the one that has waited longest for its client is closed: first one
        without a request, then one whose body is incomplete. Returns False if all others are at work."""
        if len(self._all) >= self.limit:
            longest = next(chain(self._waiting["idle"], self._waiting["body"]), None)
            if longest is None:
                return False
            self.drop(longest)
            longest.give_up()
        self._all[one] = "idle"
        self._waiting["idle"][one] = None
        return True

    def note(self, one: Connection, waits: Waits) -> None:
        """Note what the server waits for from this client now. Does nothing for a connection that was dropped."""
        before = self._all.get(one, waits)
        if before != waits:
            del self._waiting[before][one]
            self._waiting[waits][one] = None
            self._all[one] = waits

    def drop(self, one: Connection) -> None:
        """Forget a connection, if it is known."""
        before = self._all.pop(one, None)
        if before is not None:
            del self._waiting[before][one]


def room_for_connections(wanted: int) -> int:
    """Return how many connections the process can have: the number wanted, or fewer if descriptors are short.

    Raises the process's own limit of descriptors as far as the system allows.
    """
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    for aim in (_ENOUGH, 10_240):  # macOS allows only the second, whatever its hard limit says
        if hard != resource.RLIM_INFINITY:
            aim = min(aim, hard)
        if aim > soft:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (aim, hard))
                soft = aim
            except (ValueError, OSError):
                continue
    return max(1, min(wanted, soft - min(_RESERVE, soft // 2)))
