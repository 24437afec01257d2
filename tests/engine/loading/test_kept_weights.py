"""Packed weights that a start keeps for the next: the same bits, never another model's, and no start fails for them."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.packed_weight import PackedWeight
from engine.errors import LoadError
from engine.loading.kept import bundle, weights
from engine.loading.kept.weights import KeptWeights, limit
from engine.types.fingerprint_parts import Part

PARTS = {"files": "sha256:0", "quantization": None, "kernels": "kernels-0", "code": "0", "torch": "2.0"}
MOST = 1 << 30


def _weight(kernels: Kernels, columns: int = 40, kind: str = "exact", bias: bool = True) -> PackedWeight:
    numbers = (torch.arange(columns * 96, dtype=torch.float32) * 0.37).sin().view(columns, 96)
    return kernels.pack(numbers, numbers[:, 0] if bias else None, kind)


def _kept(folder: Path, parts: Mapping[str, Part] = PARTS, *, most: int = MOST, least: int = 0) -> KeptWeights:
    return KeptWeights("m", lambda _: parts, folder=folder, most=most, least=least)


def _start(
    kernels: Kernels, kept: KeptWeights, names: str = "ab", kind: str = "exact"
) -> tuple[list[PackedWeight], str]:
    """Load as a model does. Returns the weights, and the names of those that had to be made."""
    made = ""

    def make(name: str) -> PackedWeight:
        nonlocal made
        made += name
        return _weight(kernels, kind=kind, bias=name == "a")

    keep = kept.of(kernels)
    found = [keep(name, lambda name=name: make(name)) for name in "ab"]  # type: ignore[misc]
    if thread := kept.finish():
        thread.join()
    return found, made


def _same(one: PackedWeight, two: PackedWeight) -> bool:
    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))

    alike = (one.columns, one.depth, one.kind) == (two.columns, two.depth, two.kind)
    return alike and same(one.data, two.data) and same(one.bias, two.bias)


@pytest.mark.parametrize("kind", ["exact", "int8"])
def test_the_second_start_makes_nothing_and_has_the_same_bits(kernels: Kernels, tmp_path: Path, kind: str) -> None:
    first, made = _start(kernels, _kept(tmp_path), kind=kind)
    assert made == "ab"
    second, made = _start(kernels, _kept(tmp_path), kind=kind)
    assert made == ""
    assert all(map(_same, first, second))
    x = torch.arange(3 * 96, dtype=torch.float32).cos().view(3, 96)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(kernels.group([one])(x)[0], kernels.group([two])(x)[0])


_NOTE = 8192  # bytes of one note of these tests


def _noting(kernels: Kernels, folder: Path, name: str, *, most: int = MOST) -> list[str]:
    """Start, and leave a note unless it is there. Returns which notes were known."""
    kept = _kept(folder, most=most)
    keep = kept.of(kernels)
    for own in "ab":
        keep(own, lambda: _weight(kernels))
    known = [other for other in map(str, range(12)) if kept.known(other) is not None]
    found = kept.known(name)
    if found is None:
        kept.note(name, {"name": name, "bytes": torch.zeros(_NOTE, dtype=torch.uint8)})
    else:
        assert found["name"] == name
    if thread := kept.finish():
        thread.join()
    return known


def test_starts_with_other_settings_keep_each_others_notes(kernels: Kernels, tmp_path: Path) -> None:
    """One file of weights serves them all: else two entries of one checkpoint would rewrite it in turn."""
    assert _noting(kernels, tmp_path, "0") == []
    assert _noting(kernels, tmp_path, "1") == ["0"]
    assert _noting(kernels, tmp_path, "0") == ["0", "1"]
    for number in range(2, 12):
        _noting(kernels, tmp_path, str(number))
    assert _noting(kernels, tmp_path, "11") == [str(number) for number in range(4, 12)]


def test_notes_stand_behind_weights_and_the_oldest_leave_where_room_is_short(kernels: Kernels, tmp_path: Path) -> None:
    """What stands first is checked first, and waited for. A start always keeps its own note."""
    for number in range(3):
        _noting(kernels, tmp_path, str(number))
    [file] = tmp_path.glob("*.weights")
    opened = bundle.Bundle.open(file, file.stem)
    assert list(opened.names) == ["a", "b", " 0", " 1", " 2"]
    weights_alone = bundle.size_of({name: opened.take(name) for name in "ab"})
    _noting(kernels, tmp_path, "3", most=weights_alone + 2 * _NOTE)
    assert list(bundle.Bundle.open(file, file.stem).names) == ["a", "b", " 2", " 3"]
    _noting(kernels, tmp_path, "4", most=weights_alone + _NOTE)
    assert list(bundle.Bundle.open(file, file.stem).names) == ["a", "b", " 4"]


def test_a_damaged_note_is_forgotten_and_the_others_go_on(kernels: Kernels, tmp_path: Path) -> None:
    for number in range(2):
        _noting(kernels, tmp_path, str(number))
    [file] = tmp_path.glob("*.weights")
    content = bytearray(file.read_bytes())
    opened = bundle.Bundle.open(file, file.stem)
    content[opened._index[" 0"]["bytes"]["offset"]] ^= 1
    opened.close()
    file.write_bytes(content)
    _noting(kernels, tmp_path, "2")
    assert "0" not in _noting(kernels, tmp_path, "2")
    assert _start(kernels, _kept(tmp_path))[1] == ""


OTHERS: dict[str, dict[str, Part]] = {
    "another checkpoint": {"files": "sha256:1"},
    "another quantisation": {"quantization": "int8"},
    "other kernels, or another processor": {"kernels": "kernels-1"},
    "other code": {"code": "1"},
    "another library": {"torch": "2.1"},
    "one part more": {"adapter": "sha256:2"},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_differs_in_any_part_is_another_file(kernels: Kernels, tmp_path: Path, other: dict[str, Part]) -> None:
    _start(kernels, _kept(tmp_path))
    _, made = _start(kernels, _kept(tmp_path, {**PARTS, **other}))
    assert made == "ab"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_weight_is_told_made_again_and_kept_anew(
    kernels: Kernels, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was checked and taken before it stays."""
    first, _ = _start(kernels, _kept(tmp_path))
    [file] = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    place = bundle.Bundle.open(file, file.stem)._index["b"]["data"]["offset"]
    content[place + 77] ^= 16
    file.unlink()  # it is mapped: to shorten it would end this process
    file.write_bytes(content)
    file.chmod(0o600)
    with caplog.at_level(logging.WARNING):
        second, made = _start(kernels, _kept(tmp_path))
    assert made == "b"
    assert all(map(_same, first, second))
    assert "not used: the file is not whole: the checksum of a weight is another" in caplog.text
    third, made = _start(kernels, _kept(tmp_path))
    assert made == ""
    assert all(map(_same, first, third))


