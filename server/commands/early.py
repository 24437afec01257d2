"""Opens the socket of `verbatim serve` and prints its first line, before typer, pydantic or anything else is imported.

typer and what checks models.yaml take longer to import than a user should look at an empty terminal. So the four
options that matter are read here first, and only where they are certain; `serve` reads and checks everything again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from server.commands.greeting import first_line
from server.hosts import HOST, LOOPBACK, PORT
from server.wire.listener import address_of, bind

if TYPE_CHECKING:
    import socket

__all__ = ["Early", "greet_early", "listen", "place_of"]

_VALUES: Final = {
    "--config": "config",
    "-c": "config",
    "--model": "model",
    "-m": "model",
    "--host": "host",
    "--port": "port",
    "--name": "",
    "--allow-host": "",
}
"""The options of `serve` that take a value, and what this file calls those that matter here."""
_FLAGS: Final = ("--allow-anonymous", "--no-allow-anonymous", "--pull")
_MOST_BYTES: Final = 1 << 20  # of a configuration that is read early


@dataclass(frozen=True, slots=True)
class Early:
    """A socket that is open and announced. `host`, `port`: as they were asked for."""

    listener: socket.socket
    host: str
    port: int


def greet_early(arguments: Sequence[str]) -> Early | None:
    """Open the socket and print the first line if the arguments of `serve` say for certain where; else None.

    Raises:
        ConfigError: the port is in use.
    """
    place = place_of(arguments)
    return None if place is None else Early(listen(*place, page=_has_page(arguments)), *place)


def listen(host: str, port: int, *, page: bool = True) -> socket.socket:
    """Open the socket and print the first line.

    Raises:
        ConfigError: the host is no address of this machine, or the port is in use.
    """
    listener = bind(host, port)
    print(first_line(address_of(listener, host), page=page), file=sys.stderr, flush=True)
    return listener


def place_of(arguments: Sequence[str]) -> tuple[str, int] | None:
    """Return host and port if they are certain before anything is checked, else None.

    An address that others can reach is not certain: without keys it is refused.
    """
    options = _options(arguments)
    if options is None:
        return None
    given = _server_keys(options.get("config"), options.get("model"))
    if given is None:
        return None
    host = options.get("host", given.get("host", HOST))
    port = int(options["port"]) if "port" in options else given.get("port", PORT)
    return (host, port) if host in LOOPBACK and type(port) is int and 0 <= port <= 65535 else None


def _has_page(arguments: Sequence[str]) -> bool:
    """Whether the configuration leaves the page on. For arguments that have a place."""
    options = _options(arguments) or {}
    return (_server_keys(options.get("config"), options.get("model")) or {}).get("ui", True) is not False


def _options(arguments: Sequence[str]) -> dict[str, str] | None:
    """Return the options by name, the last of each; None if the arguments are anything but options of `serve`."""
    found: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=") if argument.startswith("--") else (argument, "", "")
        if name in _FLAGS and not equals:
            continue
        if name not in _VALUES:
            return None
        if not equals:
            value = next(rest, "")
            if not value or value.startswith("-"):  # an option without its value; wrong usage
                return None
        found[_VALUES[name]] = value
    port = found.get("port")
    return None if port is not None and not (port.isascii() and port.isdigit()) else found


def _server_keys(config: str | None, model: str | None) -> dict[str, Any] | None:
    """Return the `server:` mapping of the configuration, or {} where there is none; None if the file looks wrong."""
    file = Path(config or "models.yaml")
    if config is None and (not file.exists() or (model is not None and model.startswith((".", "/", "~")))):
        return {}
    import yaml

    try:
        if file.stat().st_size > _MOST_BYTES:
            return None
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        known = isinstance(data["models"], list) and data["models"] and set(data) <= {"models", "server"}
        given = data.get("server") or {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return None  # reading it again says what is wrong
    if not known or not isinstance(given, dict):
        return None
    if model is not None and config is None and not any(_is(entry, model) for entry in data["models"]):
        return {}  # a folder or a hub id: the file does not count
    return given


def _is(entry: Any, model: str) -> bool:
    return model == "demo" or (isinstance(entry, dict) and entry.get("id") == model)
