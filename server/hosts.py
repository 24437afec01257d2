"""Parses and compares names of hosts, as a Host header, an Origin and a setting spell them. Asks no resolver."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

__all__ = [
    "HOST",
    "LOOPBACK",
    "PORT",
    "Authority",
    "covers",
    "is_loopback",
    "parse_authority",
    "parse_entry",
    "same_authority",
]

HOST: Final = "127.0.0.1"
"""Where the server listens by default."""
PORT: Final = 8000
LOOPBACK: Final = (HOST, "::1", "localhost")
"""Addresses that only this machine reaches."""

# No userinfo, no spaces, no percent signs: what no address bar puts into a Host header is not guessed at.
_AUTHORITY: Final = re.compile(r"(?:\[([0-9a-fA-F:.]+)(?:%[\w.~-]+)?\]|([A-Za-z0-9._-]+))(?::(\d{0,5}))?", re.ASCII)
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}


@dataclass(frozen=True, slots=True)
class Authority:
    """A host and a port.

    Attributes:
        name: in lower case, without a final dot; an address as `ipaddress` writes it, without brackets and zone.
        port: digits, or "" where none was given.
    """

    name: str
    port: str = ""


def parse_authority(text: str) -> Authority | None:
    """Parse `host[:port]` of a Host header; None if it has another form."""
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return None
    address, name, port = found.groups()
    if address is None:
        name = name.lower().removesuffix(".")
        return Authority(_plain(name), port or "") if name else None
    try:
        return Authority(_plain(str(ipaddress.IPv6Address(address))), port or "")
    except ValueError:
        return None


def _plain(name: str) -> str:
    """Write an address in its plain form: an IPv6 address that wraps an IPv4 one becomes that one."""
    address = _address(name)
    wrapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(wrapped or address or name)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def same_authority(origin: str, host: Authority) -> bool:
    """Return whether a page of this origin was served under this host.

    The scheme decides about the default port and about nothing else: behind a proxy that ends TLS, a page of `https`
    asks a server that speaks `http`.
    """
    scheme, _, rest = origin.partition("://")
    authority = parse_authority(rest)
    if authority is None:  # `null`, for one
        return False
    default = _DEFAULT_PORTS.get(scheme.lower(), "")
    return (authority.name, authority.port or default) == (host.name, host.port or default)


def is_loopback(name: str) -> bool:
    """Return whether a name always means this machine, whatever a resolver says."""
    address = _address(name)
    return name == "localhost" or name.endswith(".localhost") if address is None else address.is_loopback


def parse_entry(text: str) -> str:
    """Parse an entry of `hosts`: a host without scheme and port, `*.domain` for all names below it, or `*` for any.

    Raises:
        ValueError: it is none of these.
    """
    if text.strip() == "*":
        return "*"
    domain = text.strip().removeprefix("*.")
    bare = f"[{domain}]" if ":" in domain and not domain.startswith("[") else domain
    try:
        ascii_name = bare if bare.isascii() else bare.encode("idna").decode()
    except UnicodeError:
        ascii_name = ""
    parsed = parse_authority(ascii_name)
    if parsed is None or (":" in ascii_name and not ascii_name.endswith("]")):
        raise ValueError(f"{text[:100]!r} is no name of a host: write it without http:// and port, as box.lan or *.lan")
    return f"*.{parsed.name}" if text.strip().startswith("*.") else parsed.name


def covers(entries: Collection[str], name: str) -> bool:
    """Return whether a name matches one of the entries, each as `parse_entry` returns it."""
    return any(
        entry in ("*", name) or (entry.startswith("*.") and name.endswith(entry[1:]) and _address(name) is None)
        for entry in entries
    )
