"""Models load before the server is imported, and whatever goes wrong meanwhile, nothing of them is left."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from engine import LoadError, ModelConfig, Registry
from server.lifecycle import early_load
from server.settings import ServerSettings

ROOT = Path(early_load.__file__).parents[2]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set as soon as a model is asked for."""
    event = threading.Event()

    def refuse(config: ModelConfig, **_: Any) -> None:
        event.set()
        raise LoadError(f"{config.id}: no")

    monkeypatch.setattr(early_load, "Registry", partial(Registry, open=refuse))
    monkeypatch.setattr(early_load.logs, "configure", lambda *_, **__: None)
    return event


def _loading(*isolations: str) -> Any:
    entries = [ModelConfig(id=f"m{i}", path="/x", isolation=kind) for i, kind in enumerate(isolations)]  # type: ignore[arg-type]
    return early_load.loading(entries, ServerSettings(), pull=False, console=Console(quiet=True))


def test_models_with_processes_of_their_own_load_at_once(opened: threading.Event) -> None:
    with _loading("process", "process") as (registry, _):
        assert opened.wait(20)
        registry.start()  # as the server does, which knows nothing of it
        registry.wait()
        assert {status.state for status in registry.list()} == {"failed"}


def test_a_model_in_this_process_waits_for_its_imports(opened: threading.Event) -> None:
    with _loading("process", "thread") as (registry, _):
        assert not opened.wait(0.2)
        registry.start()
        assert opened.wait(20)


def test_a_fault_meanwhile_ends_the_loads(opened: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Any] = []
    monkeypatch.setattr(Registry, "close", lambda self: closed.append(self))
    with pytest.raises(KeyError), _loading("process") as (registry, _):
        raise KeyError
    assert closed == [registry]


def test_a_library_of_the_server_does_not_log_for_itself(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """securesystemslib comes with the server's imports, after the log is set up, and writes to the terminal itself."""
    code = (
        "import logging, sys; sys.path.insert(0, sys.argv[1])\n"
        "import server.run as run\n"
        "def app(*_): raise SystemExit(str([n for n, l in logging.root.manager.loggerDict.items() "
        "if any(type(h) is logging.StreamHandler for h in getattr(l, 'handlers', []))]))\n"
        "run.create_app = app\n"
        "logging.getLogger('odd').addHandler(logging.StreamHandler())\n"
        "from server.cli import main; sys.argv[:2] = ['verbatim']; main()"
    )
    (tmp_path / "models.yaml").write_text(f"models: [{{id: m, path: {tiny('qwen3')}}}]\nserver: {{port: 0}}\n")
    command = [sys.executable, "-c", code, str(ROOT), "serve"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_a_load_ends_though_its_process_tells_nothing(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it imports libraries it has nothing to tell for seconds; here, stopped, for ever. Nobody waits for that."""
    monkeypatch.setattr("engine.serving.registry._LAST_LOAD", 60.0)
    registry = Registry([ModelConfig(id="m", path=tiny("qwen3"), isolation="process")])
    registry.start()
    mine = psutil.Process()
    deadline = time.monotonic() + 60
    while not (children := [child for child in mine.children() if "engine.serving" in " ".join(child.cmdline())]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for child in children:
        child.suspend()
    assert registry.close()
    assert not any(child.is_running() for child in children)


def test_a_server_that_cannot_start_leaves_no_process(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The key that signs receipts is missing, which is found when the model's process runs already."""
    entries = f"models: [{{id: m, path: {tiny('qwen3')}}}]\n"
    (tmp_path / "models.yaml").write_text(entries + "server: {port: 0, receipts: {sign: nowhere.pem}}\n")
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from server.cli import main; main()",
    ]
    done = subprocess.run([*command, "serve"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "nowhere.pem" in done.stderr
    assert "Traceback" not in done.stderr
    assert "m: starting its process" in done.stderr
    left = [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(tmp_path)]
    assert not left
