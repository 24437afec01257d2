"""What becomes of one architecture: served or refused, right or wrong, and whether the law holds where it is claimed.

A tiny checkpoint (`tiny.py`) is loaded as a user would load it. Its replies are held against transformers on the same
files: one plain forward pass over the whole sequence for each token, without any cache. The same request is then put
into other circumstances (a warm prefix cache, a crowd, small chunks), and its log-probabilities compared bit for bit.

`python -m zoo.examine NAME…` (with `tests` in the path) prints what was found, one JSON object a line.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import sys
import tempfile
import time
import traceback
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils import logging
from zoo import tiny
from zoo.overrides import REFERENCE

from engine import LLM, GenerationRequest, ModelConfig, VerbatimError
from engine.checkpoints.checkpoint import prepare_environment
from engine.compute.cpu.kernels import Kernels, NoKernels
from engine.engine import Engine
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.scheduler import Scheduler

prepare_environment(pull=False)  # MKL's strict mode must be set before this process's first product

CONTEXT = 1024
NEW_TOKENS = 12
PROMPTS = {"short": tiny.prompt(7), "long": tiny.prompt(600)}
NEIGHBOURS = tuple(tiny.prompt(length, start=length) for length in (1, 3, 17, 40, 130, 600))
CHUNK = 37
"""Tokens in a step where chunks are to be small: no multiple of anything."""
MARGIN = 1e-4
"""Two logits this close, as a share of the largest, are a tie: which is greater is a matter of rounding."""
TOLERANCE = 2e-3
"""How far a log-probability may lie from the reference's."""

Bits = tuple[tuple[int, ...], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """What to examine.

    Attributes:
        kernels: with our compiled kernels; without them as on a machine that has no compiler.
        thorough: compare bits in every circumstance, and in the fallback runner, too, which never claims the law.
        generate: see whether transformers' own generation, with its cache, is right.
    """

    name: str
    kernels: bool = True
    thorough: bool = True
    generate: bool = False


@dataclass
class Finding:
    """What was found of one architecture. `status`: `served`, `refused`, `crashed` or `not built`."""

    name: str
    model_type: str = ""
    architecture: str = ""
    status: str = "not built"
    reason: str = ""
    """Why it is refused, crashed or not built; of one that is served, why it is not packed or not lawful."""
    runner: str = ""
    claimed: bool = False
    wrong: list[str] = field(default_factory=list)
    """For each prompt whose reply is not transformers': where and by how much."""
    worst: float = 0.0
    """The largest difference of a log-probability."""
    tried: bool = False
    """Whether its bits were compared."""
    differ: list[str] = field(default_factory=list)
    """Circumstances that changed bits."""
    cached_generate: str = ""
    """Whether transformers' own `generate`, with its cache, agrees with its passes without: `yes`, `no: …`."""
    lively: float = 0.0
    warnings: list[str] = field(default_factory=list)
    """Python warnings, each once, that were given while it was loaded and asked."""
    seconds: float = 0.0

    @property
    def served(self) -> bool:
        return self.status == "served"

    @property
    def right(self) -> bool:
        return self.served and not self.wrong

    @property
    def lawful(self) -> bool:
        return self.served and self.tried and not self.differ

    def summary(self) -> str:
        """One line for people."""
        said = [self.status if not self.served else self.runner, *self.wrong]
        if self.served and self.claimed:
            said.append("lawful" if self.lawful else f"LAW CLAIMED, BUT {', '.join(self.differ)}")
        return f"{self.name}: {'; '.join(said)} ({self.seconds} s) {'' if self.claimed else self.reason}"


def examine(case: Case) -> Finding:
    """Build, load and try one architecture. Whatever it raises becomes part of the finding."""
    found, start = Finding(case.name), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="zoo-") as scratch, warnings.catch_warnings(record=True) as heard:
        try:
            folder = Path(scratch)
            model = tiny.write(folder, case.name)
            config = model.config
            found.model_type, found.architecture = config.model_type, type(model).__name__  # type: ignore[union-attr]
            found.lively = round(tiny.liveliness(model), 2)
            heard.clear()
            warnings.simplefilter("always")
            with contextlib.nullcontext() if case.kernels else _no_kernels():
                _load_and_try(found, folder, case, type(model))
        except Exception as error:
            if found.status != "not built":
                found.status = "crashed"
            found.reason = _one_line(error)
    found.warnings = sorted({f"{w.category.__name__}: {str(w.message).strip()[:200]}" for w in heard})
    found.seconds = round(time.monotonic() - start, 1)
    return found


