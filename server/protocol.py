"""uvicorn's HTTP protocol, with an end to its patience: for a head that does not come, a client that reads nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["patient_protocol"]


class _PatientProtocol(HttpToolsProtocol):
    """Gives a connection up, with all that waits to be sent on it. What runs for it sees a disconnect."""

    head_seconds: float
    send_seconds: float

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._give_up_in(self.head_seconds, "head")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if "head" not in self._timers:
            self._give_up_in(self.head_seconds, "head")

    def on_headers_complete(self) -> None:
        self._go_on("head")
        if self.url[:1] != b"/":  # `GET http://host/path`: uvicorn keeps the path alone, and whom it names matters
            authority = self.url.partition(b"://")[2].partition(b"/")[0].partition(b"?")[0]
            self.scope["state"]["target_authority"] = authority.decode("latin-1") if b"://" in self.url else None
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._give_up_in(self.send_seconds, "unread")

    def resume_writing(self) -> None:
        self._go_on("unread")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        for what in list(self._timers):
            self._go_on(what)
        super().connection_lost(exc)

    def _give_up_in(self, seconds: float, what: str) -> None:
        self._timers[what] = self.loop.call_later(seconds, self.transport.abort)

    def _go_on(self, what: str) -> None:
        timer = self._timers.pop(what, None)
        if timer is not None:
            timer.cancel()


def patient_protocol(head_seconds: float, send_seconds: float) -> type[HttpToolsProtocol]:
    """The protocol with these limits, as uvicorn takes it."""
    return type("PatientProtocol", (_PatientProtocol,), {"head_seconds": head_seconds, "send_seconds": send_seconds})
