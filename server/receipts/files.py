"""Read files with receipts, at most as much of each as a receipt may have. What cannot be read is told, one by one."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import (
    MOST_RECEIPT_BYTES,
    Receipt,
    ReceiptError,
    documents_of,
    read_document,
    reply_difference,
    verify_envelope,
)

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

__all__ = ["Entry", "read_entries", "regular_file"]


def regular_file(path: Path, most: int) -> bytes:
    """Read at most `most` bytes of a regular file; no pipe is waited for.

    Raises:
        ReceiptError: it is none, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ReceiptError(f"{path} is no regular file.")
            return file.read(most)
    except OSError as error:
        raise ReceiptError(f"{path} cannot be read: {error.strerror or error}.") from None


@dataclass(frozen=True, slots=True)
class Entry:
    """One receipt of a file, or why there is none.

    Attributes:
        where: the file, the line if it has several, and the number of the prompt if a reply has several.
        document: the receipt or the envelope as it was written.
        signed_by: the id of the key that has signed it; None if no signature was checked.
        unchecked: whether it is signed, but no key was given.
        in_reply: whether there is a reply around it, whose text is not checked.
    """

    where: str
    receipt: Receipt | None
    document: dict[str, Any] | None = None
    error: str = ""
    signed_by: str | None = None
    unchecked: bool = False
    in_reply: bool = False


def read_entries(path: Path, keys: Sequence[SSlibKey] = ()) -> Iterator[Entry]:
    """Read the receipts of a file: one, or one in each line if its name ends in `.jsonl`.

    In place of a receipt there may be a reply of the API, or a line of a batch's output, with one or several.

    Args:
        keys: if there are any, one of them must have signed each receipt.
    """
    try:
        with path.open("rb") as file:
            if path.suffix != ".jsonl":
                yield from _entries(str(path), file.read(MOST_RECEIPT_BYTES + 1), keys)
                return
            number = 0
            while line := file.readline(MOST_RECEIPT_BYTES + 1):
                number += 1
                if line.strip():
                    yield from _entries(f"{path}:{number}", line, keys)
                if len(line) > MOST_RECEIPT_BYTES:
                    return  # where this line ends would have to be searched for
    except OSError as error:
        yield Entry(str(path), None, error=f"cannot be read: {error.strerror or error}.")


def _entries(where: str, data: bytes, keys: Sequence[SSlibKey]) -> Iterator[Entry]:
    """Read the receipts in one text."""
    try:
        documents, reply = documents_of(data)
    except ReceiptError as error:
        yield Entry(where, None, error=error.message)
        return
    for number, document in enumerate(documents):
        entry = _entry(where if len(documents) == 1 else f"{where}, prompt {number}", document, keys)
        if reply is not None and entry.receipt is not None:
            entry = _in_reply(entry, entry.receipt, reply, number, len(documents))
        yield entry


def _in_reply(entry: Entry, receipt: Receipt, reply: dict[str, Any], number: int, prompts: int) -> Entry:
    """Return the entry of a receipt that came inside a reply, or why it is not that reply's."""
    if difference := reply_difference(reply, receipt, number, prompts):
        return Entry(entry.where, None, error=f"the receipt is not that of the reply around it: {difference}.")
    return dataclasses.replace(entry, in_reply=True)


def _entry(where: str, document: dict[str, Any], keys: Sequence[SSlibKey]) -> Entry:
    try:
        if "payload" not in document:
            if keys:
                raise ReceiptError("the receipt is not signed.")
            return Entry(where, read_document(document), document)
        if not keys:
            return Entry(where, read_document(document), document, unchecked=True)
        receipt, signed_by = verify_envelope(document, keys)
        return Entry(where, receipt, document, signed_by=signed_by)
    except ReceiptError as error:
        return Entry(where, None, error=error.message)
