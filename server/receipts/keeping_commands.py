"""The commands `verbatim receipts`: list and show what a server keeps, make a key, sign a receipt.

`list` and `show` read the configured place, also while a server runs, and see the receipts of every key.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich import box
from rich.table import Table

from engine import (
    MOST_RECEIPT_BYTES,
    ReceiptError,
    document_of,
    generate_key,
    load_private_key,
    read_receipt,
    sign_receipt,
)
from server.configuration import ConfigOption, read_configuration
from server.receipts.files import regular_file
from server.terminal import Terminal, one_line

if TYPE_CHECKING:
    from server.receipts.keeping import Keeper, Kept

__all__ = ["receipts"]

receipts = typer.Typer(help="List and show kept receipts, make keys, sign receipts.", no_args_is_help=True)
out = Terminal()

_PAGE: Final = 100

_OwnerOption = Annotated[
    str | None, typer.Option("--key", help="Only those of the key with this id; `anonymous` for requests without one.")
]


@receipts.command("list")
def list_receipts(
    config: ConfigOption = None,
    owner: _OwnerOption = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = _PAGE,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for each receipt.")] = False,
) -> None:
    """List the receipts that are kept, newest first."""
    with closing(_keeper(config)) as keeper:
        found = keeper.list(owner, None, limit)
    if as_json:
        for one in found:
            print(json.dumps({"id": one.id, "key": one.owner, "created": one.created, "model": one.model}))
        return
    out.print(_table(found))


@receipts.command("show")
def show(
    id: Annotated[str, typer.Argument(help="The receipt's id, which is its reply's.")],
    config: ConfigOption = None,
    as_kept: Annotated[
        bool, typer.Option("--as-kept", help="Print the bytes that are kept, with the signature if there is one.")
    ] = False,
) -> None:
    """Print a kept receipt."""
    with closing(_keeper(config)) as keeper:
        found = keeper.get(None, id)
    from server.receipts.folder import receipt_in

    if found is None:
        raise ReceiptError(f"no receipt with the id {id[:200]!r} is kept here.")
    if as_kept:
        sys.stdout.write(found.decode() + "\n")
        return
    print(json.dumps(receipt_in(json.loads(found)), indent=2))


@receipts.command("keygen")
def keygen(
    path: Annotated[Path, typer.Argument(help="The private key's file; the public one gets .pub added.")],
) -> None:
    """Make a key to sign receipts with. A file that exists is never overwritten."""
    key = generate_key(path)
    out.print(
        f"{one_line(str(path))}: keep it secret. To check with: {one_line(str(path))}.pub, key {key.keyid}",
        highlight=False,
        soft_wrap=True,
    )


@receipts.command("sign")
def sign(
    file: Annotated[Path, typer.Argument(help="A file with a receipt, or with a reply that has one.")],
    key: Annotated[Path, typer.Option(help="A private Ed25519 key (PEM).")],
) -> None:
    """Print the signed envelope of a receipt: that this key's owner vouches for it."""
    signer = load_private_key(key)
    data = regular_file(file, MOST_RECEIPT_BYTES + 1)
    if "payload" in document_of(data):
        raise ReceiptError(f"{file} holds a receipt that is signed already.")
    envelope: dict[str, Any] = sign_receipt(read_receipt(data), signer)
    print(json.dumps(envelope))


def _keeper(config: Path | None) -> Keeper:
    from server.receipts.location import open_keeper  # it takes the database's library

    _, settings = read_configuration(config, None, None)
    return open_keeper(settings, config)


def _table(found: list[Kept]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("id", "key", "created (UTC)", "model"):
        table.add_column(name, overflow="fold")
    for one in found:
        when = dt.datetime.fromtimestamp(one.created, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(one_line(one.id), one_line(one.owner), when, one_line(one.model))
    return table
