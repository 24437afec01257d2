"""`Reloading`: apply a changed models.yaml to a running server. What has not changed is not touched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from engine import ConfigError, ModelConfig, Registry
from server.settings import ServerSettings

__all__ = ["Reloading", "Reread"]

log = logging.getLogger("verbatim.server")

Reread = Callable[[], tuple[Sequence[ModelConfig], ServerSettings]]
"""Reads the configuration again. Raises: `ConfigError`."""

LIVE: Final = frozenset({"max_loaded"})
"""Settings that change in a running server; the others need a restart."""


class Reloading:
    """Knows the settings that the server has started with.

    Args:
        reread: None where there is no configuration file.
    """

    def __init__(self, registry: Registry, settings: ServerSettings, reread: Reread | None) -> None:
        self._registry, self._settings, self._reread = registry, settings, reread

    def __call__(self) -> None:
        """Read the configuration, and change what differs. A file with an error changes nothing; the log says why."""
        if self._reread is None:
            log.warning("SIGHUP: nothing is read again: the server was started without a configuration file")
            return
        try:
            entries, settings = self._reread()
        except ConfigError as error:
            log.error("SIGHUP: nothing has changed: %s", error.message)
            return
        changes = self._registry.apply(entries, settings.max_loaded)
        log.warning("SIGHUP: the configuration was read again: %s", changes)
        if settings.max_loaded != self._settings.max_loaded:
            log.warning("SIGHUP: max_loaded is %s", settings.max_loaded)
        differing = [
            name
            for name in ServerSettings.model_fields
            if name not in LIVE and getattr(settings, name) != getattr(self._settings, name)
        ]
        if differing:
            log.warning("SIGHUP: these settings have changed and need a restart: %s", ", ".join(differing))
        self._settings = self._settings.model_copy(update={"max_loaded": settings.max_loaded})
