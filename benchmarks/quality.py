"""What rounding costs: next-token distributions against float32's, on real text, teacher-forced.

    python benchmarks/quality.py                    the demo model, on conversations that it was not trained on
    python benchmarks/quality.py --model DIR|FILE [--quantization int8 int4] [--gguf FILE …] [--text FILE …]
        [--llama-perplexity PROGRAM]

The Kullback-Leibler divergence from float32's distribution to the rounded one's, whether the likeliest token is the
same, and perplexities; of the model rounded at load, and of GGUF files of the same model. With `--llama-perplexity`
llama.cpp computes the same of each file, from the same tokens and against the same float32.

Text files (default: these documents) are joined and cut into windows of `--length` tokens; positions in the second half
of each are compared, as llama.cpp does. With random weights the text is noise to the model, its distributions are
nearly flat, and the figures say little.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder holds files that must not hide packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks import llama_quality, machine, real_model
from benchmarks.common import RESULTS, ROOT, Summary, summary
from benchmarks.report import Report
from benchmarks.rivals import LLAMA, OURS, kind_of
from engine.checkpoints.checkpoint import inspect
from engine.config import ModelConfig
from engine.loading.loader import load
from engine.model import LoadedModel
from engine.scheduling.schedule import Chunk, Schedule
from engine.scheduling.sequence import Sequence as EngineSequence
from engine.types.sampling_params import SamplingParams

DEMO = ROOT / "demo" / "model"
_PART = 64


@dataclass(frozen=True, slots=True)
class Window:
    """A text; the logits of its positions from `first` to the last but one are compared, as each has a next token."""

    tokens: tuple[int, ...]
    first: int = 0

    @property
    def count(self) -> int:
        return len(self.tokens) - 1 - self.first

    @property
    def truth(self) -> Tensor:
        """Return the tokens that follow the compared positions: `[count] int64`."""
        return torch.tensor(self.tokens[self.first + 1 :], dtype=torch.int64)


def logits_of(model: LoadedModel, window: Window) -> Iterator[Tensor]:
    """Compute the compared positions' logits, `[up to 64, vocab]` at a time, by the runner that serves requests."""
    tokens, last = window.tokens, len(window.tokens) - 1
    sequence = EngineSequence("quality", 0, tokens, SamplingParams(max_tokens=1), 0)
    pool = model.scheduler.pool
    sequence.block_table = pool.allocate(pool.blocks_for(len(tokens)), sequence)
    for start in range(0, last, _PART):
        part = tokens[start : min(start + _PART, last)]
        # As if all but the first were draft tokens: then every row has logits.
        chunk = Chunk(sequence, start, len(part), samples=True, draft=part[1:], num_rows=len(part))
        rows = model.runner.forward(Schedule([chunk])).logits[max(window.first - start, 0) :]
        if len(rows):
            yield rows
    pool.release(sequence.block_table, sequence)


class Exact:
    """float32's logits of all compared positions, kept in a file: `[positions, vocab] float32`."""

    def __init__(self, model: LoadedModel, windows: Sequence[Window], file: Path) -> None:
        self.windows = windows
        at = 0
        for window in windows:
            for rows in logits_of(model, window):
                if at == 0:
                    total = sum(one.count for one in windows), rows.shape[1]
                    size = total[0] * total[1]
                    self.logits = torch.from_file(str(file), shared=True, size=size, dtype=torch.float32).view(total)
                self.logits[at : at + len(rows)] = rows
                at += len(rows)
        self.truth = torch.cat([window.truth for window in windows])

    def parts(self) -> Iterator[Tensor]:
        yield from self.logits.split(_PART)

    def surprise(self) -> float:
        """Return the mean surprise at the next token, in nats."""
        parts = zip(self.parts(), self.truth.split(_PART), strict=True)
        return float(torch.cat([_surprise(rows.double().log_softmax(-1), truth) for rows, truth in parts]).mean())


@dataclass(frozen=True, slots=True)
class Found:
    """What rounding did to one variant; the divergence in nats: its mean, median, 1 % and 99 %."""

    mean: float
    median: float
    low: float
    high: float
    same: float
    perplexity: float