@contextlib.contextmanager
def _no_kernels() -> Iterator[None]:
    """As on a machine without a compiler."""

    def refuse(*args: Any, **kwargs: Any) -> Kernels:
        raise NoKernels("the zoo does without")

    with unittest.mock.patch.object(Kernels, "load", refuse):
        yield


def _load_and_try(found: Finding, folder: Path, case: Case, kind: type) -> None:
    found.status = "crashed"
    entry = ModelConfig(id="m", path=folder, context_length=CONTEXT, cache_size=64 << 20)
    try:
        llm = LLM.from_config(entry)
    except VerbatimError as error:
        found.status = "refused"
        found.reason = str(error).replace(f"{folder}", "FOLDER").removeprefix("m: ")
        if case.generate:
            found.cached_generate = _generates(_reference(found.name, folder, kind))
        return
    info = llm.info
    found.architecture = info.architecture
    found.runner, found.claimed, found.reason = info.runner, info.law.holds, info.law.reason
    alone = {key: run(llm, prompt) for key, prompt in PROMPTS.items()}
    found.tried = case.thorough or found.claimed or found.runner == "packed"
    if found.tried:
        found.differ = _differences(llm, alone, case.thorough)
    found.status = "served"
    reference = _reference(found.name, folder, kind)
    for key, prompt in PROMPTS.items():
        said, worst = judge(reference, prompt, alone[key][0], [float.fromhex(n[0]) for n in alone[key][1]])
        found.worst = max(found.worst, worst)
        found.wrong += [f"{key}: {said}"] if said else []
    if case.generate:
        found.cached_generate = _generates(reference)


# -- right -----------------------------------------------------------------------------------------------------------


def _reference(name: str, folder: Path, kind: Any) -> nn.Module:
    """transformers itself (the class `kind`), on the same files, with its own attention."""
    config = AutoConfig.from_pretrained(folder)
    REFERENCE.get(name, lambda _: None)(config)
    model: nn.Module = kind.from_pretrained(folder, config=config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def judge(
    model: nn.Module, prompt: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float]
) -> tuple[str, float]:
    """What is wrong with a greedy reply, or an empty string; and the largest difference of a log-probability.

    Every token must be the likeliest after those before it, or tie with it, so that one tie does not condemn the rest.
    """
    model = copy.deepcopy(model)  # `dynamic` rotary embeddings remember the longest sequence they saw

    def rows(length: int, count: int) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *tokens[:length]]])
        logits: torch.Tensor = model(ids, use_cache=False).logits
        return logits[0, -count:].float()

    # One pass for the first token and one for all. Where a model sees the future, or changes with the length, the
    # second is another thing than a pass for each: those are made where it does not agree.
    first = rows(0, 1)
    said, worst = _compare(torch.cat([first, rows(len(tokens) - 1, len(tokens))[1:]]), tokens, logprobs)
    if said:
        each = [rows(length, 1) for length in range(1, len(tokens))]
        said, worst = _compare(torch.cat([first, *each]), tokens, logprobs)
    return said, worst


def _compare(logits: torch.Tensor, tokens: Sequence[int], logprobs: Sequence[float]) -> tuple[str, float]:
    chosen = torch.tensor(tokens)[:, None]
    behind = logits.amax(-1) - logits.gather(1, chosen)[:, 0]
    wrong = torch.nonzero(~(behind <= MARGIN * logits.abs().amax(-1)))[:, 0].tolist()
    worst = 0.0
    if logprobs:
        mine = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        worst = float((mine - torch.tensor(logprobs)).abs().max())
    said = ""
    if wrong:
        said = f"{len(wrong)} of {len(tokens)} tokens differ, the first at {wrong[0]}"
    elif not worst <= TOLERANCE:
        said = "log-probabilities differ"
    return (f"{said} (by {worst:.2g})" if said and logprobs else said), worst


