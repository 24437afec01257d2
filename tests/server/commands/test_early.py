"""The first line of `verbatim serve`: what is imported before it, and that it says what the server then does."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st

from server import cli
from server.commands import early, serve
from server.commands.early import greet_early, place_of
from server.hosts import LOOPBACK

ROOT = Path(cli.__file__).parents[1]
HEAVY = {"torch", "transformers", "fastapi", "sqlalchemy", "pydantic", "typer", "rich", "uvicorn", "numpy", "psutil"}

_SPY = """
import os, sys
class Spy:
    def write(self, text):
        if text.startswith("verbatim "):
            print(sorted(%r & set(sys.modules)))
            sys.stdout.flush()
            os._exit(0)
    def flush(self): pass
%s = Spy()
sys.argv = ["verbatim", *%r]
from server.cli import main
main()
"""


def imported(stream: str, *arguments: str) -> str:
    """What of the heavy packages is imported when the first line is written."""
    code = _SPY % (HEAVY, stream, arguments)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or done.stderr


def test_nothing_heavy_is_imported_before_the_first_line(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("models:\n  - {id: a, builtin: demo}\nserver: {port: 0}\n")
    assert imported("sys.stderr", "serve", "--config", str(file)) == "[]"
    assert imported("sys.stderr", "serve", "--model", "demo", "--port", "0") == "[]"


def test_the_version_waits_for_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['verbatim', '--version']; from server.cli import main; main()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "verbatim 0.1.0\n")


def test_it_knows_every_option_of_serve() -> None:
    """An option that it does not know makes it wait; one that it takes for a flag would shift all others."""
    command: Any = typer.main.get_command(cli.application("serve")).commands["serve"]  # type: ignore[attr-defined]
    options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    assert {name for name, option in options.items() if not option.is_flag} == set(early._VALUES)
    assert {name for name, option in options.items() if option.is_flag} == set(early._FLAGS)


_WORDS = st.sampled_from(
    "--host --port -c -m --name --pull --allow-host --allow-anonymous --port=7 --host=::1 -- -h "
    "127.0.0.1 ::1 localhost 0.0.0.0 0 9000 70000 x a.yaml b.yaml a ./a".split()
)
_FILES: dict[str, dict[str, Any]] = {
    "a.yaml": {"models": [{"id": "a", "builtin": "demo"}], "server": {"port": 9001}},
    "b.yaml": {"models": [{"id": "b", "builtin": "demo"}], "server": {"host": "::1"}},
    "models.yaml": {"models": [{"id": "a", "builtin": "demo"}], "server": {"host": "localhost", "port": 9002}},
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(words=st.lists(_WORDS, max_size=6), has_file=st.booleans())
def test_the_address_that_it_announces_is_the_one_that_is_served(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], has_file: bool
) -> None:
    """Whatever the arguments: where it dares to say an address, `serve` with the same arguments takes that one."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "a").mkdir()
    for name, content in _FILES.items():
        if has_file or name != "models.yaml":
            (folder / name).write_text(yaml.safe_dump(content))
    served: list[tuple[str, int]] = []

    def note(entries: Any, given: Any, *rest: Any) -> None:
        served.append((given.host, given.port))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(serve, "_serve", note)
        patch.setattr(serve, "listen", lambda host, port: (folder / "a.yaml").open())  # anything that can be closed
        announced = place_of(words)
        with contextlib.suppress(Exception):  # wrong usage, or a configuration that is refused
            cli.application("serve")(["serve", *words], standalone_mode=False)
    if announced is not None and served:
        assert announced == served[0]
        assert announced[0] in LOOPBACK


@pytest.mark.parametrize(
    "content",
    [
        "models: []",
        "models: [a\n",
        "models:\n- a\nserver: x",
        "models:\n- a\nserver: {port: '9000'}",
        "x: 1\nmodels: [1]",
    ],
)
def test_it_says_nothing_where_the_file_looks_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.yaml").write_text(content)
    assert place_of([]) is None
    assert place_of(["--model", "./folder"]) == ("127.0.0.1", 8000), "the file does not count then"


def test_an_address_for_others_is_not_announced_before_it_is_allowed() -> None:
    assert place_of(["--host", "0.0.0.0"]) is None
    assert place_of(["--host", "::1", "--port", "9"]) == ("::1", 9)


@pytest.mark.parametrize(("ui", "told"), [("", True), ("ui: true", True), ("ui: false", False)])
def test_a_page_is_spoken_of_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ui: str, told: bool
) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(f"models:\n  - {{id: demo, builtin: demo}}\nserver: {{port: 0, {ui}}}\n")
    early = greet_early(["--config", str(file)])
    assert early is not None
    early.listener.close()
    assert ("browser" in capsys.readouterr().err) == told
