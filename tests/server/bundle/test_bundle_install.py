"""A real bundle, installed and served from where there is no network at all."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.bundle.check import check_bundle

NO_NETWORK = ["unshare", "--map-root-user", "--net"]

GUARD = """
import socket
_connect = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
        raise OSError(101, "no network in this test")
    return _connect(self, address)
socket.socket.connect = connect
"""
"""`sitecustomize.py` for every Python that the test starts, where the system lets nobody make a network namespace."""

SERVE = """
import fcntl, json, socket, struct, subprocess, sys, time, urllib.request
verbatim, config, log = sys.argv[1:]
probe = socket.socket()
if sys.platform == "linux":  # bring loopback up: SIOCSIFFLAGS with IFF_UP and IFF_RUNNING
    try:
        fcntl.ioctl(probe, 0x8914, struct.pack("16sh14x", b"lo", 0x41))
    except PermissionError:
        pass  # in the machine's own namespace it is up
try:
    probe.connect(("192.0.2.1", 80))
except OSError as error:
    print("no network:", error)
else:
    sys.exit("there is a network")
with open(log, "w") as file:
    server = subprocess.Popen([verbatim, "serve", "--config", config, "--port", "0"], stdout=file, stderr=file)
try:
    deadline = time.monotonic() + 120
    while ": ready" not in (said := open(log).read()):
        assert time.monotonic() < deadline and server.poll() is None, said
        time.sleep(0.2)
    url = "http://127.0.0.1:" + said.split("http://127.0.0.1:")[1].split()[0]
    messages = [{"role": "user", "content": "Sort these words: pear, apple."}]
    body = json.dumps({"model": "demo", "messages": messages, "temperature": 0}).encode()
    request = urllib.request.Request(url + "/v1/chat/completions", body, {"content-type": "application/json"})
    print(json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"])
finally:
    server.terminate()
    server.wait(30)
"""


@pytest.fixture
def isolation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, str]]:
    """A command that takes the network away from another, and an environment for it."""
    unwanted = ("PYTHONPATH", "PIP_", "VIRTUAL_ENV")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    plain |= {"HOME": str(tmp_path / "home"), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    (tmp_path / "home").mkdir()
    try:
        tried = subprocess.run([*NO_NETWORK, "true"], capture_output=True, text=True, check=False)
        reason = tried.stderr.strip() if tried.returncode else ""
    except FileNotFoundError:
        reason = "there is no unshare"
    if not reason:
        return NO_NETWORK, plain
    with capsys.disabled():
        print(f"\nno network namespace here ({reason}): a guard on sockets stands for it")
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    return [], {**plain, "PYTHONPATH": str(tmp_path / "guard")}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("twice", [False, pytest.param(True, marks=pytest.mark.sweep)], ids=["once", "twice"])
def test_a_bundle_is_installed_and_serves_without_a_network(
    tmp_path: Path, isolation: tuple[list[str], dict[str, str]], twice: bool
) -> None:
    """`twice`: a bundle that the installed copy has made is installed and serves, too."""
    alone, environment = isolation
    main = [sys.executable, "-c", "from server.cli import main; main()"]
    root = Path(__file__).resolve().parents[3]
    bundle, venv = tmp_path / "a bundle", tmp_path / "venv"
    made = subprocess.run(
        [*main, "bundle", "create", str(bundle), "--model", "demo", "--torch", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert not list(check_bundle(bundle))

    options: dict[str, Any] = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}

    def isolated(*command: str, timeout: float) -> str:
        done = subprocess.run([*alone, *command], env=environment, timeout=timeout, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    environment["PYTHON"] = sys.executable
    assert "installed." in isolated("sh", str(bundle / "install.sh"), str(venv), timeout=600)
    (tmp_path / "serve.py").write_text(SERVE)
    config, log = str(bundle / "models.yaml"), str(tmp_path / "log")
    said = isolated(f"{venv}/bin/python", "serve.py", f"{venv}/bin/verbatim", config, log, timeout=300)
    assert "no network:" in said
    assert "apple, pear" in said
    where = "import server.bundle.wheels as w; print(w.checkout(), w.lock_folder())"
    assert isolated(f"{venv}/bin/python", "-c", where, timeout=60).startswith("None ")
    assert not list(check_bundle(bundle)), "serving leaves nothing in the bundle"
    _the_software_alone(tmp_path, bundle, venv, environment, isolated, install=twice)
    again = subprocess.run(
        ["sh", str(bundle / "install.sh"), str(tmp_path / "second" if twice else venv)],
        env=environment,
        timeout=60,
        **options,
    )
    assert (again.returncode, "exists already; nothing was installed" in again.stderr) == (1, True)


def _the_software_alone(
    tmp_path: Path,
    bundle: Path,
    venv: Path,
    environment: dict[str, str],
    isolated: Callable[..., str],
    *,
    install: bool,
) -> None:
    """The installed copy makes a bundle without models from the first one's wheels: the same ones, beside its own."""
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (bundle / "wheels").as_uri()}
    alone, second = tmp_path / "alone", tmp_path / "second"
    made = ("bundle", "create", str(alone), "--no-models", "--torch", "cpu")
    isolated(f"{venv}/bin/verbatim", *made, timeout=300)
    del environment["PIP_NO_INDEX"], environment["PIP_FIND_LINKS"]
    assert not list(check_bundle(alone))
    assert {path.name for path in (alone / "wheels").iterdir()} == {path.name for path in (bundle / "wheels").iterdir()}
    for wheel in (alone / "wheels").iterdir():  # ours was written again
        same = filecmp.cmp(wheel, bundle / "wheels" / wheel.name, shallow=False)
        assert same or wheel.name.startswith("verbatim_server-"), wheel.name
    said = (alone / "install.sh").read_text()
    assert "serve --model FOLDER" in said
    if not install:
        return
    shutil.rmtree(venv)
    said = isolated("sh", str(alone / "install.sh"), str(second), timeout=600)
    assert f"{second}/bin/verbatim serve --model FOLDER" in said
    (tmp_path / "models.yaml").write_text("models:\n  - {id: demo, builtin: demo}\n")
    config, log = str(tmp_path / "models.yaml"), str(tmp_path / "log")
    assert "apple, pear" in isolated(
        f"{second}/bin/python", "serve.py", f"{second}/bin/verbatim", config, log, timeout=300
    )
