"""The parts of `benchmarks/gpu_report.py`, each run in a process of its own: one that crashes costs no other.

python -m benchmarks.gpu_parts PART OUT SETTINGS        what was found, as JSON, is written to OUT
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, alternate, fixed_prompt, ratios, summary

Settings = dict[str, Any]
"""`device`, `quick`, `model` (a folder, or empty), `threads`."""

_REFERENCE = "engine.compute.cuda.reference:TorchOperations"
_SHAPE_06B = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""Qwen3-0.6B's: what is measured where no checkpoint is given, with random weights."""


def card(settings: Settings) -> dict[str, Any]:
    """Name the card, its memory and its software, and how fast it copies."""
    import torch

    from engine.loading.gpu.card import card_of

    device = torch.device(settings["device"])
    found = {k: v for k, v in dataclasses.asdict(card_of(settings["device"])).items() if k != "checks"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "processors": properties.multi_processor_count,
            "cards": torch.cuda.device_count(),
            "cuda": str(torch.version.cuda),
        }
    return {**found, "copy_bytes_per_second": _copy_speed(device, settings["quick"])}


def _copy_speed(device: Any, quick: bool) -> float:
    """Bytes read and written a second by a copy of one GiB, the best of five: what decoding is measured against."""
    import torch

    source = torch.ones(2**20 if quick else 2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def probe(settings: Settings) -> dict[str, Any]:
    """Make the checks of `verbatim gpu-probe`; on a CPU a rehearsal of them with torch's operations."""
    from engine import probe_gpu

    on_cpu = settings["device"] == "cpu"
    probed = probe_gpu(settings["device"], **({"operations": _REFERENCE} if on_cpu else {}))
    failed = [check for check in probed.verdict.checks if check.state == "failed"]
    return {**dataclasses.asdict(probed.verdict), "well": not failed}


def tests(settings: Settings) -> dict[str, Any]:
    """Run the tests that need a GPU."""
    where = ["tests/engine/sampling/test_sampler.py"] if settings["quick"] else []
    return _pytest(["-m", "gpu", *where], settings)


def invariants(settings: Settings) -> dict[str, Any]:
    """Run the law's own tests. A model is computed on a GPU wherever there is one."""
    few = ["-k", "llama and short and crowd"] if settings["quick"] else []
    return _pytest(["tests/engine/test_invariants.py", *few], settings)


def _pytest(arguments: list[str], settings: Settings) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", "-rfE", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    last = [line for line in done.stdout.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s|no tests ran", line)]
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
    good = done.returncode in (0, 5)  # 5: nothing was to be run
    tail = "" if good else (done.stdout + done.stderr)[-3000:]
    return {"well": good, "summary": last[-1].strip("= ") if last else "", "failed": failed, "tail": tail}


def tune(settings: Settings) -> dict[str, Any]:
    """Time the tiles of the linear kernel."""
    import torch

    from benchmarks import gpu_tune
    from engine.compute.cuda import tiles

    device = torch.device(settings["device"])
    if device.type == "cpu":
        from engine.compute.cuda.reference import TorchOperations

        reference = TorchOperations()
        return gpu_tune.tune(device, lambda x, w, to, tile: reference.linear(x, w, to), "ampere", quick=True)
    from engine.compute.cuda.kernels.linear import linear

    family = tiles.family(torch.cuda.get_device_capability(device))
    if family is None:
        raise SystemExit("the kernels are not made for this card")
    with torch.cuda.device(device):
        return gpu_tune.tune(device, linear, family, quick=settings["quick"])


def bench(settings: Settings) -> dict[str, Any]:
    """Measure this engine beside transformers: decode of 1, 8 and 16 streams, a prompt, and the share of bandwidth."""
    from benchmarks.contestants import Ours, Transformers
    from engine.checkpoints.checkpoint import inspect

    with tempfile.TemporaryDirectory() as folder:
        model = Path(settings["model"]) if settings["model"] else _written(Path(folder), settings["quick"])
        config = inspect(model, "model").config
        sides: dict[str, Any] = {}
        faults: dict[str, str] = {}
        loaded: dict[str, Any] = {}
        for name, kind in (("verbatim", Ours), ("transformers", Transformers)):
            try:
                sides[name] = kind(model, settings["threads"], settings["device"])
                loaded[name] = sides[name].load()
            except Exception as error:  # the other side is measured all the same
                faults[name] = f"{type(error).__name__}: {error}"[:300]
                sides.pop(name, None)
        rows = _measured(sides, int(config["vocab_size"]), settings, faults)
        shape = "a tiny model" if settings["quick"] else "Qwen3-0.6B's shape"
        found = {"model": Path(settings["model"]).name if settings["model"] else f"{shape}, random weights"}
        return {**found, "loaded": loaded, "faults": faults, "rows": rows, "weight_bytes": _weights_read(model)}


def _written(folder: Path, quick: bool) -> Path:
    from tests.tiny_models import write

    return write(folder, "qwen3", **({} if quick else {**_SHAPE_06B, "scale": 0.02}))


def _weights_read(model: Path) -> int:
    """Bytes of weights that a decode step reads: all that are stored, as if it read a whole embedding, too."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def _measured(sides: dict[str, Any], vocab: int, settings: Settings, faults: dict[str, str]) -> list[dict[str, Any]]:
    prompt, steps, repeat = (32, 4, 1) if settings["quick"] else (1024, 64, 5)
    cases: list[tuple[str, Callable[[Any, int], float]]] = [
        (
            f"prompt of {prompt:,} tokens",
            lambda side, number: prompt / side.prefill(fixed_prompt(prompt, vocab, 100 + number))["seconds"],
        )
    ]
    for streams in (1, 8, 16):

        def decode(side: Any, number: int, streams: int = streams) -> float:
            prompts = [fixed_prompt(64, vocab, 1000 * streams + 50 * number + i) for i in range(streams)]
            return float(streams * steps / side.decode(prompts, steps, {})["seconds"])

        cases.append((f"decode, {streams} streams", decode))
    rows = []
    for name, case in cases:
        runs = {who: (lambda number, side=side, case=case: case(side, number)) for who, side in sides.items()}
        try:
            alternate(runs, 1, first=-1)
            values = alternate(runs, repeat)
        except Exception as error:  # the other cases are measured all the same
            faults[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        row: dict[str, Any] = {"name": name, "values": {who: summary(found) for who, found in values.items()}}
        if {"verbatim", "transformers"} <= values.keys():
            row["ratio"] = ratios(values["verbatim"], values["transformers"])
        rows.append(row)
    return rows


PARTS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "card": card,
    "probe": probe,
    "tests": tests,
    "invariants": invariants,
    "tune": tune,
    "bench": bench,
}
"""In the order in which they are run."""


def main() -> None:
    name, out, settings = sys.argv[1:]
    Path(out).write_text(json.dumps(PARTS[name](json.loads(settings))), encoding="utf-8")


if __name__ == "__main__":
    main()
