"""The clients of versions.toml, and an environment for each: by uv from the Python index, by npm from Node's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
UV = ROOT / ".venv-clients" / "uv" / "bin" / "uv"
SECONDS = 480
"""After which an installation is given up."""


@dataclass(frozen=True, slots=True)
class Client:
    """An entry of versions.toml. `before`: the day whose newest dependencies are taken; None: today's."""

    id: str
    name: str
    script: str
    packages: tuple[str, ...]
    without: tuple[str, ...]
    language: str
    setup: str
    before: str | None

    @property
    def npm(self) -> bool:
        return "@" in self.packages[0]

    @property
    def folder(self) -> Path:
        """Where it is installed."""
        return ROOT / (".node-clients" if self.npm else ".venv-clients") / self.id

    @property
    def wanted(self) -> str:
        """What the environment must hold, as a text to compare with what it was made from."""
        return "\n".join([*self.packages, *(f"without {name}" for name in self.without), f"before {self.before}"])

    def newest(self) -> Client:
        """The same client without pins."""
        unpinned = tuple(re.sub(r"(?<=.)@[\d.]+$|==[\d.]+$", "", package) for package in self.packages)
        return Client(
            self.id, self.name, self.script, tuple(p + "@latest" for p in unpinned) if self.npm else unpinned,
            self.without, self.language, self.setup, None,
        )  # fmt: skip


def clients(path: Path = HERE / "versions.toml") -> list[Client]:
    """Read the list of clients, in its order."""
    data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    before = data.pop("before")
    return [
        Client(
            id=name,
            name=entry["name"],
            script=entry["script"],
            packages=tuple(entry["packages"]),
            without=tuple(entry.get("without", ())),
            language=entry["language"],
            setup=entry["setup"].strip("\n"),
            before=before,
        )
        for name, entry in data.items()
    ]


def install(client: Client) -> str:
    """Make a client's environment unless it is there. Returns why it could not be made; nothing if it could."""
    stamp = client.folder / ".installed"
    if stamp.exists() and stamp.read_text() == client.wanted:
        return ""
    shutil.rmtree(client.folder, ignore_errors=True)
    client.folder.mkdir(parents=True)
    try:
        (_by_npm if client.npm else _by_uv)(client)
    except subprocess.TimeoutExpired:
        return f"the installation took more than {SECONDS} s"
    except subprocess.CalledProcessError as error:
        return (error.stderr or "").strip()[-500:] or f"exit code {error.returncode}"
    except OSError as error:
        return str(error)
    stamp.write_text(client.wanted)
    return ""


def _run(*command: str | Path, cwd: Path) -> None:
    subprocess.run(
        ["nice", *map(str, command)], cwd=cwd, check=True, timeout=SECONDS, capture_output=True, text=True,
        env={**os.environ, "npm_config_update_notifier": "false"},
    )  # fmt: skip


def _by_npm(client: Client) -> None:
    (client.folder / "package.json").write_text('{"private": true}')
    before = ["--before", client.before] if client.before else []
    _run("npm", "install", "--silent", "--no-fund", "--no-audit", *before, *client.packages, cwd=client.folder)


def _by_uv(client: Client) -> None:
    if not UV.exists():
        _run(sys.executable, "-m", "venv", UV.parents[1], cwd=ROOT)
        _run(UV.with_name("python"), "-m", "pip", "install", "--quiet", "uv", cwd=ROOT)
    _run(UV, "venv", "--quiet", "--allow-existing", "--python", sys.executable, client.folder, cwd=ROOT)
    with tempfile.TemporaryDirectory() as scratch:
        # A requirement that holds nowhere takes the place of one that is not wanted.
        left_out = Path(scratch, "without.txt")
        left_out.write_text("".join(f'{name} ; sys_platform == "never"\n' for name in client.without))
        before = ["--exclude-newer", client.before] if client.before else []
        python = ["--python", str(client.folder / "bin" / "python")]
        _run(
            UV, "pip", "install", "--quiet", *python, "--overrides", left_out, *before, *client.packages,
            cwd=client.folder,
        )  # fmt: skip


def versions(client: Client) -> dict[str, str]:
    """Return the installed version of each package that the entry names."""
    names = [re.sub(r"\[.*?\]|==.*|(?<=.)@[^/]*$", "", package) for package in client.packages]
    if client.npm:
        return {
            name: json.loads((client.folder / "node_modules" / name / "package.json").read_text())["version"]
            for name in names
        }
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]), sep='\\n')"
    python = client.folder / "bin" / "python"
    told = subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True).stdout
    return dict(zip(names, told.split(), strict=True))