def _generates(model: nn.Module) -> str:
    """Whether transformers' own generation, with its cache, is right by the same measure."""
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.forced_eos_token_id = None  # type: ignore[union-attr]
    for key, prompt in PROMPTS.items():
        try:
            out = model.generate(  # type: ignore[operator]
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, eos_token_id=None
            )[0, len(prompt) :].tolist()
            said, _ = judge(model, prompt, out, [])
        except Exception as error:
            said = _one_line(error)
        if said:
            return f"no: {key}: {said}"
    return "yes"


# -- the law ---------------------------------------------------------------------------------------------------------


def run(llm: LLM, prompt: Sequence[int], engine: Engine | None = None, name: str = "asked") -> Bits:
    """A greedy reply as token ids and the bits of their log-probabilities and of the five likeliest ones'."""
    engine = engine or llm.engine
    engine.add(_request(llm, prompt, name, NEW_TOKENS))
    tokens: list[int] = []
    numbers: list[Any] = []
    while True:
        for output in engine.step():
            if output.request_id != name:
                continue
            if output.error:
                raise output.error
            for delta in output.deltas:
                tokens += delta.token_ids
                numbers += [
                    (e.logprob.hex(), *((t.token_id, t.logprob.hex()) for t in e.top)) for e in delta.logprobs or ()
                ]
            if output.finished:
                return tuple(tokens), tuple(numbers)


def _request(llm: LLM, prompt: Sequence[int], name: str, count: int) -> Any:
    sampling = {"temperature": 0.0, "max_tokens": count, "ignore_eos": True, "logprobs": True, "top_logprobs": 5}
    return llm.engine.prepare(
        GenerationRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling={**sampling, "seed": 1})
    )


def _differences(llm: LLM, alone: dict[str, Bits], thorough: bool) -> list[str]:
    """The circumstances in which a reply has other bits than `alone`."""
    # The warm ones first: the engines of the others write into the same blocks.
    differ = [f"{key} warm" for key, prompt in PROMPTS.items() if run(llm, prompt) != alone[key]]
    circumstances = CIRCUMSTANCES if thorough else {_HARDEST: CIRCUMSTANCES[_HARDEST]}
    for key in PROMPTS:
        differ += [f"{key} {what}" for what, ask in circumstances.items() if ask(llm, key) != alone[key]]
    return differ


def fresh_engine(llm: LLM, budget: int) -> Engine:
    """An engine over the same weights with an empty cache, and `budget` tokens in a step."""
    model, old = llm.engine.model, llm.engine.model.scheduler
    pool = BlockPool(old.pool.num_blocks, old.pool.block_size, caching=not old.whole_prompts)
    scheduler = Scheduler(
        pool, max_sequences=old.max_sequences, max_batch_tokens=budget, whole_prompts=old.whole_prompts
    )
    return Engine(dataclasses.replace(model, scheduler=scheduler))


def _chunked(llm: LLM, key: str) -> Bits:
    return run(llm, PROMPTS[key], fresh_engine(llm, CHUNK))


def _crowd(budget: int) -> Callable[[LLM, str], Bits]:
    def circumstance(llm: LLM, key: str) -> Bits:
        engine = fresh_engine(llm, budget)
        for number, prompt in enumerate(NEIGHBOURS):
            engine.add(_request(llm, prompt, f"neighbour {number}", 6 + 5 * number))
        for _ in range(2):
            engine.step()
        return run(llm, PROMPTS[key], engine)

    return circumstance


CIRCUMSTANCES: dict[str, Callable[[LLM, str], Bits]] = {
    "chunked": _chunked,
    "crowd": _crowd(512),
    "chunked crowd": _crowd(CHUNK),
}
_HARDEST = "chunked crowd"


def _one_line(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(where[-1].filename).name}:{where[-1].lineno})" if where else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def quiet() -> None:
    """No progress bars and no advice of transformers: what matters is in the finding."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    torch.set_num_threads(1)
    quiet()
    for name in sys.argv[1:]:
        print(json.dumps(dataclasses.asdict(examine(Case(name, generate=True)))), flush=True)


if __name__ == "__main__":
    main()
