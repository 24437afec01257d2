"""What rounding costs: next-token distributions of `quantization: int8` against float32, on real text, teacher-forced.

    python benchmarks/quality.py                          the demo model, on conversations that it was not trained on
    python benchmarks/quality.py --model DIR [--text FILE …]     a checkpoint, on text (default: these documents)

Every position of a text is a sample: the Kullback-Leibler divergence from float32's distribution to the rounded one's,
whether the likeliest token is the same, and both perplexities. With random weights the text is noise to the model, its
distributions are nearly flat, and the figures say little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder holds files that must not hide packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks import machine, real_model
from benchmarks.common import RESULTS, ROOT, Summary, summary
from benchmarks.report import Report
from engine.config import ModelConfig
from engine.loading.loader import load
from engine.model import LoadedModel
from engine.scheduling.schedule import Chunk, Schedule
from engine.scheduling.sequence import Sequence
from engine.types.sampling_params import SamplingParams

DEMO = ROOT / "demo" / "model"
_PART = 64


def logits_of(model: LoadedModel, tokens: tuple[int, ...]) -> Iterator[Tensor]:
    """The logits of every position, `[up to 64, vocab]` at a time, by the runner that serves requests."""
    sequence = Sequence("quality", 0, tokens, SamplingParams(max_tokens=1), 0)
    pool = model.scheduler.pool
    sequence.block_table = pool.allocate(pool.blocks_for(len(tokens)), sequence)
    for start in range(0, len(tokens), _PART):
        part = tokens[start : start + _PART]
        # As if all but the first were draft tokens: then every row has logits.
        chunk = Chunk(sequence, start, len(part), samples=True, draft=part[1:], num_rows=len(part))
        yield model.runner.forward(Schedule([chunk])).logits
    pool.release(sequence.block_table, sequence)


class Comparison:
    """Two models over the same texts: a value a position."""

    def __init__(self) -> None:
        self.divergence: list[Tensor] = []
        self.same: list[Tensor] = []
        self.surprise: dict[str, list[Tensor]] = {"float32": [], "int8": []}

    def add(self, exact: LoadedModel, rounded: LoadedModel, tokens: tuple[int, ...]) -> None:
        """`tokens`: one text. The last position has nothing to be compared with a truth, and is left out."""
        position = 0
        for one, other in zip(logits_of(exact, tokens), logits_of(rounded, tokens), strict=True):
            truth = torch.tensor(tokens[position + 1 : position + 1 + len(one)])
            position += len(one)
            p, q = (x[: len(truth)].double().log_softmax(-1) for x in (one, other))
            # Rounding can leave a sum of zeros a hair below zero.
            self.divergence.append((p.exp() * (p - q)).sum(-1).clamp_(min=0.0))
            self.same.append((p.argmax(-1) == q.argmax(-1)).double())
            for name, log in (("float32", p), ("int8", q)):
                self.surprise[name].append(-log.gather(1, truth[:, None])[:, 0])


def texts(arguments: argparse.Namespace, model: LoadedModel) -> Iterator[tuple[int, ...]]:
    """Tokens of each text, cut to `--length`."""
    found: Iterator[str]
    if arguments.text or arguments.model.resolve() != DEMO:
        files = arguments.text or sorted((ROOT / "docs").glob("*/*.md"))
        found = (path.read_text(encoding="utf-8") for path in files)
    else:
        from demo.corpus import conversation

        def rendered() -> Iterator[str]:
            for index in range(arguments.count):
                drawn = conversation("quality", index, "test")
                yield model.tokenizer.apply_chat_template(drawn.messages, tools=drawn.tools, tokenize=False)

        found = rendered()
    for text in found:
        tokens = tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"][: arguments.length])
        if len(tokens) > 1:
            yield tokens


def _quantiles(values: Tensor, low: float, high: float) -> Summary:
    """The median and two quantiles, in the places of the smallest and the largest."""
    at = torch.quantile(values, torch.tensor([low, 0.5, high], dtype=values.dtype))
    return {"median": float(at[1]), "min": float(at[0]), "max": float(at[2]), "n": float(len(values))}


def _one(value: float) -> Summary:
    return summary([value])


def tell(report: Report, compared: Comparison) -> None:
    divergence, same = torch.cat(compared.divergence), torch.cat(compared.same)
    note = f"{len(divergence)} positions."
    spread = {"mean": _one(float(divergence.mean())), "median, 1 % … 99 %": _quantiles(divergence, 0.01, 0.99)}
    report.add("KL divergence from float32", "nats", spread, note=note)
    report.add("the likeliest token is the same", "share", {"int8": _one(float(same.mean()))}, note=note)
    values = {name: _one(float(torch.cat(found).mean().exp())) for name, found in compared.surprise.items()}
    report.add("perplexity", "", values, note=note)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=real_model.model,
        default=DEMO,
        help="a folder with a checkpoint, or smollm2; default the demo model",
    )
    parser.add_argument("--label", help="the model's name in the report")
    parser.add_argument("--text", type=Path, nargs="+", help="text files")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a text at most")
    parser.add_argument("--count", type=int, default=200, help="conversations, for the demo model")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.count, arguments.length = 3, 100
    label = arguments.label or ("demo" if arguments.model.resolve() == DEMO else arguments.model.resolve().name)
    exact, rounded = (
        load(
            ModelConfig(
                id=label,
                path=arguments.model.resolve(),
                device="cpu",
                threads=arguments.threads,
                cache_size=1 << 30,
                quantization=quantization,
            )
        )
        for quantization in (None, "int8")
    )
    compared = Comparison()
    for tokens in texts(arguments, exact):
        compared.add(exact, rounded, tokens)
    report = Report(
        "quality",
        label,
        machine.utc_now(),
        *machine.commit(),
        machine.describe(arguments.threads),
        {"length": arguments.length, "texts": "given" if arguments.text else "own"},
        arguments.quick,
    )
    tell(report, compared)
    report.show()
    if arguments.out or not arguments.quick:
        print(report.write(arguments.out or RESULTS).name)


if __name__ == "__main__":
    main()
