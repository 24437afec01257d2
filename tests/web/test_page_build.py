"""Source and build of the page agree: where there is Node, the page is built again, and every byte is the same."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from server.page.files import BUILT

WEB = Path(__file__).resolve().parents[2] / "web"


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("there is no Node: only the digest of the sources was compared")
    web = tmp_path / "web"
    shutil.copytree(WEB, web, ignore=shutil.ignore_patterns("node_modules"))
    (tmp_path / "server" / "page").mkdir(parents=True)
    if (WEB / "node_modules" / ".package-lock.json").exists():
        (web / "node_modules").symlink_to(WEB / "node_modules")
    else:
        install = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        got = subprocess.run(install, cwd=web, capture_output=True, text=True, timeout=200, check=False)
        if got.returncode:
            pytest.skip(f"npm could not install the lock: {got.stderr.strip()[-200:]}")
    built = subprocess.run([npm, "run", "build"], cwd=web, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert files(tmp_path / "server" / "page" / "built") == files(BUILT), "run: make web"
