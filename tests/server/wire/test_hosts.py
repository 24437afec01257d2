"""Names of hosts: what they mean, however they are spelled, and which are refused unread."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, strategies as st

from server.hosts import Authority, covers, is_loopback, parse_authority, parse_entry, same_authority


@pytest.mark.parametrize(
    ("text", "name", "port"),
    [
        ("localhost", "localhost", ""),
        ("LocalHost:8000", "localhost", "8000"),
        ("localhost.:8000", "localhost", "8000"),
        ("localhost:", "localhost", ""),
        ("127.0.0.1:1", "127.0.0.1", "1"),
        ("my_service", "my_service", ""),
        ("[::1]", "::1", ""),
        ("[0:0:0:0:0:0:0:1]:8000", "::1", "8000"),
        ("[FE80::1%eth0]:8000", "fe80::1", "8000"),
        ("[::ffff:127.0.0.1]", "127.0.0.1", ""),
    ],
)
def test_what_a_host_header_says(text: str, name: str, port: str) -> None:
    assert parse_authority(text) == Authority(name, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        ":8000",
        "user@localhost",
        "user:pw@localhost",
        "localhost@evil.example",
        "a b",
        "a,b",
        "a/b",
        "a?b",
        "a#b",
        "a\\b",
        "localhost:80:80",
        "localhost:x",
        "localhost:-1",
        "localhost:123456",
        "localhost:٣",
        "localh\xf6st",
        "%6cocalhost",
        "::1",
        "[::1",
        "[::1]x",
        "[localhost]",
        "[1]",
        "localhost\r\n",
        "localhost\x00",
        "http://localhost",
        "[::1%]",
    ],
)
def test_what_no_host_header_may_say(text: str) -> None:
    assert parse_authority(text) is None


@pytest.mark.parametrize(
    ("name", "loopback"),
    [
        ("localhost", True),
        ("app.localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("localhost.evil.example", False),
        ("evillocalhost", False),
        ("127.0.0.1.evil.example", False),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("::", False),
        ("box.local", False),
        ("127.0.0.1x", False),
        ("127.1", False),
    ],
)
def test_names_that_mean_this_machine_alone(name: str, loopback: bool) -> None:
    assert is_loopback(name) is loopback


@given(st.ip_addresses())
def test_an_address_is_loopback_as_the_standard_says(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    text = f"[{address}]" if address.version == 6 else str(address)
    parsed = parse_authority(text + ":8000")
    assert parsed is not None
    mapped = getattr(address, "ipv4_mapped", None) or address
    assert is_loopback(parsed.name) == mapped.is_loopback


@given(st.text())
def test_whatever_is_parsed_is_parsed_the_same_again(text: str) -> None:
    parsed = parse_authority(text)
    if parsed:
        again = f"[{parsed.name}]" if ":" in parsed.name else parsed.name
        assert parse_authority(again) == Authority(parsed.name)
        assert "@" not in parsed.name
        assert parsed.name == parsed.name.lower()


@pytest.mark.parametrize(
    ("entry", "covered", "others"),
    [
        ("Box.LAN", ["box.lan"], ["x.box.lan", "box.lan.evil.example"]),
        ("*.lan", ["box.lan", "a.b.lan"], ["lan", "evillan", "box.lan.evil.example"]),
        ("*.1", [], ["10.0.0.1"]),
        ("10.0.0.1", ["10.0.0.1"], ["10.0.0.2"]),
        ("fd00::0:1", ["fd00::1"], ["fd00::2"]),
        ("[fd00::1]", ["fd00::1"], []),
        ("bücher.example", ["xn--bcher-kva.example"], ["bucher.example"]),
        ("*", ["anything.example", "10.0.0.1"], []),
    ],
)
def test_a_setting_covers_what_it_says(entry: str, covered: list[str], others: list[str]) -> None:
    entries = [parse_entry(entry)]
    assert [name for name in covered if not covers(entries, name)] == []
    assert [name for name in others if covers(entries, name)] == []


@pytest.mark.parametrize(
    "entry", ["", " ", "*.", "**", "*.*", "box.lan:8000", "[::1]:8000", "http://box.lan", "a b", "*box", "ä" * 80]
)
def test_a_setting_that_is_no_name_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="no name of a host"):
        parse_entry(entry)


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        ("http://localhost:8000", "localhost:8000", True),
        ("http://LOCALHOST:8000", "localhost:8000", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("http://box.lan", "box.lan:80", True),
        ("https://box.lan", "box.lan", True),  # behind a proxy that ends TLS
        ("https://box.lan", "box.lan:443", True),
        ("https://box.lan", "box.lan:80", False),
        ("http://localhost:3000", "localhost:8000", False),
        ("http://localhost", "localhost:8000", False),
        ("http://127.0.0.1:8000", "localhost:8000", False),
        ("http://localhost.evil.example:8000", "localhost:8000", False),
        ("http://localhost:8000@evil.example", "localhost:8000", False),
        ("http://evil.example http://localhost:8000", "localhost:8000", False),
        ("null", "localhost:8000", False),
        ("", "localhost:8000", False),
        ("localhost:8000", "localhost:8000", False),
        ("file://", "localhost:8000", False),
    ],
)
def test_a_page_of_the_servers_own(origin: str, host: str, same: bool) -> None:
    authority = parse_authority(host)
    assert authority is not None
    assert same_authority(origin, authority) is same
