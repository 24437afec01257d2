"""Test a loaded model on this machine: that it is computed rightly, and that its bits are batch-invariant.

`Reference` is one plain pass of transformers, without a cache, over fixed prompts and continuations; it is computed
before the model is prepared for serving. `self_test` then generates the same tokens through the runner that will serve:

    packed, if it agrees with the reference  →  fallback, if it agrees  →  refused, with the numbers

and, for the packed runner, compares bits: alone = among others, beside a far position = in chunks = on one thread.
How long the prompts and how large the steps are depends on the device (`Extent`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from engine.compute import rotary
from engine.compute.attention import IMPLEMENTATION, Discovery, register_attention
from engine.compute.backend import Backend
from engine.compute.cpu.stored_linear import WeightChanged
from engine.compute.discovery import discover, input_device
from engine.compute.kv_cache import LayerShape
from engine.compute.model_runner import FallbackRunner
from engine.compute.row_safe import RowSafeFunctions
from engine.devices.gpu import matmul_tf32
from engine.errors import LoadError, first_line, out_of_memory
from engine.loading.trials.attention_trial import AttentionTrial
from engine.loading.trials.trial_runs import DECODED, Packed, Run, Text, equal, generate, on_one_thread
from engine.scheduling.block_pool import BLOCK_SIZE, BlockPool
from engine.scheduling.scheduler import Scheduler
from engine.types.model_info import ReproducibilityReport

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Allowed difference to plain transformers in the same dtype, as a share of the largest logit.

Plain bfloat16 is 0.6 to 1.5 % off float32 in models of two to six layers, and more in deep ones. A float32 pass to hold
it against would need the weights in twice the memory. Attention alone is held against float64 (`attention_trial`).
"""
_ROUNDED_TOLERANCE = 2e-1
"""The same where weights and inputs are rounded to bytes, which they are not in the reference."""
_TIE = 1e-1
"""Allowed difference of a single row: the last bit of a sum can decide which expert a router chooses."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How far a device is tried.

    Attributes:
        short, long: lengths of prompts. The long one spans several tiles of every kernel, and makes steps of hundreds
            of rows.
        chunk: tokens of a step in which the long prompt is computed in pieces; the short ones take 5.
        threads: whether bits on one thread are compared.
    """

    short: tuple[int, ...]
    long: int
    chunk: int
    threads: bool

    @classmethod
    def on(cls, device: torch.device) -> Extent:
        """Choose by the kind of device: a GPU's tiles and splits are larger, and threads compute nothing there."""
        return ON_CPU if device.type == "cpu" else ON_GPU


ON_CPU = Extent(short=(21, 9, 5, 3), long=200, chunk=66, threads=True)
ON_GPU = Extent(short=(150, 9, 5, 3), long=700, chunk=64, threads=False)


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The outcome: which runner serves the model, what that runner must be told, and whether the law holds.

    `layers`: what each layer stores; None where the fallback runner serves, and `report.reason` says why.
    `single_rows`: a token computed alone has the same bits as among others, without padding (packed runner).
    `row_safe`: the model calls functions of torch that need `RowSafeFunctions` (packed runner).
    `skips_masks`: the model computes the same if it is kept from making masks (packed runner).
    `positions`: the model must be told positions (fallback runner).
    `crowd`: the logits of all texts computed together, if every trial passed (packed runner).
    """

    layers: tuple[LayerShape, ...] | None
    report: ReproducibilityReport
    single_rows: bool = False
    row_safe: bool = False
    skips_masks: bool = False
    positions: bool = True
    crowd: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Reference:
    """What plain transformers computes: for each text `[DECODED, vocab] float32` logits."""

    texts: tuple[Text, ...]
    logits: tuple[Tensor, ...]
    extent: Extent = ON_CPU

    @classmethod
    @torch.inference_mode()
    def of(
        cls, model: nn.Module, vocab_size: int, length: int, extent: Extent | None = None, adapter: str = ""
    ) -> Reference:
        """Run one pass of plain transformers for each text, without a cache.

        Args:
            length: how many tokens a sequence may have.
            extent: how far the model is tried; None: as its device needs it.
            adapter: the name of the one that the model has been given for this pass.

        Raises:
            LoadError: the model cannot be called, or its numbers are too large for float16.
            WeightChanged: it changes a weight that was packed while it was read.
        """
        extent = extent or Extent.on(input_device(model))
        texts = texts_of(model, vocab_size, length, extent, adapter)
        logits = []
        try:
            for text in texts:
                rotary.reset(model)
                tokens = torch.tensor([[*text.prompt, *text.rest[:-1]]], dtype=torch.int64, device=input_device(model))
                rows = model(tokens, use_cache=False).logits[0, len(text.prompt) - 1 :]
                logits.append(rows.to(torch.float32).cpu())
                narrow = rows.dtype == torch.float16
        except WeightChanged:
            raise
        except Exception as error:  # whatever an unknown architecture does
            if out_of_memory(error):
                raise
            raise LoadError(f"{type(model).__name__} cannot be served: {first_line(error)}.") from error
        if narrow and any(bool(rows.isnan().any()) for rows in logits):
            raise LoadError(
                f"{type(model).__name__} has numbers beyond 65504, the largest of float16: give its entry dtype: "
                "float32, or bfloat16 on a GPU that has it."
            )
        return cls(texts, tuple(logits), extent)

    def difference(self, runs: Seq[Run], tolerance: float) -> str | None:
        """Say how the runs differ from plain transformers; None if they agree up to rounding.

        Numbers that a model masks out (infinite, or as good as) must be masked out in both.
        """
        scale = max(max(float(plain[_is_unmasked(plain)].abs().max()) for plain in self.logits), 1e-6)
        rows = [
            _distance(mine, right) / scale
            for run, plain in zip(runs, self.logits, strict=True)
            for mine, right in zip(run.logits, plain, strict=True)
        ]
        worst = sorted((float("inf") if row != row else row for row in rows), reverse=True)
        if worst[0] <= tolerance or (worst[0] <= _TIE and worst[1] <= tolerance):
            return None
        off = sum(row > tolerance for row in worst)
        return (
            f"differs from plain transformers by {worst[0] * scale:.2g} in {off} of {len(rows)} places "
            f"(largest logit {scale:.2g})"
        )


def texts_of(model: nn.Module, vocab_size: int, length: int, extent: Extent, adapter: str = "") -> tuple[Text, ...]:
    """Return the texts that a model is tried with."""
    lengths = [n for n in (*extent.short, extent.long) if n + DECODED <= length] or [1]
    ids = _usable_ids(model, vocab_size)
    return tuple(Text(_pick(ids, n), _pick(ids, DECODED, 5 * n), adapter) for n in lengths)


def packed_of(model: nn.Module, backend: Backend, vocab_size: int, length: int) -> tuple[Discovery, Packed]:
    """Give the model the packed runner's attention, and find out what it stores. Raises whatever the model does."""
    register_attention()
    model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
    with RowSafeFunctions() as functions:
        found = discover(model, length)
    shapes, skips = found.shapes(), found.skips_masks
    return found, Packed(model, backend, shapes, vocab_size, length, row_safe=functions.used, skips_masks=skips)


