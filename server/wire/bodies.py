"""Reads and parses request bodies, bounded in size, in time, and in the memory of all of them together.

Memory for a body is reserved before it is read and returned once the request is prepared; a body for which too
little is left is refused. What is sent as gzip is decoded in small parts under the same limits. All but small bodies
are parsed on one separate thread, so as not to block the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from fastapi import Request

from server.errors import BodiesFull, BodyTooLarge, BodyTooSlow, ClientGone
from server.settings import ServerSettings
from server.wire.content_encoding import decoder_of

__all__ = ["Bodies", "BodyMemory"]

T = TypeVar("T")
Parse = Callable[[bytes, str], T]
"""A body and the request's id → the parsed request."""

SMALL: Final = 64 * 2**10
"""A body up to this many bytes may use the last eighth of the memory, so that large ones never keep small ones out."""
INLINE: Final = 32 * 2**10
"""A body up to this many bytes is parsed on the event loop: 2 ms at worst, less than switching threads may take."""


class BodyMemory:
    """Counts the memory that bodies take, in bytes.

    Args:
        size: the limit for all bodies together. A group with a name may take half of it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken: Counter[str] = Counter()

    def take(self, amount: int, group: str, *, small: bool) -> None:
        """Reserve bytes for a group. The caller must give them back.

        Raises:
            BodiesFull: too little is left for this group, or for a body that is not small.
        """
        limit = self.size if small else self.size - self.size // 8
        if self.taken.total() + amount > limit:
            raise BodiesFull(f"Bodies that are being read take {limit} bytes, all there is for them; try again later.")
        if group and self.taken[group] + amount > self.size // 2:
            raise BodiesFull(
                f"Bodies of this key that are being read take {self.size // 2} bytes, all there is for one key; try "
                "again later."
            )
        self.taken[group] += amount

    def give(self, amount: int, group: str) -> None:
        """Return bytes that were reserved for a group."""
        self.taken[group] -= amount
        if not self.taken[group]:
            del self.taken[group]


class _Reservation:
    """The memory reserved for one body: it grows, and is given back as a whole."""

    def __init__(self, memory: BodyMemory, group: str) -> None:
        self._memory = memory
        self._group = group
        self._size = 0

    def grow(self, size: int) -> None:
        if size > self._size:
            self._memory.take(size - self._size, self._group, small=size <= SMALL)
            self._size = size

    def close(self) -> None:
        self._memory.give(self._size, self._group)


class Bodies:
    """Reads and parses the bodies of an application's requests. Owns the thread on which large ones are parsed."""

    def __init__(self, settings: ServerSettings) -> None:
        self._limit = settings.max_body_bytes
        self._seconds = settings.body_seconds
        self.memory = BodyMemory(settings.max_bodies_bytes or 8 * settings.max_body_bytes)
        self._parser = ThreadPoolExecutor(1, "bodies")

    def close(self) -> None:
        self._parser.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def of(self, request: Request, group: str, parse: Parse[T]) -> AsyncIterator[Callable[[str], Awaitable[T]]]:
        """Yield a function that reads and parses the body under a request's id. Holds its memory until the block ends.

        Raises:
            UnsupportedEncoding: its `Content-Encoding` is not gzip.
            BodyTooLarge: it exceeds the limit, by its `Content-Length`, while it is read, or while it is decoded.
            BodyTooSlow: it did not arrive in time.
            BodiesFull: there is no memory for it at the moment.
            ClientGone: the client disconnected before the body was complete.
            InvalidFormat, InvalidParameter: as `parse`.
        """
        with contextlib.closing(_Reservation(self.memory, group)) as reservation:

            async def checked(request_id: str) -> T:
                try:
                    async with asyncio.timeout(self._seconds):
                        raw = await self._read(request, reservation)
                except TimeoutError:
                    raise BodyTooSlow(f"The body did not arrive within {self._seconds:g} seconds.") from None
                if len(raw) <= INLINE:
                    return parse(raw, request_id)
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._parser, parse, raw, request_id)

            yield checked

    async def _read(self, request: Request, reservation: _Reservation) -> bytes:
        """Read a body and decode it. The limit is for what is sent and for what it stands for; kept is the latter."""
        decoder = decoder_of(request.headers.getlist("content-encoding"))
        announced = request.headers.get("content-length", "")
        if announced.isascii() and announced.isdigit():
            if int(announced[:20]) > self._limit:
                raise _too_large(f"{announced[:20]} bytes", self._limit)
            reservation.grow(int(announced[:20]))
        data, sent = io.BytesIO(), 0
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            piece = message.get("body", b"")
            sent += len(piece)
            for number, part in enumerate(decoder.feed(piece)):
                if number:  # few bytes may stand for many: others run between the parts
                    await asyncio.sleep(0)
                if max(sent, data.tell() + len(part)) > self._limit:
                    raise _too_large(f"more than {self._limit} bytes", self._limit)
                reservation.grow(data.tell() + len(part))
                data.write(part)
            if not message.get("more_body", False):
                decoder.end()
                return data.getvalue()


def _too_large(size: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body has {size}; this server takes {limit}.", limit=limit)