def compare(model: LoadedModel, exact: Exact) -> Found:
    """Compute a rounded model's logits for the same tokens, and compare them.

    Raises:
        SystemExit: it has another vocabulary.
    """
    divergence, same, surprise = [], [], []
    at = 0
    for window in exact.windows:
        for rows in logits_of(model, window):
            if rows.shape[1] != exact.logits.shape[1]:
                raise SystemExit(f"{model.config.path}: {rows.shape[1]} logits, the other {exact.logits.shape[1]}.")
            here = slice(at, at + len(rows))
            at += len(rows)
            p, q = (logits.double().log_softmax(-1) for logits in (exact.logits[here], rows))
            # Rounding can leave a sum of zeros a hair below zero.
            divergence.append((p.exp() * (p - q)).sum(-1).clamp_(min=0.0))
            same.append((p.argmax(-1) == q.argmax(-1)).double())
            surprise.append(_surprise(q, exact.truth[here]))
    all_of_it = torch.cat(divergence)
    low, median, high = torch.quantile(all_of_it, torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64)).tolist()
    perplexity = float(torch.cat(surprise).mean().exp())
    return Found(float(all_of_it.mean()), median, low, high, float(torch.cat(same).mean()), perplexity)


def _surprise(log: Tensor, truth: Tensor) -> Tensor:
    return -log.gather(1, truth[:, None])[:, 0]


# -- what is compared -------------------------------------------------------------------------------------------------


