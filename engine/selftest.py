"""The engine's law, tried at load on this model and this machine. Believes nothing; changes nothing.

Alone = packed with a neighbour = cut into chunks = on one thread, bit for bit; and packed ≈ plain transformers. What
it finds decides which runner serves the model and what the server says of itself.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.attention import CONTEXT_KEY, IMPLEMENTATION, ForwardContext, Span, attention_forward
from engine.block_pool import BlockPool
from engine.errors import LoadError
from engine.kv_cache import SPAN, KVCache, LayerShape
from engine.model_runner import PackedRunner, discover_layers, register_attention
from engine.native import Kernels
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.types import LawReport, SamplingParams

_BLOCK = 16
_LENGTHS = (21, 9)
_DECODED = 3
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Allowed difference to plain transformers, as a share of the largest logit."""
_ROUNDED_TOLERANCE = 1e-1
"""The same where inputs are rounded to bytes: the last bit of a sum decides to which."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """`layers` is None when the model needs the fallback runner; `report.reason` says why.

    `single_rows`: a token that is computed alone needs no padding to keep its bits.
    """

    layers: tuple[LayerShape, ...] | None
    report: LawReport
    single_rows: bool = False


def self_test(
    model: nn.Module, vocab_size: int, dtype: torch.dtype, *, kernels: Kernels | None = None, rounded: bool = False
) -> SelfTest:
    """Run the law. Leaves the model with our attention function if the packed runner can serve it, else its own.

    `kernels`: our own, for attention; `rounded`: the inputs of linear layers are rounded to bytes.
    """
    register_attention()
    prompts = [_tokens(n, vocab_size) for n in _LENGTHS]
    own = getattr(model.config, "_attn_implementation", None) or "eager"
    plain = [_plain(model, p) for p in prompts]
    try:
        model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
        layers = discover_layers(model)
        generate = partial(_generate, model, layers, vocab_size, kernels)
        alone = [generate([p], 512)[0] for p in prompts]
    except Exception as error:  # whatever an unknown architecture does when it is called in a way it does not expect
        return _fallback(model, own, f"{type(model).__name__}: {_first_line(error)}")
    scale = max(float(p.abs().max()) for p in plain)
    difference = max(float((a[0] - p).abs().max()) for a, p in zip(alone, plain, strict=True))
    tolerance = _ROUNDED_TOLERANCE if rounded else _TOLERANCE[dtype]
    if not difference <= tolerance * max(scale, 1e-6):  # also when it is NaN
        return _fallback(
            model,
            own,
            f"{type(model).__name__}: the packed pass differs from plain transformers by {difference:.2g} "
            f"(largest logit {scale:.2g})",
        )
    checks = {
        "packed": _equal(alone, generate(prompts, 512)),
        "chunked": _equal(alone, generate(prompts, 5)),
        "threads": _on_one_thread(lambda: _equal(alone, generate(prompts, 512))),
        "key spans": all(_spans_agree(model, shape, kernels) for shape in dict.fromkeys(layers)),
    }
    holds = all(checks.values())
    reason = (
        "the same bits alone, packed, chunked and on one thread"
        if holds
        else f"bits differ: {', '.join(name for name, ok in checks.items() if not ok)} "
        f"({type(model).__name__}, {dtype}, {layers[0].device})".replace("torch.", "")
    )
    single = holds and _equal(alone, [generate([p], 512, single_rows=True)[0] for p in prompts])
    return SelfTest(layers, LawReport(holds, reason, tuple(checks.items())), single)


def _fallback(model: nn.Module, own: str, reason: str) -> SelfTest:
    try:
        model.set_attn_implementation(own)  # type: ignore[operator]
    except Exception as error:
        raise LoadError(f"{type(model).__name__} cannot be served: {_first_line(error)}") from error
    return SelfTest(None, LawReport(False, f"each sequence runs alone in the fallback runner ({reason})"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _tokens(count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple((7919 * (i + count) + 13) % vocab_size for i in range(count))


@torch.inference_mode()
def _plain(model: nn.Module, tokens: tuple[int, ...]) -> Tensor:
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    output = model(torch.tensor([tokens], device=device), use_cache=False)
    logits: Tensor = output.logits[0, -1]
    return logits.to(torch.float32).cpu()


def _generate(
    model: nn.Module,
    layers: Seq[LayerShape],
    vocab_size: int,
    kernels: Kernels | None,
    prompts: Seq[tuple[int, ...]],
    budget: int,
    *,
    single_rows: bool = False,
) -> list[list[Tensor]]:
    """Greedy decoding through the real scheduler: for each prompt, the logits of every generated token."""
    blocks = sum(-(-(len(p) + _DECODED) // _BLOCK) for p in prompts)
    runner = PackedRunner(model, KVCache(layers, blocks, _BLOCK, kernels), vocab_size, single_rows=single_rows)
    scheduler = Scheduler(BlockPool(blocks, _BLOCK, caching=False), max_sequences=len(prompts), max_batch_tokens=budget)
    params = SamplingParams(max_tokens=_DECODED)
    sequences = [Sequence(str(i), 0, prompt, params, 0) for i, prompt in enumerate(prompts)]
    seen: dict[Sequence, list[Tensor]] = {sequence: [] for sequence in sequences}
    for sequence in sequences:
        scheduler.add([sequence])
    while scheduler.has_work:
        schedule = scheduler.schedule()
        logits = iter(runner.forward(schedule).logits.cpu())
        scheduler.commit(schedule)
        for sequence in [chunk.sequence for chunk in schedule.chunks if chunk.samples]:
            row = next(logits)
            seen[sequence].append(row)
            sequence.append(int(row.argmax()))
            if sequence.position == _DECODED:
                scheduler.finish(sequence)
    return [seen[sequence] for sequence in sequences]


def _equal(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))


def _on_one_thread(test: Callable[[], bool]) -> bool:
    threads = torch.get_num_threads()
    if threads == 1:
        return True
    torch.set_num_threads(1)
    try:
        return test()
    finally:
        torch.set_num_threads(threads)


class _Layer:
    layer_idx = 0
    is_causal = True


@torch.inference_mode()
def _spans_agree(model: nn.Module, shape: LayerShape, kernels: Kernels | None) -> bool:
    """Attention alone, across two borders of the key span: rows in crowds of 1, 3, 33 and 200 have the same bits.

    The prompts above are too short to show it and longer ones would take too long.
    """
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    heads = max(int(getattr(config, "num_attention_heads", shape.heads)), shape.heads)
    heads -= heads % shape.heads
    length = 2 * SPAN + 40
    values = torch.arange(length * 64, dtype=torch.float64).mul_(0.618033988749).frac_().sub_(0.5)

    def rows(count: int, dim: int, shift: int) -> Tensor:
        index = (torch.arange(count * length * dim) * (2 * shift + 1) + shift) % values.numel()
        data = values[index].view(1, count, length, dim)
        return data.to(device=shape.device, dtype=shape.dtype)

    query, key, value = (
        rows(heads, shape.key_dim, 1),
        rows(shape.heads, shape.key_dim, 2),
        rows(shape.heads, shape.value_dim, 3),
    )
    table = tuple(range(-(-length // _BLOCK)))
    cache = KVCache([shape], len(table), _BLOCK, kernels)

    def attend(start: int, count: int) -> Tensor:
        slots = torch.arange(start, start + count)
        span = Span(0, count, start, table[: -(-(start + count) // _BLOCK)])
        context = ForwardContext((span,), slots, count, cache)
        part = slice(start, start + count)
        out, _ = attention_forward(
            _Layer(),
            query[:, :, part],
            key[:, :, part],
            value[:, :, part],
            None,
            **dict[str, Any]({CONTEXT_KEY: context}),
        )
        return out[0]

    whole = attend(0, length)
    cases = ((0, 1), (SPAN - 1, 1), (SPAN, 1), (SPAN - 2, 3), (2 * SPAN - 17, 33), (SPAN - 100, 200), (length - 1, 1))
    return all(torch.equal(attend(start, count), whole[start : start + count]) for start, count in cases)
