"""What the server itself can be told: the `server:` mapping of models.yaml. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from engine import ConfigError, validate


class ServerSettings(BaseModel):
    """Limits and addresses; every key has a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    """Where to listen. Anything but loopback lets others in: there are no keys yet."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one; the first line of output says which."""
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)
    """A larger request body is refused while it is read."""
    strict_params: bool = False
    """Refuse fields that are not known at all, instead of naming them in a response header."""
    keepalive_seconds: float = Field(default=15.0, gt=0)
    """How long a stream may be silent before a comment line is sent."""
    retry_after_seconds: int = Field(default=5, ge=1)
    """What `Retry-After` says when the server is overloaded or loading."""
    shutdown_seconds: int = Field(default=10, ge=0)
    """How long running requests may go on after the server was told to stop."""


def read_settings(data: Mapping[str, Any], where: str) -> ServerSettings:
    """Check the top level of a models.yaml and build its `server:` part.

    Raises:
        ConfigError: an unknown key, with the nearest known one.
    """
    unknown = sorted(set(data) - {"models", "server"})
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys: models, server.")
    given = data.get("server") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: server must be a mapping of keys to values, not {given!r}.")
    return validate(ServerSettings, given, f"{where}: server")
