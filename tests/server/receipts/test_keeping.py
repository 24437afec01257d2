"""Where receipts are kept: both places keep the same promises, and a folder's files are nobody else's to read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_for_tests import WITH_POSTGRES, Clock, empty_postgres

from engine import ConfigError
from server.errors import KeepingFault
from server.ledger.store import Ledger
from server.receipts.folder import FolderKeeper
from server.receipts.keeping import Keeper, LedgerKeeper, Written


def written(number: int, created: int = 1_800_000_000, body: bytes | None = None) -> Written:
    text = body or f'{{"version":1,"id":"chatcmpl-{number}","model":{{"name":"m"}}}}'.encode()
    return Written(f"chatcmpl-{number}", "m", created, text)


@pytest.fixture(params=["folder", "sqlite", pytest.param("postgres", marks=WITH_POSTGRES)])
def keeper(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Keeper]:
    made: Keeper
    if request.param == "folder":
        made = FolderKeeper(tmp_path / "kept")
    else:
        url = f"sqlite:///{tmp_path / 'ledger.db'}" if request.param == "sqlite" else empty_postgres()
        made = LedgerKeeper(Ledger(url, clock))
    yield made
    made.close()


def test_what_is_kept_is_found_byte_by_byte(keeper: Keeper) -> None:
    body = '{"version":1,"model":{"name":"m"},"text":"\\u0000 ü \u2028"}'.encode()
    keeper.put("a", written(1, body=body))
    assert keeper.get("a", "chatcmpl-1") == body
    assert keeper.get(None, "chatcmpl-1") == body
    assert keeper.get("a", "chatcmpl-2") is None


def test_an_owner_sees_only_its_own(keeper: Keeper) -> None:
    keeper.put("a", written(1))
    keeper.put("b", written(2))
    assert keeper.get("b", "chatcmpl-1") is None
    assert [one.id for one in keeper.list("a", None, 9)] == ["chatcmpl-1"]
    assert keeper.list("b", "chatcmpl-1", 9) == [], "another's receipt is no place to begin at"
    assert keeper.list("c", None, 9) == []
    assert {(one.owner, one.id) for one in keeper.list(None, None, 9)} == {("a", "chatcmpl-1"), ("b", "chatcmpl-2")}


def test_a_list_is_newest_first_and_pages_meet_without_gap_or_overlap(keeper: Keeper) -> None:
    for number, created in enumerate((5, 7, 7, 7, 9)):
        keeper.put("a", written(number, 1_800_000_000 + created))
    whole = keeper.list("a", None, 9)
    assert [one.created - 1_800_000_000 for one in whole] == [9, 7, 7, 7, 5]
    assert {one.model for one in whole} == {"m"}
    pages, after = [], None
    while page := keeper.list("a", after, 2):
        pages += page
        after = page[-1].id
    assert pages == whole


def test_a_sweep_deletes_what_is_older_and_nothing_else(keeper: Keeper) -> None:
    for number in range(4):
        keeper.put("a", written(number, 1_800_000_000 + number))
    assert keeper.sweep(1_800_000_002) == 2
    assert [one.id for one in keeper.list(None, None, 9)] == ["chatcmpl-3", "chatcmpl-2"]
    assert keeper.sweep(1_800_000_002) == 0


@pytest.mark.parametrize("id", ["../b/chatcmpl-1", "chatcmpl-1.json", "", ".", "a/b", "x" * 200, "\0", "ü"])
def test_an_id_that_is_none_finds_nothing(keeper: Keeper, id: str) -> None:
    """Ids come from paths of the API: none may lead out of the owner's folder."""
    keeper.put("a", written(1))
    keeper.put("b", written(1 << 20))
    assert keeper.get("a", id) is None
    assert keeper.list("a", id, 9) == []


def test_files_and_folders_are_their_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        FolderKeeper(tmp_path / "kept").put("a", written(1))
    finally:
        os.umask(old)
    for path in (tmp_path / "kept", tmp_path / "kept/a"):
        assert path.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "kept/a/chatcmpl-1.json").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "kept").rglob("*")] == ["a", "chatcmpl-1.json"]


def test_a_link_in_the_folder_is_not_followed(tmp_path: Path) -> None:
    keeper = FolderKeeper(tmp_path / "kept")
    keeper.put("a", written(1))
    (tmp_path / "secret.json").write_text("secret")
    (tmp_path / "kept/a/chatcmpl-2.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(KeepingFault):
        keeper.get("a", "chatcmpl-2")


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="receipts cannot be kept in"):
        FolderKeeper(tmp_path / "file")


_LARGE = 100_000


def test_a_full_disk_leaves_no_half_of_a_receipt(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path; from server.receipts.folder import FolderKeeper; "
        "from server.receipts.keeping import Written; from server.errors import KeepingFault\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "keeper = FolderKeeper(Path(sys.argv[1]))\n"
        f"try: keeper.put('a', Written('chatcmpl-1', 'm', 1, b'x' * {_LARGE}))\n"
        "except KeepingFault as error: print(error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "kept")], capture_output=True, text=True, timeout=60
    )
    assert "could not be written" in done.stdout, done.stderr
    assert not list((tmp_path / "kept/a").iterdir())


def test_a_kill_while_writing_leaves_whole_receipts_and_a_sweep_drops_the_rest(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from server.receipts.folder import FolderKeeper; "
        "from server.receipts.keeping import Written\n"
        "keeper = FolderKeeper(Path(sys.argv[1])); print('go', flush=True); n = 0\n"
        "while True:\n"
        f"    n += 1; keeper.put('a', Written(f'chatcmpl-{{n}}', 'm', 1_800_000_000, b'x' * {_LARGE}))\n"
    )
    folder = tmp_path / "kept"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    while not len(list(folder.rglob("*.json"))) > 3:
        assert process.poll() is None
    process.kill()
    process.wait()
    process.stdout.close()
    assert all(path.stat().st_size == _LARGE for path in folder.rglob("*.json"))
    left = folder / "a" / ".chatcmpl-9-00.part"
    left.touch()
    keeper = FolderKeeper(folder)
    keeper.sweep(0)
    assert left.exists(), "another server may be writing it"
    os.utime(left, (1, 1))
    keeper.sweep(0)
    assert not left.exists()


def test_a_pipe_in_place_of_a_receipt_holds_nobody(tmp_path: Path) -> None:
    keeper = FolderKeeper(tmp_path / "kept")
    keeper.put("a", Written("one", "m", 1, b"{}"))
    os.mkfifo(tmp_path / "kept" / "a" / "two.json")
    assert keeper.get("a", "two") is None
    assert keeper.get("a", "one") == b"{}"
    assert {kept.id for kept in keeper.list("a", None, 9)} == {"one", "two"}


def test_a_link_in_place_of_an_owners_folder_is_not_followed(tmp_path: Path) -> None:
    keeper = FolderKeeper(tmp_path / "kept")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "one.json").write_bytes(b"secret")
    (tmp_path / "kept" / "a").symlink_to(tmp_path / "elsewhere")
    for use in (
        lambda: keeper.get("a", "one"),
        lambda: keeper.list("a", None, 9),
        lambda: keeper.put("a", Written("two", "m", 1, b"{}")),
    ):
        with pytest.raises(KeepingFault, match="is a link"):
            use()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["one.json"]
    assert keeper.get(None, "one") is None
