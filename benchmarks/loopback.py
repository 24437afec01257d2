"""The floor under every stream: what the system call costs that hands one event to another process over loopback."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time

_DRAIN = """
import selectors, socket, sys
selector = selectors.DefaultSelector()
for _ in range(int(sys.argv[2])):
    selector.register(socket.create_connection(("127.0.0.1", int(sys.argv[1]))), selectors.EVENT_READ)
while selector.get_map():
    for key, _ in selector.select():
        if not key.fileobj.recv(65536):
            selector.unregister(key.fileobj)
"""
_EVENT_BYTES = 300  # one chunk with a short text, as this server writes it


def send_cost(streams: int, rounds: int, pause: float = 0.005) -> float:
    """Microseconds of CPU per `send`, `streams` of them in a row and then a pause, as a server does between steps."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(30)
        command = [sys.executable, "-c", _DRAIN, str(listener.getsockname()[1]), str(streams)]
        reader = stack.enter_context(subprocess.Popen(command))  # leaves when all its sockets are closed
        try:
            with contextlib.ExitStack() as connections:
                sockets = [connections.enter_context(listener.accept()[0]) for _ in range(streams)]
                event, spent = b"x" * _EVENT_BYTES, 0.0
                for connection in sockets:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for _ in range(rounds):
                    start = time.thread_time()
                    for connection in sockets:
                        connection.send(event)
                    spent += time.thread_time() - start
                    time.sleep(pause)
        except OSError:
            reader.kill()
            raise
    return spent * 1e6 / (streams * rounds)
