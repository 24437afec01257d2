"""What a graphics card does with this engine: which models keep the law, and how fast it is beside transformers.

    python benchmarks/gpu.py --model DIR            a checkpoint on cuda, and tiny models of every family
    python benchmarks/gpu.py --model DIR --device cpu --quick       the same steps without a card

Each family is loaded as a server would load it; its own self-test says whether the law holds, and the row says what was
found beside it: whether a reply alone has the bits of the same reply in a crowd. A family that fails to load says why.
Speeds: both sides in this process, one after the other, alternating; tokens per second, the card's own dtype.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder holds files that must not hide packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import machine, real_model
from benchmarks.common import RESULTS, alternate, fixed_prompt, ratios, summary
from benchmarks.contestants import Contestant, Ours, Transformers
from benchmarks.report import Report
from engine import LLM, VerbatimError
from engine.checkpoints.checkpoint import inspect
from tests.tiny_models import FAMILIES, write

NEIGHBOURS = 6


def law_of(folder: Path, device: str, dtype: str, times: int = 4, cache: str = "64MiB") -> dict[str, Any]:
    """How one model is served, and whether a reply to a prompt (repeated `times`) has the same bits beside others."""
    prompt = "The bits of a reply depend on the seed. " * times
    try:
        llm = LLM(folder, device=device, dtype=dtype, context_length=1024, cache_size=cache, prefix_cache=False)
        alone = _bits(llm, prompt)
        for i in range(NEIGHBOURS):
            _bits(llm, f"neighbour {i} " * (1 + 9 * i), wait=False)
        crowded = _bits(llm, prompt)
    except VerbatimError as error:
        return {"error": error.message[:300]}
    except Exception as error:  # a fault of this path on this card is what is looked for
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    law = llm.info.law
    return {
        "runner": llm.info.runner,
        "linear": llm.info.linear,
        "law": law.holds,
        "reason": (law.reason or "")[:200],
        "checks": dict(law.checks),
        "same bits in a crowd": alone == crowded,
    }


def _bits(llm: LLM, prompt: str, *, wait: bool = True) -> Any:
    stream = llm.stream(prompt, max_tokens=24, seed=5, temperature=0.8, logprobs=True, ignore_eos=True)
    first = next(stream)
    if not wait:
        _OPEN.append(stream)
        return None
    outputs = [first, *stream]
    return [
        (entry.token_id, entry.logprob.hex())
        for output in outputs
        for delta in output.deltas
        for entry in delta.logprobs or ()
    ]


_OPEN: list[Any] = []
"""Neighbours that are still being written while a reply is."""


def laws(report: Report, device: str, quick: bool) -> None:
    """A row for each family and dtype: 1 where the law is claimed and the bits were the same."""
    for family in ("llama", "bloom") if quick else FAMILIES:
        for dtype in ("float32",) if quick else ("bfloat16", "float32"):
            with tempfile.TemporaryDirectory() as folder:
                found = law_of(write(Path(folder), family), device, dtype)
            _OPEN.clear()
            print(f"{family}, {dtype}: {json.dumps(found)}", file=sys.stderr, flush=True)
            holds = bool(found.get("law")) and bool(found.get("same bits in a crowd"))
            report.add(f"law: {family}, {dtype}", "", {"verbatim": summary([float(holds)])}, note=json.dumps(found))


def speeds(report: Report, arguments: argparse.Namespace) -> None:
    """Prompt and decode speed of the checkpoint, both sides."""
    found = law_of(arguments.model, arguments.device, "auto", times=4 if arguments.quick else 60, cache="2GiB")
    _OPEN.clear()
    report.add("law: the checkpoint", "", {"verbatim": summary([float(found.get("same bits in a crowd", False))])})
    report.settings["law"] = found
    vocab = int(inspect(arguments.model, "model").config["vocab_size"])
    sides: dict[str, Contestant] = {
        "transformers": Transformers(arguments.model, arguments.threads, arguments.device),
        "verbatim": Ours(arguments.model, arguments.threads, arguments.device),
    }
    loaded = {name: side.load() for name, side in sides.items()}
    report.settings.update({key: loaded["verbatim"][key] for key in ("runner", "law_holds", "fingerprint")})
    report.add("load", "s", {name: summary([answer["seconds"]]) for name, answer in loaded.items()})
    prompt, steps = arguments.prompt, arguments.steps

    def prefill(side: Contestant) -> Any:
        return lambda number: prompt / side.prefill(fixed_prompt(prompt, vocab, 100 + number))["seconds"]

    def decode(side: Contestant, streams: int) -> Any:
        def once(number: int) -> float:
            prompts = [fixed_prompt(64, vocab, 1000 * streams + 50 * number + i) for i in range(streams)]
            return float(streams * steps / side.decode(prompts, steps, {})["seconds"])

        return once

    cases = {f"prefill of {prompt:,} tokens": prefill}
    for streams in (1, 8):
        cases[f"decode, {streams} streams"] = lambda side, streams=streams: decode(side, streams)  # type: ignore[misc]
    for name, case in cases.items():
        runs = {who: case(side) for who, side in sides.items()}
        alternate(runs, 1, first=-1)
        values = alternate(runs, arguments.repeat)
        report.add(
            name,
            "tokens/s",
            {who: summary(v) for who, v in values.items()},
            ratio=ratios(values["verbatim"], values["transformers"]),
            ratio_of="× transformers",
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=real_model.model, required=True, help="a folder with a checkpoint, or smollm2")
    parser.add_argument("--label", help="the model's name in the report; default: the folder's")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prefill")
    parser.add_argument("--steps", type=int, default=48, help="decode steps that are timed")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.prompt, arguments.steps, arguments.repeat = 32, 4, 1
    commit, dirty = machine.commit()
    where = machine.describe(arguments.threads)
    settings = {"device": arguments.device, "card": _card(arguments.device), "cuda": str(torch.version.cuda)}
    label = arguments.label or arguments.model.resolve().name
    report = Report("gpu", label, machine.utc_now(), commit, dirty, where, settings, bool(arguments.quick))
    laws(report, arguments.device, arguments.quick)
    speeds(report, arguments)
    report.show()
    if arguments.out or not arguments.quick:
        print(report.write(arguments.out or RESULTS).name)


def _card(device: str) -> str:
    return "none" if device == "cpu" else torch.cuda.get_device_name(device)


if __name__ == "__main__":
    main()
