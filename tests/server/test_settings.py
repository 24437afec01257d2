"""The `server:` part of models.yaml: every key is checked, and a wrong one says what would be right."""

from __future__ import annotations

from typing import Any

import pytest

from engine import ConfigError
from server.settings import ServerSettings, read_settings


def test_without_a_word_it_listens_on_loopback_only() -> None:
    settings = read_settings({"models": []}, "models.yaml")
    assert settings == ServerSettings()
    assert (settings.host, settings.port, settings.strict_params) == ("127.0.0.1", 8000, False)


def test_given_keys_are_taken() -> None:
    settings = read_settings({"server": {"port": 9000, "strict_params": True}}, "m")
    assert (settings.port, settings.strict_params) == (9000, True)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"server": {"prt": 1}}, "unknown key 'prt'; did you mean 'port'"),
        ({"server": {"port": 70000}}, "port"),
        ({"server": {"port": "no"}}, "got 'no'"),
        ({"server": {"max_body_bytes": 1}}, "max_body_bytes"),
        ({"server": {"keepalive_seconds": 0}}, "keepalive_seconds"),
        (
            {"server": {"hosts": ["http://box.lan"]}},
            "'http://box.lan' is no name of a host: write it without http:// and",
        ),
        ({"server": {"hosts": ["box.lan:8000"]}}, "without http:// and port"),
        ({"server": {"hosts": "box.lan"}}, "hosts"),
        ({"server": [1]}, "must be a mapping"),
        ({"server": {"receipts": {"kept": "here"}}}, "unknown key 'receipts.kept'; did you mean 'keep'"),
        ({"server": {"receipts": {"always": True}}}, "always needs keep"),
        ({"server": {"receipts": {"days": 3}}}, "days needs keep"),
        ({"server": {"receipts": {"keep": "here", "days": 0}}}, "receipts.days"),
        ({"server": {"receipts": {"keep": ""}}}, "a folder or ledger"),
        ({"server": {"receipts": "here"}}, "receipts"),
        ({"sever": {}}, "unknown key 'sever'"),
    ],
)
def test_wrong_ones_are_named(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=r"^models\.yaml") as caught:
        read_settings(data, "models.yaml")
    assert words in caught.value.message
