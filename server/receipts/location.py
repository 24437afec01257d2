"""Opens what the settings of receipts name: the key that signs, and the place where receipts are kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine import ConfigError, load_private_key
from server.accounts.location import location
from server.ledger.store import Ledger
from server.receipts.folder import FolderKeeper
from server.receipts.keeping import Keeper, LedgerKeeper
from server.receipts.service import Receipts
from server.settings import ServerSettings

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

__all__ = ["open_keeper", "open_receipts", "open_signer"]

IN_LEDGER: Final = "ledger"


def open_receipts(settings: ServerSettings, config: Path | None) -> Receipts:
    """Open what the settings name; relative paths begin at the folder of the configuration.

    Raises:
        ConfigError: the folder cannot be written.
        ReceiptError: the key cannot be read, or is no private Ed25519 key.
        LedgerFault: the ledger cannot be opened.
    """
    given, signer = settings.receipts, open_signer(settings, config)
    keeper = None if given.keep is None else open_keeper(settings, config)
    return Receipts(given, clock=time.time, keeper=keeper, signer=signer)  # noqa: TID251  the wall clock's days


def open_signer(settings: ServerSettings, config: Path | None) -> CryptoSigner | None:
    """Load the key that signs receipts; None if none is named.

    Raises:
        ReceiptError: it cannot be read, or is no private Ed25519 key.
    """
    sign = settings.receipts.sign
    return None if sign is None else load_private_key(_beside(config, str(sign)))


def open_keeper(settings: ServerSettings, config: Path | None) -> Keeper:
    """Open the place where receipts are kept.

    Raises:
        ConfigError: none is configured, or the folder cannot be written.
        LedgerFault: the ledger cannot be opened.
    """
    keep = settings.receipts.keep
    if keep is None:
        raise ConfigError("no receipts are kept: set `receipts: {keep: FOLDER}` under `server:` in models.yaml.")
    if keep == IN_LEDGER:
        return LedgerKeeper(Ledger(location(settings, config), time.time))  # noqa: TID251
    return FolderKeeper(_beside(config, keep))


def _beside(config: Path | None, given: str) -> Path:
    """Return a path that a configuration names; a relative one begins at its folder."""
    folder = config.parent if config is not None else Path()
    return (folder / Path(given).expanduser()).resolve()
