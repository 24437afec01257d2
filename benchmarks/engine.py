"""This engine against plain transformers on one checkpoint: prefill, decode, prefix cache, memory, load time.

    python benchmarks/engine.py --model DIR [--threads N] [--repeat R] [--out DIR] [--label NAME] [--quick]

float32 on the CPU, both sides in processes of their own, alternating in one run. Measures no HTTP and no text.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this very file would hide the package `engine`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine, real_model
from benchmarks.common import RESULTS, Summary, alternate, fixed_prompt, ratios, summary
from benchmarks.report import Report
from benchmarks.worker import Worker
from engine.checkpoints.checkpoint import Checkpoint, inspect

OURS, PEER = "verbatim", "transformers"
SAMPLED = {"temperature": 0.8, "top_p": 0.95}


class Run:
    """One run: the workers, the settings, the report that grows."""

    def __init__(self, arguments: argparse.Namespace, found: Checkpoint, workers: dict[str, Worker]) -> None:
        self.found = found
        self.workers = workers
        self.imports: dict[str, int] = {}
        """Resident bytes of each side after its imports."""
        self.threads: int = arguments.threads
        self.repeat: int = arguments.repeat
        self.prompt_length: int = arguments.prompt
        self.short: int = arguments.short
        self.steps: int = arguments.steps
        self.streams: int = arguments.streams
        text = found.config.get("text_config", found.config)
        self.vocab_size = int(text["vocab_size"])
        commit, dirty = machine.commit()
        settings = {
            "repeat": self.repeat,
            "prefill_tokens": self.prompt_length,
            "decode_prompt_tokens": self.short,
            "decode_steps": self.steps,
            "streams": self.streams,
            "dtype": "float32",
            "stored_dtype": found.dtype,
            "parameters": found.parameters,
            "architecture": (found.config.get("architectures") or ["unknown"])[0],
        }
        label = arguments.label or arguments.model.resolve().name
        where, quick = machine.describe(self.threads), bool(arguments.quick)
        self.report = Report("engine", label, machine.utc_now(), commit, dirty, where, settings, quick)

    def fresh(self, length: int, use: str, number: int) -> list[int]:
        """A prompt for one use, the same for both sides; nothing of it was seen before, so no prefix cache knows it."""
        return fixed_prompt(length, self.vocab_size, zlib.crc32(f"{use} {number}".encode()))

    def measure(self, cases: dict[str, Callable[[int], float]]) -> dict[str, list[float]]:
        """Alternate after one repetition that is thrown away: caches, allocators and lazy kernels settle in it."""
        alternate(cases, 1, first=-1)
        return alternate(cases, self.repeat)

    def versus(self, values: dict[str, list[float]]) -> dict[str, Any]:
        """Ratio and goal of a row in which more is better and the peer is to be reached."""
        if PEER not in values:
            return {}
        ratio = ratios(values[OURS], values[PEER])
        return {"ratio": ratio, "ratio_of": f"× {PEER}", "goal": f"≥ 1 × {PEER}", "met": ratio["median"] >= 1}


def load(run: Run) -> None:
    """Load time and memory, once each: nothing of a second load would be cold."""
    # One after the other: the disk and both cores belong to whoever loads.
    answers = {name: worker.ask("load") for name, worker in run.workers.items()}
    if not answers[OURS]["law_holds"]:
        print("The law does not hold for this model on this machine: the numbers are those of a fallback.")
    run.report.settings.update({k: answers[OURS][k] for k in ("runner", "law_holds", "fingerprint")})
    run.report.add(
        "load",
        "s",
        {name: summary([a["seconds"]]) for name, a in answers.items()},
        note="from the folder to ready, imports excluded; verbatim's includes packing, hashing the files and the "
        "self-test. Once, and with the files possibly in the page cache.",
    )
    run.imports = {name: a["imports_rss"] for name, a in answers.items()}
    memory(run, "memory after load")


def memory(run: Run, name: str) -> None:
    """Resident memory beyond what the process had after its imports, and what it should be at most."""
    weights = run.found.float32_bytes()
    used = {who: worker.ask("memory") for who, worker in run.workers.items()}
    own = {who: m["rss"] - run.imports[who] for who, m in used.items()}
    run.report.add(
        name,
        "GiB resident",
        {who: summary([size / 2**30]) for who, size in own.items()},
        ratio=summary([own[OURS] / weights]),
        ratio_of="× float32 weights",
        note="own process each, beyond what libraries took ("
        + ", ".join(f"{who} {run.imports[who] / 2**30:.2g}" for who in used)
        + f" GiB). float32 weights: {weights / 2**30:.3g} GiB (a tied embedding once as packed float32, once as "
        "stored); verbatim holds the tokenizer and its tables besides. Peak of the whole process so far, GiB: "
        + ", ".join(f"{who} {m['peak'] / 2**30:.3g}" for who, m in used.items())
        + ".",
    )


def prefill(run: Run) -> None:
    n = run.prompt_length

    def case(worker: Worker) -> Callable[[int], float]:
        return lambda number: n / float(worker.ask("prefill", prompt=run.fresh(n, "prefill", number))["seconds"])

    values = run.measure({name: case(worker) for name, worker in run.workers.items()})
    run.report.add(
        f"prefill of {n:,} tokens",
        "tokens/s",
        {name: summary(v) for name, v in values.items()},
        **run.versus(values),
        note="verbatim: from add() to the first token, in chunks, sampler and scheduler included; transformers: the "
        "forward pass alone, with cache, logits of the last row.",
    )
    run.report.add(
        f"time to first token, {n:,} tokens", "s", {name: summary([n / r for r in v]) for name, v in values.items()}
    )


def decode(run: Run) -> None:
    """One sequence, many together, one with sampling; all alternating, so that their ratios hold, too."""
    bandwidth = machine.ReadBandwidth(run.threads)
    ids: dict[tuple[str, int], list[list[list[int]]]] = {}

    def case(name: str, count: int, sampling: dict[str, Any]) -> Callable[[int], float]:
        def once(number: int) -> float:
            prompts = [run.fresh(run.short, f"decode {count} {i} {sampling}", number) for i in range(count)]
            answer = run.workers[name].ask("decode", prompts=prompts, steps=run.steps, sampling=sampling)
            if not sampling:
                ids.setdefault((name, count), []).append(answer["ids"])
            return count * run.steps / float(answer["seconds"])

        return once

    cases: dict[str, Callable[[int], float]] = {"bandwidth": lambda _: bandwidth.measure()}
    for name in run.workers:
        cases[f"{name} 1"] = case(name, 1, {})
        cases[f"{name} many"] = case(name, run.streams, {})
    cases["sampled"] = case(OURS, 1, SAMPLED)
    values = run.measure(cases)

    single = {name: values[f"{name} 1"] for name in run.workers}
    run.report.add(
        "decode, 1 sequence",
        "tokens/s",
        {name: summary(v) for name, v in single.items()},
        **run.versus(single),
        note=f"greedy, after {run.short} prompt tokens, {run.steps} steps; {_agreement(ids, 1)}",
    )
    _bandwidth_rows(run, single[OURS], values["bandwidth"])
    together = {name: values[f"{name} many"] for name in run.workers}
    gain = ratios(together[OURS], single[OURS])
    many = {k: v for k, v in run.versus(together).items() if k in ("ratio", "ratio_of")}
    run.report.add(
        f"decode, {run.streams} sequences together",
        "tokens/s, sum",
        {name: summary(v) for name, v in together.items()},
        **many,
        note=_agreement(ids, run.streams),
    )
    run.report.add(
        f"{run.streams} sequences over one",
        "×",
        {OURS: gain} | ({PEER: ratios(together[PEER], single[PEER])} if PEER in together else {}),
        goal="≥ 4",
        met=gain["median"] >= 4,
    )
    run.report.add(
        "decode, 1 sequence, temperature 0.8, top_p 0.95",
        "tokens/s",
        {OURS: summary(values["sampled"])},
        ratio=ratios(values["sampled"], single[OURS]),
        ratio_of="× greedy",
        note=f"what is missing to 1 is the cost of drawing from {run.vocab_size:,} tokens.",
    )


def _bandwidth_rows(run: Run, decoded: list[float], measured: list[float]) -> None:
    found = run.found
    # Of the input embedding one row is read; tied, its float32 copy is the output layer, which is read whole.
    read = 4 * (found.parameters - (0 if found.tied else found.embedding_parameters))
    run.report.add("memory read bandwidth", "GB/s", {"measured": _scaled(summary(measured), 1e-9)})
    run.report.add(
        "share of it in decode, 1 sequence",
        "",
        {OURS: ratios([rate * read for rate in decoded], measured)},
        note=f"{read / 1e9:.3g} GB of weights a step × steps/s ÷ bandwidth of the same repetition; keys and values, "
        "which are read too, are not counted.",
    )


def _agreement(ids: dict[tuple[str, int], list[list[list[int]]]], count: int) -> str:
    """How many sequences both sides continued with the same tokens (float32 sums differ in their last bits)."""
    ours, peer = (ids.get((name, count)) for name in (OURS, PEER))
    if not ours or not peer:
        return "no peer."
    pairs = [(a, b) for x, y in zip(ours, peer, strict=True) for a, b in zip(x, y, strict=True)]
    return f"same tokens as transformers in {sum(a == b for a, b in pairs)} of {len(pairs)} sequences."


def _scaled(values: Summary, factor: float) -> Summary:
    return {key: value if key == "n" else value * factor for key, value in values.items()}


def prefix_cache(run: Run) -> None:
    """The same long prompt twice: the second finds its keys and values, all but the last token's."""
    n, worker = run.prompt_length, run.workers[OURS]
    cold, warm = [], []
    for number in range(run.repeat):
        prompt = run.fresh(n, "prefix", number)
        cold.append(float(worker.ask("prefill", prompt=prompt)["seconds"]))
        warm.append(float(worker.ask("prefill", prompt=prompt)["seconds"]))
    run.report.add(
        f"time to first token, {n:,} tokens, prefix cache",
        "s",
        {"cold": summary(cold), "warm": summary(warm)},
        ratio=ratios(warm, cold),
        ratio_of="× cold",
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=real_model.model, required=True, help="a folder with a checkpoint, or smollm2")
    parser.add_argument("--label", help="the model's name in the report; default: the folder's")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prefill")
    parser.add_argument("--short", type=int, default=64, help="prompt tokens before a decode")
    parser.add_argument("--steps", type=int, default=32, help="decode steps that are timed")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--alone", action="store_true", help="leave transformers out: a model that fits only once")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.repeat, arguments.prompt, arguments.short, arguments.steps, arguments.streams = 1, 64, 8, 4, 2
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    found = inspect(arguments.model, arguments.model.name)
    with contextlib.ExitStack() as stack:
        names = [OURS] if arguments.alone else [PEER, OURS]
        workers = {n: stack.enter_context(Worker(n, arguments.model.resolve(), arguments.threads)) for n in names}
        run = Run(arguments, found, workers)
        for part in (load, prefill, decode, prefix_cache):
            print(f"{part.__name__} …", file=sys.stderr, flush=True)
            part(run)
        memory(run, "memory after the run")
    run.report.show()
    if arguments.out or not arguments.quick:
        print(run.report.write(arguments.out or RESULTS).name)


if __name__ == "__main__":
    main()
