"""Runs the server on an open socket: serves with uvicorn, shuts down in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path

import uvicorn
from rich.console import Console
from starlette.types import ASGIApp

from engine import Registry
from server import logs
from server.accounts.charging import Meter
from server.accounts.owners import name_of_this_process
from server.accounts.settling import BEAT_SECONDS
from server.app import create_app
from server.ledger.records import Prices
from server.ledger.store import Ledger
from server.lifecycle.hangup import Hangup
from server.lifecycle.reloading import Reloading, Reread
from server.progress.display import Display
from server.receipts.service import Receipts
from server.settings import ServerSettings
from server.wire.connections import Connections, room_for_connections
from server.wire.listener import BACKLOG
from server.wire.protocol import bounded_protocol

_AT_A_TIME = 32  # connections accepted at once, before their number is checked
_LAST = 8.0  # seconds for the last step to end and for the last events to reach their clients


class Server(uvicorn.Server):
    """uvicorn's server, which shuts down in order: accept no more, let requests finish for a while, end the rest."""

    def __init__(self, config: uvicorn.Config, registry: Registry, grace: float) -> None:
        super().__init__(config)
        self._registry = registry
        self._grace = grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, with a longer queue than asyncio would use.

        asyncio accepts as many connections at once as may be queued: with few descriptors, a flood would take all of
        them before the first one is counted.
        """
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        async def end_the_rest() -> None:
            await asyncio.sleep(self._grace)
            await asyncio.to_thread(self._registry.close)  # every stream gets its error event

        rest = asyncio.create_task(end_the_rest())
        try:
            await super().shutdown(sockets)
        finally:
            rest.cancel()


def run(
    registry: Registry,
    display: Display,
    settings: ServerSettings,
    *,
    listener: socket.socket,
    ledger: str | None,
    receipts: Receipts,
    console: Console,
    reread: Reread | None = None,
) -> None:
    """Serve until a signal arrives.

    Args:
        registry: loads the models; closed at the end, as `display`, `listener` and `receipts` are.
        ledger: the ledger's URL; None where there are no keys.
        reread: reads the configuration again on SIGHUP; None where there is no file.

    Raises:
        LedgerFault: the ledger cannot be used.
    """
    no_core_dumps()
    logs.take_over_libraries()
    meter = open_meter(ledger, settings) if ledger else None
    connections = Connections(room_for_connections(settings.max_connections))
    if connections.limit < settings.max_connections:
        console.print(
            f"[yellow]This process may have {connections.limit} connections, not {settings.max_connections}: raise its "
            "limit of open files (ulimit -n).[/]"
        )
    config = configured(create_app(registry, settings, meter, receipts, connections), settings, connections)
    server = Server(config, registry, settings.shutdown_seconds)
    # uvicorn shuts down on SIGTERM and then raises it again, which must not end the process with a signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Hangup(Reloading(registry, settings, reread), partial(setattr, server, "should_exit", True)).install()
    registry.start()
    threading.Thread(target=_spare_the_collector, args=(registry,), name="collector", daemon=True).start()
    try:
        server.run(sockets=[listener])  # on uvloop where it is installed
    except KeyboardInterrupt:
        pass
    finally:
        ended = registry.close()
        if meter:
            meter.close()
        receipts.close()
        listener.close()
        display.close()
        with contextlib.suppress(OSError):  # the terminal may have gone
            console.print("stopped.", highlight=False)
        if not ended:  # threads that still compute while the interpreter shuts down would end it with a signal
            logging.shutdown()
            os._exit(0)


def _spare_the_collector(registry: Registry) -> None:
    """Exclude the loaded models and libraries from garbage collection.

    A full collection over the 400,000 objects of the libraries alone stops the process for 0.3 s, and a body with many
    lists triggers one. What is garbage by now is collected first.
    """
    registry.wait()
    gc.collect()
    gc.freeze()


def configured(app: ASGIApp, settings: ServerSettings, connections: Connections) -> uvicorn.Config:
    """Build uvicorn's configuration: our limits, no log lines of its own, HTTP/1.1 only."""
    return uvicorn.Config(
        app,
        http=bounded_protocol(
            connections,
            head_seconds=settings.body_seconds,
            send_seconds=settings.send_seconds,
            retry_after=settings.retry_after_seconds,
        ),
        ws="none",
        backlog=_AT_A_TIME,
        timeout_keep_alive=settings.idle_seconds,
        workers=1,  # otherwise WEB_CONCURRENCY of the environment is read
        proxy_headers=False,  # the client's address is not used
        log_level="warning",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(settings.shutdown_seconds + _LAST),
        server_header=False,
    )


def no_core_dumps() -> None:
    """Prevent core dumps: they would leave prompts and keys in a file after a crash."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # A program that collects dumps (apport) gets one despite the limit; this makes it a dump without memory.
    with contextlib.suppress(OSError):
        Path("/proc/self/coredump_filter").write_text("0")


def open_meter(url: str, settings: ServerSettings) -> Meter:
    """Open the ledger and the meter on it. Releases the holds of processes that have ended, not of other servers."""
    ledger = Ledger(url, time.time, name_of_this_process())  # noqa: TID251  the ledger records the wall clock
    prices = {
        model: Prices(price.prompt, price.cached_prompt, price.completion) for model, price in settings.prices.items()
    }
    return Meter(ledger, prices, time.time, BEAT_SECONDS)  # noqa: TID251
