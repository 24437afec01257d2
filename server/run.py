"""From a configuration to a listening process: socket, models, uvicorn, and an orderly end."""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
from collections.abc import Sequence

import uvicorn
from rich.console import Console
from rich.markup import escape

from engine import ConfigError, ModelConfig, Registry
from server.app import create_app
from server.settings import ServerSettings


def run(entries: Sequence[ModelConfig], settings: ServerSettings, *, pull: bool, console: Console) -> None:
    """Serve until a signal. The socket is open before the models load, so a taken port is known at once.

    Raises:
        ConfigError: the address cannot be bound.
    """
    listener = bind(settings)
    port = listener.getsockname()[1]
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    registry = Registry(entries, pull=pull, on_progress=lambda text: _tell(console, text))
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(registry, settings),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=settings.shutdown_seconds,
            server_header=False,
        )
    )
    # uvicorn ends in order on SIGTERM and then raises it again: that is an ordinary end here, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _greet(console, settings, port, entries)
    registry.start()
    try:
        server.run(sockets=[listener])  # on uvloop where it is installed
    except KeyboardInterrupt:
        pass
    finally:
        registry.close()
        listener.close()
        console.print("stopped.", highlight=False)


def bind(settings: ServerSettings) -> socket.socket:
    """A listening socket."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"host {settings.host!r} is no address of this machine: {error.strerror}.") from None
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}. Choose another with --port."
        ) from None
    listener.set_inheritable(False)
    return listener


def _greet(console: Console, settings: ServerSettings, port: int, entries: Sequence[ModelConfig]) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    console.print(f"verbatim listens on [bold]http://{host}:{port}/v1[/] (and /api/v1)", highlight=False)
    if settings.host not in ("127.0.0.1", "::1", "localhost"):
        console.print("[yellow]Anybody who reaches this address can use it: there are no keys yet.[/]")
    for entry in entries:
        if entry.builtin:
            console.print(
                f"{escape(entry.id)} is a tiny random model: [bold]its text is noise.[/] Put your own into models.yaml."
            )
    console.print("Try, once a model is ready:", highlight=False)
    print_plain(console, "  " + example_request(port, entries[0].id))


def print_plain(console: Console, text: str) -> None:
    """As it is: no markup, no wrapping, so that it can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _tell(console: Console, text: str) -> None:
    print_plain(console, text)


def example_request(port: int, model: str) -> str:
    """A line to paste into a shell."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], "seed": 7})
    return f"curl http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
