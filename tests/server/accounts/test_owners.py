"""Whether a server is surely gone: only of what would be seen here is that said, whatever containers share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.accounts import owners
from server.accounts.owners import name_of_this_process, surely_gone

SAY_AND_WAIT = "from server.accounts.owners import name_of_this_process as n; print(n(), flush=True); input()"


def test_two_names_are_never_alike() -> None:
    assert name_of_this_process() != name_of_this_process()


def test_a_process_that_runs_and_one_that_has_ended() -> None:
    other = subprocess.Popen([sys.executable, "-c", SAY_AND_WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout
    name = other.stdout.readline().decode().strip()
    assert not surely_gone(name)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    if sys.platform == "linux":
        assert surely_gone(name), "its parent has not looked at its end yet, and it computes nothing"
    other.communicate()
    assert surely_gone(name)
    random, place, _, began = name.split(":")
    assert not surely_gone(name_of_this_process())
    assert surely_gone(f"{random}:{place}:{os.getpid()}:{began}"), "its id is another process's now"


@pytest.mark.parametrize(
    "owner",
    [
        "", "x", "0123456789abcdef:4194305:1764170000.11", "a:unknown:4194305:1", "a:otherplace:4194305:1",
        "a:{place}:x:1", "a:{place}:-1:1",
    ],
)  # fmt: skip
def test_of_others_nothing_is_known(owner: str) -> None:
    """Names of the first release, of another machine, of another container."""
    assert not surely_gone(owner.format(place=name_of_this_process().split(":")[1]))


def test_where_the_kernel_says_nothing_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> str:
        raise PermissionError

    monkeypatch.setattr(owners, "_place", lambda: "unknown")
    assert not surely_gone("a:unknown:4194305:1")
    monkeypatch.setattr(Path, "read_text", silent)
    assert not surely_gone(f"a:{owners._place()}:{os.getpid()}:1")


def in_another_pid_namespace() -> list[str]:
    """The command that runs one in a PID namespace of its own, as a container does; empty where that is not allowed."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        return []
    return command


def test_a_container_with_the_same_host_name_is_another_place() -> None:
    """Its process 1 is not this machine's process 1, nor is an id that it has and nobody here."""
    command = in_another_pid_namespace()
    if not command:
        pytest.skip("no PID namespace can be made here")
    other = subprocess.Popen(
        [*command, sys.executable, "-c", SAY_AND_WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout
    name = other.stdout.readline().decode().strip()
    ours, theirs = name_of_this_process().split(":"), name.split(":")
    assert theirs[2] == "1"
    assert theirs[1] != ours[1]
    assert not surely_gone(name)
    there = subprocess.run(
        [
            *command,
            sys.executable,
            "-c",
            f"from server.accounts.owners import *; print(surely_gone({':'.join(ours)!r}))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == "False"
    other.kill()
    other.communicate()
