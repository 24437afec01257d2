"""Decoding with and without draft tokens (`speculation: ngram`), on one model in one process, alternating.

    python benchmarks/speculation.py --model DIR [--tokens 96] [--repeat 5]

Repeating: temperature 0 after a prompt that repeats itself, where a model soon says the same again, also with random
weights. Plain: temperature 1, where nothing repeats but by chance. Both sides' replies are compared token by token.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder holds an engine.py that must not hide the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine, real_model
from benchmarks.common import RESULTS, alternate, ratios, summary
from benchmarks.report import Report
from engine import LLM

CASES: dict[str, dict[str, Any]] = {"repeating": {"temperature": 0}, "plain": {"temperature": 1.0}}


def measure(report: Report, llm: LLM, tokens: int, repeat: int) -> None:
    """Tokens per second after the first one, of both sides of each case."""
    replies: dict[tuple[str, int], dict[bool, tuple[int, ...]]] = {}

    def run(case: str, drafts: bool) -> Any:
        def once(number: int) -> float:
            llm.engine.speculates = drafts
            prompt = f"{number}: " + "def add(a, b):\n    return a + b\n\n" * 8
            began, ids = 0.0, []
            for output in llm.stream(prompt, max_tokens=tokens, ignore_eos=True, seed=number, **CASES[case]):
                began = began or time.perf_counter()
                ids += [token for delta in output.deltas for token in delta.token_ids]
            seconds = time.perf_counter() - began
            known = replies.setdefault((case, number), {})
            known[drafts] = tuple(ids)
            if len(set(known.values())) != 1:
                raise RuntimeError(f"{case}, repetition {number}: the replies differ")
            return (tokens - 1) / seconds

        return once

    for case in CASES:
        sides = {"with drafts": run(case, True), "without": run(case, False)}
        alternate(sides, 1, first=10_000)  # thrown away
        before = llm.engine.stats()
        found = alternate(sides, repeat)
        after = llm.engine.stats()
        drafted = after.drafted_tokens - before.drafted_tokens
        accepted = after.accepted_tokens - before.accepted_tokens
        gain = ratios(found["with drafts"], found["without"])
        least = 1.5 if case == "repeating" else 0.97
        report.add(
            f"decode, {case} text",
            "tokens/s",
            {name: summary(values) for name, values in found.items()},
            ratio=gain,
            ratio_of="of without",
            goal=f"at least {least}",
            met=gain["median"] >= least,
            note=f"{accepted} of {drafted} draft tokens were kept; the replies are the same.",
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=real_model.model, required=True, help="a folder with a checkpoint, or smollm2")
    parser.add_argument("--label")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.tokens, arguments.repeat = 40, 1
    llm = LLM(arguments.model, device="cpu", threads=arguments.threads, context_length=2048, speculation="ngram")
    report = Report(
        "speculation",
        arguments.label or arguments.model.resolve().name,
        machine.utc_now(),
        *machine.commit(),
        machine.describe(arguments.threads),
        {"tokens": arguments.tokens, "repeat": arguments.repeat},
        arguments.quick,
    )
    measure(report, llm, arguments.tokens, arguments.repeat)
    report.show()
    if arguments.out or not arguments.quick:
        print(report.write(arguments.out or RESULTS).name)


if __name__ == "__main__":
    main()
