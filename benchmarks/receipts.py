"""What receipts cost and what checking them takes, on one model in one process, alternating.

    python benchmarks/receipts.py --model DIR [--tokens 512] [--repeat 5]

Checking: a reply of `--tokens` tokens is generated with a receipt, then verified, whose cost is that of reading it.
Recording: decoding with and without a receipt. Margins: the same with margins. Prediction: decoding with the reply
itself as the prediction, and with one in which every twentieth token is another.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder holds an engine.py that must not hide the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine, real_model
from benchmarks.common import RESULTS, alternate, fixed_prompt, ratios, summary
from benchmarks.report import Report
from engine import LLM
from engine.receipts.receipt import Receipt
from engine.receipts.recorder import Recorder, recorded
from engine.types.requests import GenerationRequest, PreparedRequest
from engine.verification import check_receipt

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
PROMPT = 64
_SHORT = 128
"""Tokens of the replies in which rates are compared."""


class Bench:
    """One model, its requests and its receipts."""

    def __init__(self, llm: LLM, tokens: int) -> None:
        self.llm, self.tokens = llm, tokens
        self.receipts: dict[int, Receipt] = {}
        self.replies: dict[int, tuple[int, ...]] = {}

    def request(self, number: int, **sampling: Any) -> GenerationRequest:
        prompt = tuple(fixed_prompt(PROMPT, self.llm.info.vocab_size * 9 // 10, number))
        given = {"max_tokens": self.tokens, "ignore_eos": True, "seed": number, "temperature": 1.0, **sampling}
        return GenerationRequest(request_id=f"r{number}", prompt_token_ids=prompt, sampling=given)

    def run(self, prepared: PreparedRequest, recorder: Recorder | None = None) -> float:
        """Generate. Returns tokens per second after the first one."""
        engine, began, ids = self.llm.engine, 0.0, []
        engine.add(prepared)
        while engine.has_work:
            for output in engine.step():
                assert output.error is None, output.error
                began = began or time.perf_counter()
                ids += [token for delta in output.deltas for token in delta.token_ids]
                if recorder is not None:
                    recorder.add(output)
        seconds = time.perf_counter() - began
        self.replies[int(prepared.request_id[1:])] = tuple(ids)
        return (len(ids) - 1) / max(seconds, 1e-9)

    def plain(self, number: int) -> float:
        return self.run(self.llm.engine.prepare(self.request(number)))

    def with_margins(self, number: int) -> float:
        return self.run(self.llm.engine.prepare(self.request(number, margins=True)))

    def with_receipt(self, number: int) -> float:
        request = recorded(self.request(number), self.llm.info, NOW)
        prepared = self.llm.engine.prepare(request)
        recorder = Recorder(request, prepared, self.llm.info, id=f"r{number}", created=0)
        rate = self.run(prepared, recorder)
        self.receipts[number] = recorder.receipt()
        return rate

    def generating(self, number: int) -> float:
        """Seconds for a whole reply with its receipt, the prompt included."""
        began = time.perf_counter()
        self.with_receipt(number)
        return time.perf_counter() - began

    def verifying(self, number: int) -> float:
        began = time.perf_counter()
        report = check_receipt(self.llm, self.receipts[number])
        seconds = time.perf_counter() - began
        if report.verdict != "identical":
            raise RuntimeError(f"repetition {number}: {report.verdict}: {report.sentence}")
        return seconds

    def predicted(self, change_every: int) -> Callable[[int], float]:
        def once(number: int) -> float:
            reply = self.replies[number]
            vocab = self.llm.info.vocab_size * 9 // 10
            tokens = [(t + 1) % vocab if change_every and i % change_every == 7 else t for i, t in enumerate(reply)]
            prepared = self.llm.engine.prepare(self.request(number))
            rate = self.run(dataclasses.replace(prepared, prediction=tuple(tokens)))
            if self.replies[number] != reply:
                raise RuntimeError(f"repetition {number}: a prediction changed the reply")
            return rate

        return once


def measure(report: Report, bench: Bench, repeat: int) -> None:
    """All rows. The prefix cache is off, so nothing is found that an earlier repetition computed."""
    bench.generating(10_000)  # thrown away
    bench.verifying(10_000)
    took = [(bench.generating(number), bench.verifying(number)) for number in range(repeat)]
    share = ratios([verify for _, verify in took], [generate for generate, _ in took])
    report.add(
        f"checking a reply of {bench.tokens} tokens",
        "s",
        {"generate": summary([g for g, _ in took]), "verify": summary([v for _, v in took])},
        ratio=share,
        ratio_of="of generating",
        goal="at most 0.2",
        met=share["median"] <= 0.2,
        note="one stream; every check says: identical.",
    )
    bench.tokens = min(bench.tokens, _SHORT)
    sides = {"with a receipt": bench.with_receipt, "with margins": bench.with_margins, "without": bench.plain}
    alternate(sides, 1, first=20_000)
    found = alternate(sides, repeat)
    gain = ratios(found["with a receipt"], found["without"])
    report.add(
        "decode, recorded",
        "tokens/s",
        {name: summary(values) for name, values in found.items()},
        ratio=gain,
        ratio_of="of without",
        goal="at least 0.99",
        met=gain["median"] >= 0.99,
    )
    cases = {"none": bench.plain, "right": bench.predicted(0), "1 in 20 wrong": bench.predicted(20)}
    for number in range(repeat):
        bench.plain(number)
    found = alternate(cases, repeat)
    gain = ratios(found["right"], found["none"])
    report.add(
        "decode, predicted",
        "tokens/s",
        {name: summary(values) for name, values in found.items()},
        ratio=gain,
        ratio_of="right, of none",
        note="temperature 1; the replies are the same.",
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=real_model.model, required=True, help="a folder with a checkpoint, or smollm2")
    parser.add_argument("--label")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quantization", choices=["int8"])
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.tokens, arguments.repeat = 24, 1
    how: dict[str, Any] = {"quantization": arguments.quantization} if arguments.quantization else {}
    llm = LLM(arguments.model, device="cpu", threads=arguments.threads, context_length=2048, prefix_cache=False, **how)
    report = Report(
        "receipts",
        (arguments.label or arguments.model.resolve().name) + ("-int8" if arguments.quantization else ""),
        machine.utc_now(),
        *machine.commit(),
        machine.describe(arguments.threads),
        {"tokens": arguments.tokens, "repeat": arguments.repeat, "quantization": arguments.quantization},
        arguments.quick,
    )
    measure(report, Bench(llm, arguments.tokens), arguments.repeat)
    report.show()
    if arguments.out or not arguments.quick:
        print(report.write(arguments.out or RESULTS).name)


if __name__ == "__main__":
    main()
