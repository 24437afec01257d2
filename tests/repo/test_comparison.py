"""Servers side by side: which files both serve, which goals a run judges, a run with a stand-in for the peer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import compare, goals, rivals, served
from benchmarks.common import ROOT
from benchmarks.rivals import Contestant, kind_of
from tests import tiny_models
from tests.engine import gguf_files

GIB = 2**30


def contestant(
    name: str, one: float, eight: float, prompt: float, *, peak: float = 1, resident: float = 1, file: str = ""
) -> Contestant:
    """What a run of two repetitions found out; the second is a tenth faster for all."""
    kind = name.partition(" ")[2] or "float32"
    made = Contestant(name, "", 0, "", kind=kind, file=Path(file) if file else None)
    for case, value in ((goals.ONE, one), (goals.EIGHT, eight), (goals.PROMPT, prompt)):
        made.found[case] = [value, value * 1.1]
    made.memory = {1: (int(peak * GIB), int(resident * GIB))}
    return made


def test_each_goal_is_judged_against_its_peer() -> None:
    """A figure that is well against the wrong peer would be advertised: int8 against Q4_0, a prompt against F32."""
    everybody = [
        contestant("verbatim int8", 23, 90, 310, peak=1.2, resident=1.0),
        contestant("verbatim int4", 34, 140, 310, peak=1.1, resident=1.0),
        contestant("verbatim Q4_K_M", 30, 100, 100, resident=1.2, file="k"),
        contestant("llama.cpp F32", 8, 40, 210),
        contestant("llama.cpp Q8_0", 20, 50, 190),
        contestant("llama.cpp Q4_0", 30, 75, 180),
        contestant("llama.cpp Q4_K_M", 28, 72, 200, resident=1.0, file="k"),
    ]
    found = {
        (row["name"].removeprefix("goal: "), row["ratio_of"]): (round(row["ratio"]["median"], 3), row["met"])
        for row in goals.goals(everybody)
    }
    one, stays = "decode, 1 stream: verbatim", "× what stays resident"
    assert found == {
        (f"{one} int8", "× llama.cpp Q8_0"): (1.15, True),
        (f"{one} int4", "× llama.cpp Q4_0"): (1.133, False),
        (f"{one} int4", "× llama.cpp Q4_K_M"): (1.214, True),
        (f"{one} Q4_K_M", "× llama.cpp Q4_K_M, the same file"): (1.071, False),
        ("resident memory: verbatim Q4_K_M", "× llama.cpp Q4_K_M, the same file"): (1.2, False),
        ("prompt: verbatim int8", "× llama.cpp F32, the best kind"): (1.476, False),
        ("prompt: verbatim int4", "× llama.cpp F32, the best kind"): (1.476, False),
        ("decode, 8 streams: verbatim int4", "× llama.cpp Q4_0, the best peer"): (1.867, False),
        ("peak memory: verbatim int8", stays): (1.2, False),
        ("peak memory: verbatim int4", stays): (1.1, True),
        ("peak memory: verbatim Q4_K_M", stays): (0.833, True),
    }


def test_without_a_peer_nothing_is_claimed_about_peers() -> None:
    alone = [contestant("verbatim", 15, 50, 200), contestant("verbatim int4", 30, 90, 300)]
    assert [row["name"] for row in goals.goals(alone)] == [
        "goal: peak memory: verbatim",
        "goal: peak memory: verbatim int4",
    ]
    assert goals.beside_the_best(goals.ONE, False, alone) == ""
    both = [*alone, contestant("transformers", 5, 6, 190), contestant("llama.cpp Q4_0", 40, 5, 100)]
    assert goals.beside_the_best(goals.ONE, False, both) == (
        "beside the best peer, llama.cpp Q4_0: verbatim 0.38 ×, verbatim int4 0.75 ×."
    )
    assert goals.beside_the_best(goals.ONE, True, both).startswith("beside the best peer, transformers: verbatim 3.00")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    """The same as a GGUF file of float32."""
    return gguf_files.write(folder, folder.parent / "llama.gguf", extra=lambda writer: writer.add_file_type(0))


def test_files_are_named_by_their_kind(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kind_of(file) == "F32"
    assert kind_of(gguf_files.write(folder, tmp_path / "unmarked.gguf")) == "F32", "what most of its numbers are"
    command = ["--model", "m", "--llama-server", "s", "--same", str(file), "--gguf", "mine=x.gguf"]
    settings = compare.parse(command)
    assert settings.same == [("F32", file)]
    assert settings.gguf == [("F32", file), ("mine", Path("x.gguf"))]
    for wrong, words in (
        (["--model", "m", "--same", str(file)], "need --llama-server"),
        (["--model", "m", "--no-float32"], "leaves nothing of this server"),
        ([*command, "--llama-model", str(file)], "two files are called F32"),
        ([*command, "--llama-model", str(Path(__file__))], "not a readable GGUF file"),
        ([*command, "--gguf", "=x"], "LABEL=FILE"),
    ):
        with pytest.raises(SystemExit):
            compare.parse(wrong)
        assert words in capsys.readouterr().err


STAND_IN = """#!{python}
import json, os, sys, tempfile
if "--version" in sys.argv:
    sys.exit("version: 1 (stand-in)")