def windows_of(arguments: argparse.Namespace, model: LoadedModel) -> list[Window]:
    """Cut what is to be read into windows: conversations for the demo model, else text.

    Raises:
        SystemExit: the text is shorter than a window.
    """
    if not arguments.text and arguments.model.resolve() == DEMO:
        return list(_conversations(arguments, model))
    files = arguments.text or sorted((ROOT / "docs").glob("*/*.md"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    tokens = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = model.tokenizer(" a")["input_ids"][:1]
    begin = begin if begin == [model.tokenizer.bos_token_id] else []
    step = arguments.length - len(begin)
    found = [
        Window((*begin, *tokens[at : at + step]), arguments.length // 2)
        for at in range(0, len(tokens) - step + 1, step)
    ]
    if not found:
        raise SystemExit(f"--length: the text has {len(tokens)} tokens, fewer than {arguments.length}.")
    if arguments.windows and arguments.windows < len(found):  # from the whole text, not from its beginning only
        found = [found[i * len(found) // arguments.windows] for i in range(arguments.windows)]
    return found


def _conversations(arguments: argparse.Namespace, model: LoadedModel) -> Iterator[Window]:
    from demo.corpus import conversation

    for index in range(arguments.count):
        drawn = conversation("quality", index, "test")
        text = model.tokenizer.apply_chat_template(drawn.messages, tools=drawn.tools, tokenize=False)
        tokens = tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"][: arguments.length])
        if len(tokens) > 1:
            yield Window(tokens)


def loaded(path: Path, quantization: str | None, arguments: argparse.Namespace) -> LoadedModel:
    return load(
        ModelConfig.model_validate(
            {
                "id": path.name,
                "path": path.resolve(),
                "device": "cpu",
                "threads": arguments.threads,
                "cache_size": 1 << 30,
                "quantization": quantization,
            }
        )
    )


def exact_quantization(path: Path) -> str | None:
    """Return the entry's `quantization` that widens a checkpoint's weights to float32, exactly."""
    packed = path.is_file() or "quantization_config" in inspect(path, path.name).config
    return "none" if packed else None


def run(arguments: argparse.Namespace, scratch: Path) -> tuple[Exact, dict[str, Found]]:
    """Compare all variants, one model in memory at a time."""
    model = loaded(arguments.model, exact_quantization(arguments.model), arguments)
    windows = windows_of(arguments, model)
    if arguments.llama_perplexity and sum(window.count for window in windows) < llama_quality.FEWEST:
        raise SystemExit(f"--llama-perplexity compares no fewer than {llama_quality.FEWEST} positions: give more text.")
    exact = Exact(model, windows, scratch / "logits")
    del model
    gc.collect()
    found: dict[str, Found] = {}
    for kind in arguments.quantization:
        found[kind] = compare(loaded(arguments.model, kind, arguments), exact)
        gc.collect()
    for file in arguments.gguf:
        found[f"{OURS} {kind_of(file)}"] = compare(loaded(file, None, arguments), exact)
        gc.collect()
    if arguments.llama_perplexity:
        base = scratch / "base"
        llama_quality.write_base(base, [window.tokens for window in exact.windows], exact.parts())
        for file in arguments.gguf:
            values = llama_quality.compare(arguments.llama_perplexity, file, base, arguments.length, arguments.threads)
            found[f"{LLAMA} {kind_of(file)}"] = Found(**values)
    return exact, found


# -- the report -------------------------------------------------------------------------------------------------------


def _one(value: float) -> Summary:
    return summary([value])


def tell(report: Report, exact: Exact, found: dict[str, Found]) -> None:
    count = len(exact.truth)
    note = f"{count:,} positions of {len(exact.windows)} texts."

    def spread(one: Found) -> Summary:
        """The median and two quantiles, in the places of the smallest and the largest."""
        return {"median": one.median, "min": one.low, "max": one.high, "n": float(count)}

    def of_each(value: str) -> dict[str, Summary]:
        return {name: _one(getattr(one, value)) for name, one in found.items()}

    report.add("KL divergence from float32", "nats", of_each("mean"), note=f"Means. {note}")
    spreads = {name: spread(one) for name, one in found.items()}
    report.add("its median (1 % … 99 %)", "nats", spreads, note=note)
    report.add("the likeliest token is the same", "share", of_each("same"), note=note)
    exactly = {"float32": _one(math.exp(exact.surprise()))}
    report.add("perplexity", "", exactly | of_each("perplexity"), note=note)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=real_model.model,
        default=DEMO,
        help="a folder with a checkpoint, a GGUF file, or smollm2; default the demo model",
    )
    parser.add_argument("--label", help="the model's name in the report")
    parser.add_argument("--quantization", nargs="*", choices=["int8", "int4"], help="default int8, with --gguf none")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], help="GGUF files of the same model")
    parser.add_argument("--llama-perplexity", type=Path, help="llama.cpp's program: the same of each GGUF file")
    parser.add_argument("--text", type=Path, nargs="+", help="text files")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, or of a conversation at most")
    parser.add_argument("--windows", type=int, help="so many windows from all over the text; default all")
    parser.add_argument("--count", type=int, default=200, help="conversations, for the demo model")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    arguments = parser.parse_args(argv)
    if arguments.quantization is None:
        arguments.quantization = [] if arguments.gguf else ["int8"]
    if not arguments.quantization and not arguments.gguf:
        parser.error("there is nothing to compare: --quantization or --gguf")
    if arguments.llama_perplexity and not arguments.gguf:
        parser.error("--llama-perplexity needs --gguf")
    if arguments.llama_perplexity and not arguments.text and arguments.model.resolve() == DEMO:
        parser.error("--llama-perplexity reads texts of one length: give --text")
    if arguments.quick:
        arguments.count, arguments.length, arguments.windows = 3, 100, 3
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    path = arguments.model.resolve()
    label = arguments.label or ("demo" if path == DEMO else path.name.removesuffix(".gguf"))
    report = Report(
        "quality",
        label,
        machine.utc_now(),
        *machine.commit(),
        machine.describe(arguments.threads),
        {"length": arguments.length, "windows": arguments.windows, "texts": "given" if arguments.text else "own"},
        arguments.quick,
    )
    with tempfile.TemporaryDirectory() as scratch:
        tell(report, *run(arguments, Path(scratch)))
    report.show()
    if arguments.out or not arguments.quick:
        print(report.write(arguments.out or RESULTS).name)


if __name__ == "__main__":
    main()
