"""A server in a thread of the tests' own process, so that a browser can reach an application that a test has built."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn


class PageServer:
    """Serves one application on loopback. It can be stopped, and started again on the same port."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._port = 0
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        listener = socket.create_server(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        config = uvicorn.Config(self._app, lifespan="off", log_level="critical", ws="none")
        self._server = server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop at once: what runs ends, as with a server that was killed."""
        if self._server is None or self._thread is None:
            return
        self._server.force_exit = True
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._server = self._thread = None


@contextlib.contextmanager
def served(app: Any) -> Iterator[PageServer]:
    server = PageServer(app)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Real:
    """A server with a real engine. `say(text=…)`: what it says next; see `ScriptedModel`."""

    def __init__(self, server: PageServer, model: Any) -> None:
        self.url = server.url
        self._model = model

    def say(self, **script: Any) -> None:
        self._model.script = script
