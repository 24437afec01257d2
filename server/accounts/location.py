"""Where the ledger is, and whether it is in use: what `verbatim serve` and the commands for keys ask first."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine import ConfigError
from server.hosts import LOOPBACK

if TYPE_CHECKING:
    from server.settings import ServerSettings

__all__ = ["existing", "in_use", "location", "refuse_strangers"]

DEFAULT_FILE: Final = "verbatim.db"


def location(settings: ServerSettings, config: Path | None) -> str:
    """Return the ledger's URL: as configured, or of a file beside the configuration."""
    given = settings.ledger or DEFAULT_FILE
    if "://" in given:
        return given
    folder = config.parent if config is not None else Path()
    return f"sqlite:///{(folder / Path(given).expanduser()).resolve()}"


def existing(settings: ServerSettings, config: Path | None) -> str | None:
    """Return the ledger's URL if it was configured or its file exists, else None."""
    url = location(settings, config)
    file = Path(url.removeprefix("sqlite:///"))
    return url if settings.ledger is not None or file.exists() else None


def in_use(settings: ServerSettings, config: Path | None) -> str | None:
    """Return the ledger's URL if it has ever had a key, else None. If it has, every request needs a key.

    Raises:
        ConfigError: others can reach the server, there are no keys, and `allow_anonymous` is not set.
        LedgerFault: it cannot be read.
    """
    url = existing(settings, config)
    if url is not None:
        from server.ledger.store import Ledger

        with closing(Ledger(url, time.time)) as ledger:  # noqa: TID251
            if ledger.all_keys():
                return url
    refuse_strangers(settings)
    return None


def refuse_strangers(settings: ServerSettings) -> None:
    """Refuse to serve without keys where others can reach the server, unless `allow_anonymous` is set.

    Raises:
        ConfigError: they can.
    """
    if settings.host not in LOOPBACK and not settings.allow_anonymous:
        raise ConfigError(
            f"host {settings.host} lets others in, and there are no keys. Make one with `verbatim keys create NAME`, "
            "or serve everybody with --allow-anonymous."
        )
