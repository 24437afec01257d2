"""`verbatim gpu-probe`: its exit codes, its table, its JSON; the checks themselves are stood in for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from engine import GRAPH, GpuCheck, GpuVerdict, Probed
from server import cli, gpu_probe

NAMES = ("device", "triton", "linear", GRAPH, "linear int4")


def _verdict(**failed: str) -> GpuVerdict:
    """A verdict in which the named checks failed (`linear_int4` for `linear int4`), with a sentence each."""
    given = {name.replace("_", " "): detail for name, detail in failed.items()}
    checks = tuple(GpuCheck(n, "failed" if n in given else "ok", given.get(n, "")) for n in NAMES)
    return GpuVerdict(gpu="NVIDIA Made Up", driver="580.1", checks=checks)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`probe(verdict, *arguments)`: what the command does when that is found."""
    kept: list[Probed] = []

    def run(verdict: GpuVerdict, *arguments: str) -> Any:
        devices: list[str] = []

        def stand_in(device: str, *, progress: Any) -> Probed:
            devices.append(device)
            progress("GPU check: [linear]")
            return Probed(verdict, lasting=True)

        monkeypatch.setattr(gpu_probe, "probe_gpu", stand_in)
        monkeypatch.setattr(gpu_probe, "keep_verdict", kept.append)
        result = CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["gpu-probe", *arguments])
        return result, devices, kept

    return run


@pytest.mark.parametrize(
    ("verdict", "code", "words"),
    [
        (_verdict(), 0, "All is well"),
        (_verdict(linear="Wrong numbers [1]; write gpu: no-kernels."), 1, "Models are computed by torch"),
        (_verdict(**{GRAPH: "Other bits."}), 1, "launched one by one"),
        (_verdict(linear_int4="Wrong numbers."), 1, "a kind of weight is not"),
        (GpuVerdict(checks=(GpuCheck("device", "failed", "There is no NVIDIA driver here."),)), 2, "no GPU to try"),
        (GpuVerdict(), 2, "no GPU to try"),
    ],
)
def test_the_exit_code_and_what_it_means(probe: Any, verdict: GpuVerdict, code: int, words: str) -> None:
    result, devices, kept = probe(verdict)
    assert result.exit_code == code
    assert words in result.stdout
    for check in verdict.checks:
        assert check.name in result.stdout
        assert check.detail in result.stdout
    assert devices == ["cuda:0"]
    assert [probed.verdict for probed in kept] == [verdict], "the next start does not try again"


def test_json_is_one_object(probe: Any) -> None:
    result, _, _ = probe(_verdict(triton="Triton cannot be imported."), "--json", "--device", "cuda:3")
    said = json.loads(result.stdout)
    assert said["gpu"] == "NVIDIA Made Up"
    assert said["well"] is False
    assert {"name": "triton", "state": "failed", "detail": "Triton cannot be imported."} in said["checks"]
    assert result.exit_code == 1


@pytest.mark.parametrize(("given", "device"), [("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_the_device_is_passed_on(probe: Any, given: str, device: str) -> None:
    assert probe(_verdict(), "--device", given)[1] == [device]


@pytest.mark.parametrize("given", ["cpu", "gpu:0", "cuda:x", "cuda:-1", "0"])
def test_another_device_is_refused_by_name(probe: Any, given: str) -> None:
    result, devices, _ = probe(_verdict(), "--device", given)
    assert result.exit_code == 2
    assert f"{given} is no GPU" in result.stderr
    assert not devices


@pytest.mark.slow
def test_the_command_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """With a GPU or without, it ends with a table and one of its codes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["gpu-probe"])
    assert result.exit_code in (gpu_probe.WELL, gpu_probe.FAILED, gpu_probe.NO_GPU), result.exception
    for name in ("device", "C compiler", "Python.h", "attention", GRAPH):
        assert name in result.stdout