def tolerance_of(dtype: torch.dtype, *, rounded: bool = False) -> float:
    """Return the allowed difference to plain transformers, as a share of the largest logit. `rounded`: to bytes."""
    return _ROUNDED_TOLERANCE if rounded else _TOLERANCE[dtype]


def _is_unmasked(logits: Tensor) -> Tensor:
    """Tell where a logit is a number and not a mask."""
    return ~(logits.abs() > 1e30)


def _distance(mine: Tensor, right: Tensor) -> float:
    """Return the largest difference of two rows; infinite if they do not mask out the same entries."""
    unmasked = _is_unmasked(right)
    if not torch.equal(unmasked, _is_unmasked(mine)) or not torch.equal(mine[~unmasked], right[~unmasked]):
        return float("inf")
    return float((mine[unmasked] - right[unmasked]).abs().max())


def self_test(
    model: nn.Module,
    backend: Backend,
    reference: Reference,
    vocab_size: int,
    dtype: torch.dtype,
    length: int,
    *,
    rounded: bool = False,
) -> SelfTest:
    """Choose the runner that serves the model, and test the law. Leaves the model with that runner's attention.

    Args:
        length: how many tokens a sequence may have.
        rounded: weights and inputs of linear layers are rounded to bytes.

    Raises:
        LoadError: no runner agrees with plain transformers.
    """
    own = getattr(model.config, "_attn_implementation", None) or "eager"
    tolerance = tolerance_of(dtype, rounded=rounded)
    fallback = partial(_fallback, model, backend, reference, vocab_size, tolerance, own)
    register_attention()
    try:
        if rotary.dynamic(model):
            return fallback("its rotary scaling is dynamic")
        found, packed = packed_of(model, backend, vocab_size, length)
        alone = [packed.run([text])[0] for text in reference.texts]
        crowd = packed.run(reference.texts, far=True)
    except LoadError:
        raise
    except Exception as error:  # whatever an unknown architecture does when it is called in a way it does not expect
        if out_of_memory(error):
            raise
        return fallback(first_line(error))
    for runs, where in ((alone, "the packed pass"), (crowd, "the packed pass of several sequences")):
        difference = reference.difference(runs, tolerance)
        if difference:
            return fallback(f"{where} {difference}")
    trials = _attention_trials(found, backend)
    for trial in trials:
        if not trial.is_right():
            return fallback(f"attention is wrong over {trial.describe()}")
    return _law(model, backend, reference, packed, alone, crowd, trials, dtype)


def _attention_trials(found: Discovery, backend: Backend) -> list[AttentionTrial]:
    """Make one trial for each combination of shape and settings that the model's layers have."""
    ways = {(shape, found.settings[i].kind): i for i, shape in found.layers.items()}
    return [AttentionTrial(found.layers[i], found.settings[i], backend) for i in ways.values()]


