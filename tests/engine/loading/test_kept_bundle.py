"""The file of kept weights: whatever lies in its place, nothing but what was written is ever given out."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from engine.loading.kept import bundle
from engine.loading.kept.bundle import Bundle, Distrusted, TooLarge

KEY = "a key"
NOBODY = 65534


def _numbers(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.int64) * 7 % 251).to(dtype).view(shape)


def _records() -> dict[str, bundle.Record]:
    return {
        "one": {"data": _numbers(9000), "bias": None, "columns": 3, "kind": "int8", "scale": 0.1, "tied": True},
        "two": {"data": _numbers(5, 4, dtype=torch.bfloat16), "bias": _numbers(5, dtype=torch.float32)},
        "none": {"data": _numbers(0)},
    }


def _same(found: bundle.Record, right: bundle.Record) -> bool:
    if list(found) != list(right):
        return False
    pairs = [(found[name], right[name]) for name in right]
    return all(
        (isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b))
        if isinstance(b, torch.Tensor)
        else a == b and type(a) is type(b)
        for a, b in pairs
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kept.weights"
    bundle.write(path, KEY, _records())
    return path


def _taken(path: Path) -> dict[str, bundle.Record]:
    opened = Bundle.open(path, KEY)
    return {name: opened.take(name) for name in sorted(opened.names)}


# -- what is written is what is read -----------------------------------------------------------------------------------


_DTYPES = st.sampled_from(list(bundle._DTYPES.values()))
_TENSORS = st.builds(
    lambda shape, dtype: _numbers(*shape, dtype=dtype), st.lists(st.integers(0, 40), min_size=1, max_size=3), _DTYPES
)
_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_VALUES = _TENSORS | st.none() | st.booleans() | st.integers(-(2**60), 2**60) | _FLOATS | st.text(max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=30), st.dictionaries(st.text(max_size=10), _VALUES, max_size=4), max_size=4))
def test_whatever_is_written_is_read_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, records: dict[str, bundle.Record]
) -> None:
    path = tmp_path_factory.mktemp("kept") / "any.weights"
    bundle.write(path, KEY, records)
    found = _taken(path)
    assert sorted(found) == sorted(records)
    assert all(_same(found[name], records[name]) for name in records)
    assert path.stat().st_size >= bundle.size_of(records)


def test_it_is_for_this_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        bundle.write(tmp_path / "kept.weights", KEY, _records())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "kept.weights").stat().st_mode) == 0o600


def test_processes_share_the_memory_and_a_stray_write_stays_in_one(file: Path) -> None:
    """The pages are the file's, not copies; what one process scribbles reaches neither the file nor another."""
    before = hashlib.sha256(file.read_bytes()).digest()
    tensor = Bundle.open(file, KEY).take("one")["data"]
    address, maps = tensor.data_ptr(), Path("/proc/self/maps")
    if maps.exists():
        lines = [line.split() for line in maps.read_text().splitlines() if "-" in line.split()[0]]
        bounds = {tuple(int(end, 16) for end in line[0].split("-")): line for line in lines}
        [mapped] = [line for (low, high), line in bounds.items() if low <= address < high]
        assert mapped[-1] == str(file)
    tensor.fill_(0)
    assert hashlib.sha256(file.read_bytes()).digest() == before
    assert _same(_taken(file)["one"], _records()["one"])


def test_tensors_outlive_the_file(file: Path) -> None:
    """Another start may replace or remove it while a model computes with it."""
    opened = Bundle.open(file, KEY)
    found = opened.take("one")
    opened.close()
    file.unlink()
    del opened
    assert _same(found, _records()["one"])


# -- damage ------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_flipped_bit_is_found_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Wherever it is: in a weight, the index, the end, or in padding that nobody reads."""
    path = tmp_path_factory.mktemp("kept") / "flipped.weights"
    bundle.write(path, KEY, _records())
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        found = _taken(path)
    except Distrusted:
        return
    assert all(_same(found[name], right) for name, right in _records().items())


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_not_used(tmp_path_factory: pytest.TempPathFactory, part: float) -> None:
    path = tmp_path_factory.mktemp("kept") / "cut.weights"
    bundle.write(path, KEY, _records())
    os.truncate(path, int(path.stat().st_size * part))
    with pytest.raises(Distrusted):
        _taken(path)


