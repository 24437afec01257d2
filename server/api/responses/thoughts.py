"""Thoughts as a client sends them back: the text of a reasoning item in the field that clients keep as it is.

Nothing is encrypted, and nothing needs to be: `content` beside it holds the same text. Clients whose conversations are
kept nowhere but with them send back `encrypted_content`, and some of them nothing else of a reasoning item.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final

__all__ = ["packed_thoughts", "unpacked_thoughts"]

_MARK: Final = "verbatim-text:"
"""What such a text begins with, so that another server's is told apart."""


def packed_thoughts(text: str) -> str:
    """Return the thoughts as one opaque word."""
    return _MARK + base64.urlsafe_b64encode(text.encode()).decode()


def unpacked_thoughts(word: str) -> str | None:
    """Return the thoughts in such a word; None if this server did not write it."""
    if not word.startswith(_MARK):
        return None
    try:
        return base64.b64decode(word.removeprefix(_MARK), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None