def _law(
    model: nn.Module,
    backend: Backend,
    reference: Reference,
    packed: Packed,
    alone: list[Run],
    crowd: list[Run],
    trials: list[AttentionTrial],
    dtype: torch.dtype,
) -> SelfTest:
    """Compare the bits of the same texts under different circumstances."""
    extent = reference.extent
    short = [i for i, text in enumerate(reference.texts) if len(text.prompt) < extent.long]
    few, long = [reference.texts[i] for i in short], [t for t in reference.texts if len(t.prompt) >= extent.long]
    few_alone, long_alone = [alone[i] for i in short], [a for i, a in enumerate(alone) if i not in short]

    def in_pieces() -> bool:
        return equal(few_alone + long_alone, packed.run([*few, *long], budget=extent.chunk, far=True))

    # The long prompt in pieces and on one thread at once: they are told apart only if bits differ.
    pieces = on_one_thread(in_pieces) if extent.threads else in_pieces()
    apart = extent.threads and not pieces and equal(long_alone, packed.run(long, budget=extent.chunk))
    checks = {
        "packed": equal(alone, crowd),
        "chunked": equal(few_alone, packed.run(few, budget=5)) and (pieces or apart),
        **({"threads": pieces} if extent.threads else {}),
        "key spans": all(trial.rows_agree() for trial in trials),
    }
    where = f"({type(model).__name__}, {dtype}, {packed.layers[0].device})".replace("torch.", "")
    holds, reason = verdict(checks, backend.breaks_law or _tf32(packed.layers[0].device), where)
    single = holds and equal(few_alone[:2], [packed.run([text], single_rows=True)[0] for text in few[:2]])
    report = ReproducibilityReport(holds, reason, tuple(checks.items()))
    logits = tuple(run.logits for run in crowd) if holds else ()
    return SelfTest(packed.layers, report, single, packed.row_safe, packed.skips_masks, crowd=logits)


def verdict(checks: Mapping[str, bool], breaks_law: str | None, where: str) -> tuple[bool, str]:
    """Decide whether the law holds, and say why.

    Args:
        checks: which trials found equal bits, by name.
        breaks_law: why the backend cannot keep the law, whatever the trials say; None if it can.
        where: model, dtype and device, for the message.
    """
    if wrong := [name for name, right in checks.items() if not right]:
        return False, f"bits differ: {', '.join(wrong)} {where}"
    if breaks_law is not None:
        return False, f"no trial found other bits, but {breaks_law} {where}"
    if "threads" in checks:
        return True, "the same bits alone, packed, chunked and on one thread"
    return True, "the same bits alone, packed and chunked"


def _tf32(device: torch.device) -> str | None:
    """Say why the law cannot be promised where torch may round factors of float32 products; None if it may not."""
    if device.type == "cuda" and matmul_tf32():
        return "torch is set to round float32 products to TF32 (torch.backends.cuda.matmul)"
    return None


def _fallback(
    model: nn.Module, backend: Backend, reference: Reference, vocab_size: int, tolerance: float, own: str, reason: str
) -> SelfTest:
    """Choose the fallback runner if it agrees with plain transformers.

    Raises:
        LoadError: it does not agree either; names both reasons.
    """
    name = type(model).__name__
    objections: list[str] = []
    try:
        model.set_attn_implementation(own)  # type: ignore[operator]
    except Exception as error:
        raise LoadError(f"{name} cannot be served: not packed ({reason}); {first_line(error)}.") from error
    for positions in (True, False):  # some models count positions themselves, and not from 0
        try:
            difference = reference.difference(_alone(model, backend, reference.texts, vocab_size, positions), tolerance)
        except Exception as error:  # whatever an unknown architecture does
            if out_of_memory(error):
                raise
            difference = f"fails: {first_line(error)}"
        if difference is None:
            law = ReproducibilityReport(False, f"each sequence runs alone in the fallback runner ({name}: {reason})")
            return SelfTest(None, law, positions=positions)
        objections.append(difference)
    raise LoadError(f"{name} cannot be served: not packed ({reason}), and each sequence alone {objections[0]}.")


def _alone(model: nn.Module, backend: Backend, texts: Seq[Text], vocab_size: int, positions: bool) -> list[Run]:
    """Generate all texts at once through the fallback runner, so that state leaking between sequences shows."""
    blocks = sum(-(-(len(text.prompt) + DECODED) // BLOCK_SIZE) for text in texts)
    scheduler = Scheduler(
        BlockPool(blocks, BLOCK_SIZE, caching=False), max_sequences=len(texts), max_batch_tokens=512, whole_prompts=True
    )
    return generate(FallbackRunner(model, backend, vocab_size, positions=positions), scheduler, texts)


def _usable_ids(model: nn.Module, vocab_size: int) -> range:
    """Return the ids to try; not the padding token, which some models do not count as a position."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)  # type: ignore[operator,union-attr]
    if not isinstance(padding, int) or not 0 <= padding < vocab_size:
        return range(vocab_size)
    below, above = range(padding), range(padding + 1, vocab_size)
    return max(below, above, key=len)


def _pick(ids: range, count: int, shift: int = 0) -> tuple[int, ...]:
    return tuple(ids[(7919 * (i + count + shift) + 13) % len(ids)] for i in range(count))
