"""Is a changed receipt found, and is an honest one from another machine let pass?

    python benchmarks/tampering.py --model DIR [--count 1000] [--tokens 32]

Tampering: receipts with one change each: a token, a bias, the temperature by 0.01, the seed, the name of another
quantisation, one bit of a weight's digest. Each change is made twice: as it stands, and by a forger who computes digest
and fingerprint again, against whom only the recomputation helps (and the signature, which is not used here). None may
be called identical unless the change made no difference to any drawn number: such a receipt tells the truth.

Honest: the same receipts checked by other ways to compute, each in a process of its own: without compiled kernels, on
one thread, with AVX2 instead of wider vectors, and with int8 weights (another model in all but name, told apart).

Margins: of every token the margin under float32, and whether another way draws another token there. The area under the
ROC curve (AUC) says how well small margins foretell flips: 1 is perfect, 0.5 is chance.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder holds an engine.py that must not hide the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine, real_model
from benchmarks.common import RESULTS, ROOT, child_environment, summary
from benchmarks.report import Report
from engine import LLM, ChatMessage, VerbatimError
from engine.receipts.canonical import canonical, digest_of_ids, sha256
from engine.receipts.check import ReceiptCheck
from engine.receipts.reading import read_receipt
from engine.receipts.receipt import Receipt
from engine.receipts.recorder import Recorder, recorded
from engine.types.fingerprint_parts import fingerprint_of
from engine.types.requests import GenerationRequest
from engine.verification import check_receipt

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
FORMS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 50},
    {"temperature": 1.0, "frequency_penalty": 0.4},
    {"temperature": 0.0},
]
WAYS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "no kernels": ({"VERBATIM_BENCH_NO_KERNELS": "1"}, {}),
    "1 thread": ({}, {"threads": 1}),
    "AVX2": ({"ATEN_CPU_CAPABILITY": "avx2"}, {}),
    "int8": ({}, {"quantization": "int8"}),
}
Change = Callable[[dict[str, Any], random.Random], None]


def _token(data: dict[str, Any], rng: random.Random) -> None:
    choice = data["choices"][0]
    place = rng.randrange(len(choice["token_ids"]))
    choice["token_ids"][place] = (choice["token_ids"][place] + 1 + rng.randrange(500)) % 20_000
    choice["sha256"] = digest_of_ids(choice["token_ids"])


def _bias(data: dict[str, Any], rng: random.Random) -> None:
    token = rng.choice(data["choices"][0]["token_ids"])
    data["request"]["sampling"]["logit_bias"] = {str(token): rng.choice((-1.0, 0.5, 2.0))}


def _temperature(data: dict[str, Any], rng: random.Random) -> None:
    data["request"]["sampling"]["temperature"] += 0.01


def _seed(data: dict[str, Any], rng: random.Random) -> None:
    data["request"]["sampling"]["seed"] = int(data["request"]["sampling"]["seed"]) + 1


def _quantisation(data: dict[str, Any], rng: random.Random) -> None:
    data["environment"]["parts"]["linear"] = "native int8"


def _weight(data: dict[str, Any], rng: random.Random) -> None:
    entry = rng.choice(data["model"]["resources"])
    entry["digest"] = entry["digest"][:-1] + f"{int(entry['digest'][-1], 16) ^ 1:x}"


CHANGES: dict[str, Change] = {
    "a token": _token,
    "a bias": _bias,
    "temperature by 0.01": _temperature,
    "the seed": _seed,
    "another quantisation": _quantisation,
    "a weight's bit": _weight,
}


def forged(data: dict[str, Any]) -> dict[str, Any]:
    """What a forger makes of changed data: digests and fingerprint fit again."""
    parts = data["environment"]["parts"]
    data["environment"]["fingerprint"] = fingerprint_of(parts, "vb-")
    content = {key: value for key, value in data.items() if key != "digest"}
    return {**content, "digest": sha256(canonical(content))}


def verdict(llm: LLM, data: dict[str, Any]) -> str:
    try:
        return check_receipt(llm, read_receipt(json.dumps(data).encode())).verdict
    except VerbatimError:  # it cannot even be read
        return "not_checkable"


def write(llm: LLM, count: int, tokens: int) -> list[Receipt]:
    """Receipts of different requests, with margins."""
    made = []
    for number in range(count):
        subject = ("the sea", "bread", "winter", "glass")[number % 4]
        text = f"Tell me {number % 9 + 2} things about {subject}, number {number}."
        given = {"max_tokens": tokens, "seed": number, "margins": True, **FORMS[number % len(FORMS)]}
        request = recorded(
            GenerationRequest(request_id=f"r{number}", messages=(ChatMessage("user", text),), sampling=given),
            llm.info,
            NOW,
        )
        prepared = llm.engine.prepare(request)
        recorder = Recorder(request, prepared, llm.info, id=f"r{number}", created=0)
        llm.engine.add(prepared)
        while llm.engine.has_work:
            for output in llm.engine.step():
                recorder.add(output)
        made.append(recorder.receipt())
    return made


def elsewhere(folder: Path, receipts: list[Receipt], way: str, scratch: Path) -> list[dict[str, Any]]:
    """Check receipts in a process that computes in another way."""
    environment, options = WAYS[way]
    source = scratch / "receipts.jsonl"
    source.write_bytes(b"\n".join(receipt.to_bytes() for receipt in receipts))
    told = ["--model", str(folder), "--elsewhere", str(source), "--options", json.dumps(options)]
    done = subprocess.run(
        [sys.executable, __file__, *told], capture_output=True, text=True, cwd=ROOT, timeout=3600, check=False,
        env=child_environment(**environment),
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check_elsewhere(folder: Path, source: Path, options: dict[str, Any]) -> None:
    """In the child: print a report a receipt, with the positions at which another token is drawn."""
    if os.environ.get("VERBATIM_BENCH_NO_KERNELS"):
        from engine.compute.cpu import kernels

        def none(*_: Any, **__: Any) -> Any:
            raise kernels.NoKernels("a benchmark leaves them out")

        kernels.Kernels.load = none  # type: ignore[method-assign]
    llm = LLM(folder, device="cpu", context_length=2048, **options)
    for line in source.read_bytes().splitlines():
        receipt = read_receipt(line)
        report = check_receipt(llm, receipt)
        told = {"verdict": report.verdict, "flips": flips(llm, receipt), "sentence": report.sentence}
        print(json.dumps(told), flush=True)


def flips(llm: LLM, receipt: Receipt) -> list[int]:
    """Positions of the first choice at which this engine draws another token than the receipt holds."""
    check = ReceiptCheck(receipt, llm.info)
    request = check.request("flips")
    if request is None:
        return []
    prepared = check.prepared(llm.engine.prepare(request))
    if prepared is None:
        return []
    llm.engine.add(prepared)
    found = []
    while llm.engine.has_work:
        for output in llm.engine.step():
            found += [one.drawn != one.expected for delta in output.deltas for one in delta.checks]
    return [position for position, other in enumerate(found) if other]


def auc(margins: list[float], flipped: list[bool]) -> float | None:
    """The probability that a flipped token's margin is smaller than one of a token that stays; ties count half."""
    order = sorted(range(len(margins)), key=margins.__getitem__)
    yes = sum(flipped)
    if not yes or yes == len(flipped):
        return None
    rank = sum(i + 1 for i, at in enumerate(order) if flipped[at])
    above = rank - yes * (yes + 1) / 2  # pairs in which the flipped one has the larger margin
    return 1 - above / (yes * (len(flipped) - yes))


