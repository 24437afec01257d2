"""A changed models.yaml in a running server: what is told, and what a mistake in it changes (nothing)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from engine import Changes, ConfigError
from server.configuration import read_configuration, rereading
from server.lifecycle.reloading import Reloading
from server.settings import ServerSettings

FILE = "models:\n  - {id: a, path: m}\n  - {id: b, path: m, load: on_demand}\n"


class FakeRegistry:
    def __init__(self) -> None:
        self.applied: list[tuple[list[str], int | None]] = []

    def apply(self, configs: Any, max_loaded: int | None) -> Changes:
        self.applied.append(([config.id for config in configs], max_loaded))
        return Changes(added=["b"])


@pytest.fixture
def registry() -> Any:
    return FakeRegistry()


def reloading(registry: Any, file: Path, **flags: Any) -> Reloading:
    def fitted(settings: ServerSettings) -> ServerSettings:
        return settings.model_copy(update=flags)

    _, settings = read_configuration(file, None, None)
    return Reloading(registry, fitted(settings), rereading(file, None, fitted))


def test_what_changes_and_what_needs_a_restart(registry: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(FILE)
    reload = reloading(registry, file, port=1234)
    file.write_text(FILE + "server: {max_loaded: 1, idle_seconds: 7, port: 99}\n")
    reload()
    assert registry.applied == [(["a", "b"], 1)]
    assert "new: b" in caplog.text
    assert "max_loaded is 1" in caplog.text
    assert "need a restart: idle_seconds\n" in caplog.text, "the option --port stands above the file"
    caplog.clear()
    reload()
    assert "max_loaded is" not in caplog.text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models: [", "is not valid YAML"),
        ("models:\n  - {id: a, pth: m}\n", "did you mean 'path'"),
        ("models:\n  - {id: a, path: m}\n  - {id: c, path: m}\nserver: {max_loaded: 1}\n", "load: on_demand"),
        (None, "does not exist"),
    ],
)
def test_a_mistake_changes_nothing(
    registry: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | None, told: str
) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(FILE)
    reload = reloading(registry, file)
    file.write_text(text) if text is not None else file.unlink()
    reload()
    assert registry.applied == []
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "nothing has changed" in caplog.text
    assert told in caplog.text


def test_without_a_file_it_says_so(
    registry: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rereading(None, None, lambda settings: settings) is None
    (tmp_path / "models.yaml").write_text(FILE)
    assert rereading(None, "some/model", lambda settings: settings) is None
    again = rereading(None, None, lambda settings: settings)
    assert again is not None
    assert [entry.id for entry in again()[0]] == ["a", "b"]
    Reloading(registry, ServerSettings(), None)()
    assert registry.applied == []
    assert "without a configuration file" in caplog.text


def test_more_at_start_than_may_be_loaded_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("models:\n  - {id: a, path: m}\n  - {id: c, path: m}\nserver: {max_loaded: 1}\n")
    with pytest.raises(ConfigError, match="max_loaded: 1 does not hold the 2 models"):
        read_configuration(file, None, None)
