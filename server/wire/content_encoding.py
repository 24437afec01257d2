"""Decodes bodies by their `Content-Encoding`: gzip (RFC 1952), or none. Knows no limit of a body and no request."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from engine import InvalidFormat
from server.errors import UnsupportedEncoding

__all__ = ["MAX_MEMBERS", "STEP", "Decoder", "decoder_of"]

STEP: Final = 64 * 2**10
"""Bytes that are decoded at a time: a tenth of a millisecond. A few bytes of gzip may stand for a thousand times as
many."""
MAX_MEMBERS: Final = 1024
"""Members of a gzip body. Each costs a fresh decoder, and an empty one has only 20 bytes. `bgzip` writes one for each
64 KiB of text, other programs write one for all."""
_GZIP: Final = frozenset({"gzip", "x-gzip"})
_WINDOW: Final = 16 + zlib.MAX_WBITS
"""zlib's code for a gzip header and its checksum around the data."""


class Decoder(Protocol):
    """Decodes one body."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what these further bytes of the body stand for. An encoded body's parts have at most `STEP` bytes each;
        whoever has enough of them may stop.

        Raises:
            InvalidFormat: they are not in the encoding.
        """
        ...

    def end(self) -> None:
        """Check that the body is whole.

        Raises:
            InvalidFormat: it is cut short.
        """
        ...


class _Plain:
    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def end(self) -> None:
        pass


class _Gzip:
    """Decodes one or more gzip members, one after the other. Their checksums and lengths are checked."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(_WINDOW)
        self._members = 1

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._member.eof:
                self._members += 1
                if self._members > MAX_MEMBERS:
                    raise _broken(f"it has more than {MAX_MEMBERS} members")
                self._member = zlib.decompressobj(_WINDOW)
            try:
                part = self._member.decompress(data, STEP)
            except zlib.error:
                what = "its data is damaged" if self._members == 1 else "bytes that are not gzip follow it"
                raise _broken(what) from None
            data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            yield part

    def end(self) -> None:
        if not self._member.eof:
            raise _broken("it ends too early")


def decoder_of(fields: Sequence[str]) -> Decoder:
    """Return a decoder for a body with these `Content-Encoding` fields. `identity` and an empty field mean none.

    Raises:
        UnsupportedEncoding: it is neither gzip nor none, or several one upon another.
    """
    names = [name.strip().lower() for field in fields for name in field.split(",")]
    given = [name for name in names if name not in ("", "identity")]
    if not given:
        return _Plain()
    if len(given) == 1 and given[0] in _GZIP:
        return _Gzip()
    raise UnsupportedEncoding(
        f"the body's Content-Encoding is {', '.join(given)[:200]}: send it as gzip, or without an encoding."
    )


def _broken(what: str) -> InvalidFormat:
    return InvalidFormat(
        f"the body is not gzip, which its Content-Encoding says it is: {what}.", code="invalid_content_encoding"
    )
