"""SIGHUP: a closed terminal ends a server in order, `nohup` does not, and everybody else has a configuration read."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from server.lifecycle.hangup import Hangup
told, stopped = Path(sys.argv[1]), []
def tell(word):
    with told.open("a") as file:
        file.write(word + "\\n")
Hangup(lambda: tell("reload"), lambda: stopped.append(1)).install()
tell("ready")
end = time.monotonic() + 60
while not stopped and not told.with_suffix(".end").exists() and time.monotonic() < end:
    time.sleep(0.01)
print("after the end")  # to a terminal that may be gone
sys.stdout.flush()
tell("stopped in order" if stopped else "ended")
"""


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_terminal(told: Path, *, ignored: bool) -> tuple[int, int]:
    """Run the script as the leader of a session with a terminal of its own. Returns its id and the terminal."""
    child, terminal = pty.fork()
    if not child:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-c", SCRIPT, str(told)])
    return child, terminal


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal(tmp_path: Path, ignored: bool) -> None:
    told = tmp_path / "told"
    child, terminal = in_terminal(told, ignored=ignored)
    until(lambda: told.exists() and "ready" in told.read_text())
    os.kill(child, signal.SIGHUP)
    until(lambda: "reload" in told.read_text())
    while select.select([terminal], [], [], 0)[0]:
        os.read(terminal, 4096)
    os.close(terminal)
    if ignored:
        until(lambda: told.read_text().count("reload") == 2)
        os.kill(child, 0)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not ignored:
        assert os.waitstatus_to_exitcode(status) == 0, "it died by the signal, or by printing to nowhere"
        assert told.read_text().split("\n")[1:] == ["reload", "stopped in order", ""]


def test_a_service_has_no_terminal_and_reads_its_configuration(tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = [sys.executable, "-c", SCRIPT, str(told)]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        until(lambda: told.exists() and "ready" in told.read_text())
        for count in (1, 2, 3):
            process.send_signal(signal.SIGHUP)
            until(lambda count=count: told.read_text().count("reload") == count)
        told.with_suffix(".end").touch()
    assert process.returncode == 0
    assert told.read_text().endswith("ended\n")