def measure(report: Report, folder: Path, count: int, tokens: int) -> None:
    llm = LLM(folder, device="cpu", context_length=2048)
    kinds = max(count // (2 * len(CHANGES)), 1)
    receipts = write(llm, kinds, tokens)
    honest = Counter(check_receipt(llm, receipt).verdict for receipt in receipts)
    report.add(
        "untouched", "receipts", {v: summary([n]) for v, n in honest.items()},
        goal="all identical", met=set(honest) == {"identical"},
    )  # fmt: skip
    rng = random.Random(0)
    for name, change in CHANGES.items():
        for forger in (False, True):
            verdicts: Counter[str] = Counter()
            for receipt in receipts:
                data = copy.deepcopy(receipt.to_json())
                change(data, rng)
                verdicts[verdict(llm, forged(data) if forger else data)] += 1
            report.add(
                f"{name}, {'with digests made to fit' if forger else 'as it stands'}",
                "receipts",
                {v: summary([n]) for v, n in verdicts.items()},
                goal="none identical" if not forger else "",
                met=None if forger else not verdicts["identical"],
            )
            print(name, forger, dict(verdicts), file=sys.stderr, flush=True)
    del llm
    with tempfile.TemporaryDirectory() as scratch:
        for way in WAYS:
            found = elsewhere(folder, receipts, way, Path(scratch))
            verdicts = Counter(one["verdict"] for one in found)
            margins, flipped = [], []
            for receipt, one in zip(receipts, found, strict=True):
                for position, margin in enumerate(receipt.choices[0].margins or ()):
                    if margin is not None:
                        margins.append(margin)
                        flipped.append(position in one["flips"])
            area = auc(margins, flipped)
            known = {v: summary([n]) for v, n in verdicts.items()} | {"tokens that flip": summary([sum(flipped)])}
            if area is not None:
                known["AUC"] = summary([area])
            rounding = way != "int8"
            report.add(
                f"honest, {way}", "receipts", known, goal="none refuted" if rounding else "",
                met=not verdicts["refuted"] if rounding else None, note=f"{len(margins)} tokens",
            )  # fmt: skip
            print(way, dict(verdicts), sum(flipped), area, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=real_model.model, required=True, help="a folder with a checkpoint, or smollm2")
    parser.add_argument("--label")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--elsewhere", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, default={}, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.elsewhere:
        check_elsewhere(arguments.model, arguments.elsewhere, arguments.options)
        return
    if arguments.quick:
        arguments.count, arguments.tokens = 24, 12
    report = Report(
        "tampering",
        arguments.label or arguments.model.resolve().name,
        machine.utc_now(),
        *machine.commit(),
        machine.describe(None),
        {"count": arguments.count, "tokens": arguments.tokens},
        arguments.quick,
    )
    measure(report, arguments.model, arguments.count, arguments.tokens)
    report.show()
    if arguments.out or not arguments.quick:
        print(report.write(arguments.out or RESULTS).name)
    if any(row.met is False for row in report.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
