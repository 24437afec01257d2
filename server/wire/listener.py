"""Opens the listening socket. Imports nothing heavy: a port in use is reported before anything else is done."""

from __future__ import annotations

import socket
from typing import Final

from engine import ConfigError

__all__ = ["BACKLOG", "address_of", "bind"]

BACKLOG: Final = 2048
"""Connections that the system queues until they are accepted."""
_EVERYWHERE: Final = ("0.0.0.0", "::")


def bind(host: str, port: int) -> socket.socket:
    """Open the listening socket. Clients may connect from now on; they are answered once the server runs.

    Raises:
        ConfigError: the host is no address of this machine, or the port is in use.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"host {host!r:.200} is no address of this machine: {reason}.") from None
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another port with --port, or another address "
            "with --host."
        ) from None
    listener.set_inheritable(False)
    return listener


def address_of(listener: socket.socket, host: str) -> str:
    """Return the URL under which this machine reaches a listening socket. `host`: as it was asked for."""
    port = listener.getsockname()[1]
    shown = "127.0.0.1" if host in _EVERYWHERE else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