def _foreign(file: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(file, NOBODY, NOBODY)


def _link(file: Path) -> None:
    file.rename(file.with_suffix(".elsewhere"))
    file.symlink_to(file.with_suffix(".elsewhere"))


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another user's": (_foreign, "belongs to another user"),
    "open to the group": (lambda file: file.chmod(0o620), "can be written by other users"),
    "open to all": (lambda file: file.chmod(0o602), "can be written by other users"),
    "a link to a good one": (_link, "is a link"),
    "a pipe": (_pipe, "is no file of ours"),
    "a folder": (_folder, "is no file of ours"),
    "empty": (lambda file: os.truncate(file, 0), "not whole"),
    "a hole of the right length": (lambda file: file.write_bytes(bytes(file.stat().st_size)), "not whole"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "not whole"),
}


@pytest.mark.parametrize(("damage", "why"), FAULTS.values(), ids=FAULTS)
def test_a_file_that_is_not_ours_and_whole_is_not_used(file: Path, damage: Callable[[Path], object], why: str) -> None:
    damage(file)
    with pytest.raises(Distrusted, match=why):
        _taken(file)


def test_a_file_under_another_ones_name_is_not_used(file: Path) -> None:
    with pytest.raises(Distrusted, match="another model's"):
        Bundle.open(file, "another key")


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_limit_on_files_leaves_nothing(tmp_path: Path) -> None:
    """As a full disk does: it is found out before anything is written, or while, and then nothing stays."""
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parents[3])!r})
        import torch
        from pathlib import Path
        from engine.loading.kept import bundle
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        for reserve in (bundle._reserve, lambda *_: None):
            bundle._reserve = reserve
            try:
                bundle.write(Path({str(tmp_path)!r}, "kept.weights"), "key", {{"one": {{"data": torch.ones(10**6)}}}})
            except OSError as error:
                print(error.strerror)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["File too large"] * 2, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_leaves_what_was_there(file: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    before = file.read_bytes()

    def pwrite(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(bundle.os, "pwrite", pwrite)
    with pytest.raises(OSError, match=os.strerror(number)):
        bundle.write(file, KEY, {"other": {"data": _numbers(10)}})
    monkeypatch.undo()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_it_takes_no_more_than_half_of_what_is_free(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(file.parent)
    little = os.statvfs_result([*real[:4], bundle.size_of(_records()) * 2 // real.f_frsize - 1, *real[5:10]])
    monkeypatch.setattr(bundle.os, "statvfs", lambda _: little)
    with pytest.raises(TooLarge, match="more than half of what is free"):
        bundle.write(file, KEY, _records())


def test_file_systems_that_cannot_reserve_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(bundle.os, "posix_fallocate", cannot)
    bundle.write(tmp_path / "kept.weights", KEY, _records())
    assert _same(_taken(tmp_path / "kept.weights")["one"], _records()["one"])


# -- several at once ---------------------------------------------------------------------------------------------------


def test_readers_see_the_old_file_or_the_new_one(file: Path) -> None:
    """Starts of the same model at once: one writes while others read, and all of them read something whole."""
    ended, faults = threading.Event(), list[BaseException]()

    def read() -> None:
        try:
            while not ended.is_set():
                assert _same(_taken(file)["one"], _records()["one"])
        except BaseException as error:
            faults.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    writers = [threading.Thread(target=bundle.write, args=(file, KEY, _records())) for _ in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    ended.set()
    for reader in readers:
        reader.join()
    assert not faults
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_an_ended_writer_left_is_removed_and_a_working_ones_is_not(tmp_path: Path) -> None:
    left, working = tmp_path / ".partial-left", tmp_path / ".partial-working"
    left.write_bytes(b"x")
    with working.open("wb") as file:
        bundle._lock(file.fileno())
        bundle.sweep(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [working.name]
    bundle.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
