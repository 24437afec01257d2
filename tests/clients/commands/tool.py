"""Runs a command-line client as a user would, in a folder and a home of its own, and returns what it prints."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

ENVIRONMENT = Path(os.environ["CLIENT_ENVIRONMENT"])
SECONDS = 55
"""After which a client counts as hanging."""
QUIET = {"DO_NOT_TRACK": "1", "NO_COLOR": "1", "CI": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}


class Tool:
    """A client in a scratch folder. `home`: where its settings go; `work`: where it runs. Use it as a context."""

    def __init__(self, name: str) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="client-"))
        self.home, self.work = self._scratch / "home", self._scratch / "work"
        self.home.mkdir()
        self.work.mkdir()
        node = ENVIRONMENT / "node_modules" / ".bin" / name
        self.path = node if node.exists() else ENVIRONMENT / "bin" / name

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)

    def run(self, *arguments: str, **variables: str) -> str:
        """Run it with some arguments and environment variables; return what it printed.

        Raises:
            RuntimeError: it failed or hangs; with its last words.
        """
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "XDG_CONFIG_HOME": str(self.home / "config")}
        environment |= {"XDG_DATA_HOME": str(self.home / "data"), "XDG_CACHE_HOME": str(self.home / "cache")}
        environment |= {"XDG_STATE_HOME": str(self.home / "state"), **QUIET, **variables}
        process = subprocess.Popen(
            [str(self.path), *arguments],
            cwd=self.work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that what it starts ends with it
        )
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise RuntimeError(f"it was still running after {SECONDS} s: {(out + err)[-600:]}") from None
        print(out, err, sep="\n")
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {(out + err)[-600:]}")
        return out


def holds(text: str, wanted: str) -> None:
    """Raise if a text does not hold another."""
    if wanted not in text:
        raise AssertionError(f"no {wanted!r} in {text[-300:]!r}")
