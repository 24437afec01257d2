"""The random checkpoint that is written on first use: whole, or written again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.checkpoints import noise_checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_checkpoint.ensure_noise_checkpoint(tmp_path_factory.mktemp("good"))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def written(good: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """How often it was written: what takes seconds is a copy here."""
    calls: list[Path] = []

    def write(folder: Path) -> None:
        calls.append(folder)
        folder.mkdir()
        for name, content in _contents(good).items():
            if name != noise_checkpoint._SEAL:
                (folder / name).write_bytes(content)

    monkeypatch.setattr(noise_checkpoint, "_write", write)
    return calls


def _zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights cut short": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "weights of zeros": lambda folder: _zeros(folder / "model.safetensors"),
    "an empty configuration": lambda folder: os.truncate(folder / "config.json", 0),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "a file too many": lambda folder: (folder / "chat_template.jinja2").write_text("x"),
    "no seal, as of an older release": lambda folder: (folder / noise_checkpoint._SEAL).unlink(),
    "a link": lambda folder: (folder.rename(folder.parent / "other"), folder.symlink_to(folder.parent / "other")),
    "another user's": lambda folder: os.chown(folder, 65534, 65534) if os.geteuid() == 0 else pytest.skip("needs root"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_not_whole_is_written_again(
    good: Path, written: list[Path], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    folder = noise_checkpoint.ensure_noise_checkpoint(tmp_path)
    assert noise_checkpoint.ensure_noise_checkpoint(tmp_path) == folder
    assert len(written) == 1
    damage(folder)
    assert _contents(noise_checkpoint.ensure_noise_checkpoint(tmp_path)) == _contents(good)
    assert not folder.is_symlink()
    assert len(written) == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".noise-")]


def test_another_process_may_be_faster(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both write it; the second one finds a whole one in its place and takes it."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "slower").write_text("")
        shutil.copytree(good, tmp_path / good.name)

    monkeypatch.setattr(noise_checkpoint, "_write", write)
    assert _contents(noise_checkpoint.ensure_noise_checkpoint(tmp_path)) == _contents(good)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