given = dict(zip(sys.argv, sys.argv[1:]))
print("system_info: n_threads = 1 | CPU : AVX2 = 1 | AVX512 = 0 | FMA = 1 |", flush=True)
entry = {{"id": "any", "path": given["-m"], "device": "cpu", "threads": int(given["-t"]), "context_length": 2048}}
config = tempfile.mkdtemp(dir={folder!r}) + "/models.yaml"
open(config, "w").write(json.dumps({{"models": [entry]}}))
start = "from server.cli import main; main()"
os.execv({python!r}, [{python!r}, "-c", start, "serve", "--config", config, "--port", given["--port"]])
"""


@pytest.mark.slow
def test_the_same_file_in_both_servers(
    tmp_path: Path, folder: Path, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run; the peer is this server behind the options of llama.cpp's, so that nothing need be installed."""
    seen: set[psutil.Process] = set()
    processes = Contestant.processes

    def noted(self: Contestant) -> list[psutil.Process]:
        found = processes(self)
        seen.update(found)
        return found

    monkeypatch.setattr(Contestant, "processes", noted)
    program = tmp_path / "llama-server"
    program.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path)), encoding="utf-8")
    program.chmod(0o755)
    command = ["--model", str(folder), "--no-float32", "--same", str(file), "--threads", "1"]
    compare.main([*command, "--llama-server", str(program), "--quick", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*-compare-*.json")
    assert path.name in capsys.readouterr().out
    assert len(seen) > 2
    assert not psutil.wait_procs(seen, timeout=20)[1], "they were stopped, and have ended all the same"
    text = path.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
    report = json.loads(text)
    rows = {row["name"]: row for row in report["rows"]}
    both = ["verbatim F32", "llama.cpp F32"]
    assert report["settings"]["llama.cpp"] == "1 (stand-in)"
    assert report["settings"]["llama.cpp uses"] == "AVX2 FMA"
    for row in ("decode, 1 stream", "decode, 8 streams", "memory when loaded", "memory after the run"):
        assert list(rows[row]["values"]) == both
        assert all(values["median"] > 0 for values in rows[row]["values"].values())
    assert rows["goal: decode, 1 stream: verbatim F32"]["ratio_of"] == "× llama.cpp F32, the same file"
    resident = rows["goal: resident memory: verbatim F32"]
    assert resident["ratio"]["median"] == pytest.approx(1, abs=0.5), "it is the same server"
    peak, stays = (rows["goal: peak memory: verbatim F32"]["values"][name]["median"] for name in ("peak", "resident"))
    assert peak >= stays


def test_a_program_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--llama-server: .*nowhere cannot be started"):
        rivals.version_of(tmp_path / "nowhere")


def test_a_server_whose_model_failed_is_not_waited_for(tmp_path: Path) -> None:
    """Its last words are what helps, and ten minutes later nobody reads them."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}", encoding="utf-8")
    with (
        pytest.raises(RuntimeError, match="did not start"),
        served.serve(broken, device="cpu", isolation="thread"),
    ):
        pytest.fail("it served nothing")
