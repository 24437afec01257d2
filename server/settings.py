"""The settings of the server: the `server:` mapping of models.yaml. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from engine import ConfigError, validate
from server.hosts import HOST, PORT, parse_entry

DEAREST: Final = 10**9
"""The highest price of a token, in micro-credits. A request of 2³³ tokens at this price still fits into 64 bits."""


class Price(BaseModel):
    """The price of a token of each kind, in micro-credits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: int = Field(default=1, ge=0, le=DEAREST)
    """A token of the prompt."""
    cached_prompt: int = Field(default=1, ge=0, le=DEAREST)
    """A token of the prompt that was in the prefix cache."""
    completion: int = Field(default=1, ge=0, le=DEAREST)
    """A generated token."""


class ReceiptSettings(BaseModel):
    """Which replies get a receipt, what it holds, who signs it, and where it is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: str | None = None
    """Where receipts are kept: a folder, in which each key has a folder of its own, or `ledger`: in the ledger's
    database. Default: nowhere; a receipt is sent with its reply and forgotten."""
    days: int | None = Field(default=None, ge=1, le=36_500)
    """A kept receipt is deleted after this many days. Default: never."""
    sign: Path | None = None
    """A private Ed25519 key (PEM, made by `verbatim receipts keygen`): `receipt` is then a signed envelope."""
    always: bool = False
    """Keep a receipt of every reply, also of those that are not asked for one. Needs `keep`."""
    text: bool = True
    """False: receipts hold digests in place of prompts and replies. A request that asks for more gets the digests, and
    the header `x-receipt-form: digest`."""

    @model_validator(mode="after")
    def _kept_somewhere(self) -> ReceiptSettings:
        if self.keep is not None and not self.keep.strip():
            raise ValueError("keep must be a folder or ledger, not an empty text")
        for name, given in (("always", self.always), ("days", self.days is not None)):
            if given and self.keep is None:
                raise ValueError(f"{name} needs keep: without it, receipts are kept nowhere")
        return self


class ServerSettings(BaseModel):
    """Addresses, limits and switches of the server; every key has a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = HOST
    """The address to listen on. Any but loopback can be reached by others, and is refused without keys."""
    port: int = Field(default=PORT, ge=0, le=65535)
    """0 takes a free port; the first line of output names it."""
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)
    """A larger request body is refused while it is read."""
    max_bodies_bytes: int | None = Field(default=None, ge=4096)
    """Memory for all bodies that are being read or parsed; a request beyond it is refused with `Retry-After`. A key
    may use half of it. At least twice `max_body_bytes`; default: eight times."""
    max_connections: int = Field(default=1024, ge=8)
    """Connections that may be open at once; fewer where the system allows the process fewer files. For one more, the
    connection that has waited longest for its client is closed."""
    max_loaded: int | None = Field(default=None, ge=1)
    """Models that may be loaded at once: for one more, the least recently used leaves. Default: as many as memory
    holds."""
    strict_params: bool = False
    """Refuse unknown fields of a request instead of naming them in a response header."""
    keepalive_seconds: float = Field(default=15.0, gt=0)
    """Seconds of silence after which a stream sends a comment line."""
    retry_after_seconds: int = Field(default=5, ge=1)
    """The value of `Retry-After` while the server is overloaded or loading."""
    shutdown_seconds: int = Field(default=10, ge=0)
    """Seconds that running requests may take after the server was told to stop; then they end with an error."""
    body_seconds: float = Field(default=60.0, gt=0)
    """Seconds that a client may take to send the head of a request, and again for its body."""
    idle_seconds: int = Field(default=120, ge=1)
    """Seconds that a connection is kept without a request. Agents pause between requests; a connection that is closed
    just when the next one is sent is an error for many clients."""
    send_seconds: float = Field(default=60.0, gt=0)
    """Seconds in which a client must read at least a tenth of what waits for it; otherwise its request ends."""
    ledger: str | None = None
    """Where keys, balances and usage are stored: a file, or a database's URL (`postgresql+psycopg://…`). Default:
    `verbatim.db` beside this file, once `verbatim keys create` has made it. With keys, every request needs one."""
    allow_anonymous: bool = False
    """Serve without keys on an address that others can reach."""
    prices: dict[str, Price] = Field(default_factory=dict)
    """By model: the price of a token of each kind, in micro-credits. The default is one, so that balances count
    tokens; of an adapter (`ID:NAME`) it is its model's price."""
    hosts: list[str] = Field(default_factory=list)
    """Names by which clients reach this server, beside this machine's own: `box.lan`, `host.docker.internal`, `*.lan`;
    `*` allows any. A request for another name is refused. Default: any name if keys are in use or others can reach
    the address, else none."""
    cors_origins: list[str] = Field(default_factory=list)
    """Origins whose pages may use the server from a browser; `*` allows all. Default: only pages that come from the
    server's own address."""
    receipts: ReceiptSettings = Field(default_factory=ReceiptSettings)
    """Receipts of replies: `{keep, days, sign, always, text}`."""
    ui: bool = True
    """Serve the page for browsers at `/`. It holds no data; with keys it asks for one."""
    metrics: Literal["admin", "open", "off"] = "admin"
    """Who may read `/metrics`: `admin`: whoever sends an admin key or, without keys, this machine; `open`: everybody
    who reaches the server, without a key; `off`: nobody, there is no such path."""
    access_log: bool = False
    """Log one line per request: time, path, key, status; of a reply its model, seed, fingerprint and tokens, never its
    text."""
    log_format: Literal["text", "json"] = "text"
    """`json`: each line of the log is a JSON object."""

    @field_validator("metrics", mode="before")
    @classmethod
    def _off(cls, given: Any) -> Any:
        return "off" if given is False else given  # how YAML reads the word

    @field_validator("hosts")
    @classmethod
    def _names(cls, given: list[str]) -> list[str]:
        return [parse_entry(name) for name in given]

    @model_validator(mode="after")
    def _a_body_fits(self) -> ServerSettings:
        if self.max_bodies_bytes is not None and self.max_bodies_bytes < 2 * self.max_body_bytes:
            raise ValueError(
                f"max_bodies_bytes must be at least twice max_body_bytes, {2 * self.max_body_bytes}, not "
                f"{self.max_bodies_bytes}"
            )
        return self


def read_settings(data: Mapping[str, Any], where: str) -> ServerSettings:
    """Check the top level of a models.yaml and return the settings of its `server:` mapping.

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