def test_a_file_that_others_can_write_is_told_and_replaced(
    kernels: Kernels, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _start(kernels, _kept(tmp_path))
    [file] = tmp_path.iterdir()
    file.chmod(0o666)
    _, made = _start(kernels, _kept(tmp_path))
    assert made == "ab"
    assert "can be written by other users" in caplog.text
    assert file.stat().st_mode & 0o077 == 0
    assert _start(kernels, _kept(tmp_path))[1] == ""


def test_a_link_is_removed_and_what_it_names_is_not(kernels: Kernels, tmp_path: Path) -> None:
    _start(kernels, _kept(tmp_path / "kept"))
    [file] = (tmp_path / "kept").iterdir()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert _start(kernels, _kept(tmp_path / "kept"))[1] == "ab"
    assert (tmp_path / "elsewhere").is_file()
    assert not file.is_symlink()


def test_a_file_that_cannot_be_mapped_just_now_stays(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may be short at this start, and not at the next."""
    _start(kernels, _kept(tmp_path))
    [file] = tmp_path.iterdir()

    def mmap(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(bundle.mmap, "mmap", mmap)
        kept = _kept(tmp_path)
        kept.of(kernels)
    assert file.exists()
    assert _start(kernels, _kept(tmp_path))[1] == ""


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_can_write_is_not_used(
    kernels: Kernels, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    assert _start(kernels, _kept(folder))[1] == "ab"
    assert "not kept for the next start" in caplog.text
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_told_and_fails_no_start(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def mkstemp(**given: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(bundle.tempfile, "mkstemp", mkstemp)
    assert _start(kernels, _kept(tmp_path))[1] == "ab"
    assert f"not kept for the next start: {tmp_path}: {os.strerror(number)}" in caplog.text


def test_a_folder_that_is_only_read_still_serves(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an image that is made once and run read-only: no file of it can be touched."""
    _start(kernels, _kept(tmp_path))

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("utime", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    assert _start(kernels, _kept(tmp_path))[1] == ""


def test_what_was_used_longest_ago_leaves_first(kernels: Kernels, tmp_path: Path) -> None:
    _start(kernels, _kept(tmp_path))
    [file] = tmp_path.iterdir()
    room = 3 * file.stat().st_size
    for number in range(2):
        _start(kernels, _kept(tmp_path, {**PARTS, "files": str(number)}, most=room))
    for age, path in enumerate(sorted(tmp_path.iterdir(), key=lambda path: path != file)):
        os.utime(path, (1000 + age, 1000 + age))
    assert _start(kernels, _kept(tmp_path, most=room))[1] == "", "the oldest is used, so it is the newest now"
    _start(kernels, _kept(tmp_path, {**PARTS, "files": "new"}, most=room))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= room
    assert file.exists()
    assert _start(kernels, _kept(tmp_path, {**PARTS, "files": "new"}, most=room))[1] == ""


def test_weights_beyond_the_limit_and_very_small_ones_are_not_kept(kernels: Kernels, tmp_path: Path) -> None:
    _start(kernels, _kept(tmp_path, most=1000))
    _start(kernels, _kept(tmp_path, least=1 << 20))
    assert list(tmp_path.iterdir()) == []


def test_starts_at_once_all_get_their_weights(kernels: Kernels, tmp_path: Path) -> None:
    right = [_weight(kernels, bias=name == "a") for name in "ab"]
    found: list[list[PackedWeight]] = []
    starts = [threading.Thread(target=lambda: found.append(_start(kernels, _kept(tmp_path))[0])) for _ in range(4)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert len(found) == 4
    assert all(all(map(_same, one, right)) for one in found)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("text", "right"), [("", 32 << 30), ("off", 0), ("OFF", 0), ("4GiB", 4 << 30), ("0", 0)])
def test_the_limit_is_a_size_or_off(monkeypatch: pytest.MonkeyPatch, text: str, right: int) -> None:
    monkeypatch.setenv(weights.LIMIT_NAME, text)
    assert limit() == right


def test_any_other_limit_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(weights.LIMIT_NAME, "much")
    with pytest.raises(LoadError, match=r"VERBATIM_PACKED_CACHE: 'much' is not a size; .*, or off\."):
        limit()
