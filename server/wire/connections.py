"""How many connections may be open, and which one is closed when there is one too many. Knows no HTTP."""

from __future__ import annotations

from itertools import chain
from typing import Final, Literal, Protocol

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

__all__ = ["Connections", "Waits", "room_for_connections"]

_RESERVE: Final = 256
"""Descriptors for all that is not a connection: files of models, the database, pipes, the log."""
_ENOUGH: Final = 65_536
"""Descriptors asked for. More has no use, and some systems refuse to name as many as they allow."""

Waits = Literal["idle", "body", "no"]
"""What a server waits for from a client: a request, the rest of a body, or nothing."""


class Connection(Protocol):
    def give_up(self) -> None:
        """Close at once, with all that waits to be sent."""


class Connections:
    """The open connections of a server, those that wait for their clients in the order in which they began to."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._all: dict[Connection, Waits] = {}
        self._waiting: dict[Waits, dict[Connection, None]] = {"idle": {}, "body": {}, "no": {}}

    def __len__(self) -> int:
        return len(self._all)

    def admit(self, one: Connection) -> bool:
        """Take a new connection in. If there are too many, whichever has waited longest for its client makes way:
        first one without a request, then one whose body is not there. False: all are at work."""
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
        """What the server waits for from this client now. Nothing happens if it is what it was, or was dropped."""
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
    """How many connections the process may hold: as many as wanted, or what the limit of descriptors leaves.

    Raises the process's own limit as far as the system lets it.
    """
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    for aim in (_ENOUGH, 10_240):  # macOS allows the second, whatever it says of its hard limit
        if hard != resource.RLIM_INFINITY:
            aim = min(aim, hard)
        if aim > soft:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (aim, hard))
                soft = aim
            except (ValueError, OSError):
                continue
    return max(1, min(wanted, soft - min(_RESERVE, soft // 2)))
