"""Load an entry of models.yaml: from its checkpoint to a tested model that is ready to run.

Order: look at the files, compare needed and free memory, read the weights, replace modules by the backend's, run the
self-test, size the cache. Safetensors and GGUF files, nothing pickled; no network; no remote code unless the entry says
so.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import nn

from engine.checkpoints import checkpoint, claims, gguf_file, packed_layers
from engine.checkpoints.checkpoint import Checkpoint
from engine.checkpoints.gguf.stream import packed_bytes
from engine.checkpoints.gguf_file import GGUFFile
from engine.checkpoints.reading import check_vocabulary, load_model
from engine.compute import rotary
from engine.compute.backend import Backend, Progress, StepSize
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.packed_weight import make_each
from engine.compute.cpu.stored_linear import WeightChanged
from engine.compute.discovery import input_device
from engine.compute.model_runner import FallbackRunner, Runner
from engine.config import ModelConfig
from engine.devices.gpu import DeviceStream
from engine.errors import LoadError, NotEnoughMemory, VerbatimError, one_line, out_of_memory, panicked
from engine.host_memory import format_bytes, free_memory
from engine.loading import identity, manifest, versions
from engine.loading.adapters import EntryAdapters
from engine.loading.gpu.rungs import Rungs, choose_rung, kernels_of, served
from engine.loading.identity import ReadyModel
from engine.loading.kept.key import parts_of
from engine.loading.kept.weights import KeptWeights
from engine.loading.manifest import BytesRead, EarlyHashes
from engine.loading.memory.cache_size import CacheSize, context_length, size_cache
from engine.loading.memory.gpu_budget import GpuBudget
from engine.loading.memory.largest_step import LargestStep
from engine.loading.placement import Placement, choose_backend, choose_kernels, place
from engine.loading.retrial import NotAsBefore, Retrial
from engine.loading.selftest import Reference, SelfTest, self_test, tolerance_of
from engine.loading.streams import gguf_stream, streaming
from engine.loading.text_side import TextFiles, TextSide
from engine.model import LoadedModel
from engine.scheduling.block_pool import BLOCK_SIZE, BlockPool
from engine.scheduling.scheduler import MOST_ROWS, Scheduler

log = logging.getLogger("verbatim.engine")

_LOGITS = 2**25
"""Logits of a step beside one row for each sequence: 128 MiB."""
_LONGEST_MESSAGE = 600
_ONE_AT_A_TIME: Final = threading.Lock()
"""transformers loads with switches of the whole process: torch's default dtype, whether weights are made up and tied.
Two loads at once give models that lack weights."""

StepBytes = Sequence[Mapping[str, int]]
"""`LoadedModel.step_bytes` of each model that is served already."""


def load(
    config: ModelConfig,
    *,
    pull: bool = False,
    progress: Progress | None = None,
    read: BytesRead | None = None,
    beside: StepBytes = (),
    early: EarlyHashes | None = None,
) -> LoadedModel:
    """Load one entry. In one process, one load waits for another.

    Args:
        pull: fetch what is not in the hub's cache.
        progress: told what takes long, in words.
        read: told how many bytes of how many were read and hashed so far, at most once for each percent, on any thread.
        beside: `step_bytes` of the models that are served already, which need their share of a GPU's memory.
        early: hashes this entry's files already.

    Raises:
        LoadError: whatever is wrong, in one sentence; NotEnoughMemory with `needed` and `free` bytes.
    """
    try:
        with _ONE_AT_A_TIME:
            return _load(config, pull, progress or (lambda _: None), read, beside, early)
    except VerbatimError as error:
        told = one_line(error.message, _LONGEST_MESSAGE)  # it may quote a stranger's file
        if isinstance(error, LoadError) and told.startswith(f"{config.id}: "):
            error.message, error.args = told, (told,)
            raise
        raise LoadError(f"{config.id}: {told}") from error
    except BaseException as error:  # a checkpoint is a stranger's data, read by libraries that trust it
        if not isinstance(error, Exception) and not panicked(error):
            raise
        if out_of_memory(error):
            raise NotEnoughMemory(
                f"{config.id}: memory ran out while the model was loaded: {one_line(error)}"
            ) from error
        raise LoadError(f"{config.id}: cannot be loaded: {type(error).__name__}: {one_line(error)}") from error


def _load(
    config: ModelConfig,
    pull: bool,
    say: Progress,
    read: BytesRead | None,
    beside: StepBytes,
    early: EarlyHashes | None,
) -> LoadedModel:
    versions.warn_of_untried()
    checkpoint.prepare_environment(pull=pull)
    folder = checkpoint.locate(config, pull=pull)
    file = gguf_file.open_file(folder, config.id) if folder.is_file() else None
    found = gguf_file.inspect(file, packed_bytes(file)) if file else checkpoint.inspect(folder, config.id)
    claims.check_config(found, config.id)
    placement = place(config, found)
    kernels = choose_kernels(config, found, placement, say)
    if kernels is None and placement.rounds == "stored":
        placement = dataclasses.replace(placement, rounds=None)
    adapters = EntryAdapters.inspect(config, found, placement)
    if config.threads:
        torch.set_num_threads(config.threads)
    stream = DeviceStream(placement.device)
    with stream.current():
        with ThreadPoolExecutor(max_workers=2) as pool:  # hashes files and tries templates while weights are read
            hashed = early.of if early else manifest.hash_files
            digests = pool.submit(hashed, manifest.files_read(config, found), read)
            say(f"reading {format_bytes(found.stored_bytes)} of weights")
            files = TextFiles.read(config, folder, file)
            trials = files.start_trials(pool)
            parts = (config, found, file, placement, kernels, stream, files, adapters, digests.result, say, beside)
            ready = _prepared(partial(_prepare, *parts), config.id, say)
            for trial in trials:
                trial.result()
        ready.backend.release_memory()
        return _assemble(config, found, ready, files)


def _prepared(prepare: Callable[..., ReadyModel], name: str, say: Progress) -> ReadyModel:
    """Prepare a model, and again in another way where the first does not do; nothing of that stays in memory then."""
    ways = {"packs": True, "fresh": False}
    while True:
        try:
            return prepare(**ways)
        except WeightChanged as error:
            if not ways["packs"]:
                raise
            log.info("%s: %s: the model is loaded whole", name, error)
            ways["packs"] = False
        except NotAsBefore:
            say("once more, with all trials")
            ways["fresh"] = True


def _prepare(
    config: ModelConfig,
    found: Checkpoint,
    file: GGUFFile | None,
    placement: Placement,
    kernels: Kernels | None,
    stream: DeviceStream,
    files: TextFiles,
    adapters: EntryAdapters,
    digests: Callable[[], Mapping[Path, str]],
    say: Progress,
    beside: StepBytes,
    *,
    packs: bool = True,
    fresh: bool = False,
) -> ReadyModel:
    """Read the weights, fuse the model for its backend, and test it.

    Args:
        packs: weights while they are read.
        fresh: make all trials, whatever is known of an earlier start.

    Raises:
        WeightChanged: weights cannot be packed while they are read.
        NotAsBefore: the model does not compute what it did in the start that is known.
    """
    budget = GpuBudget(placement.gpus, [{torch.device(n): size for n, size in steps.items()} for steps in beside])
    kept = _kept(config, found, placement, digests, packs)
    keep = make_each if kernels is None else kept.of(kernels)
    model = load_model(
        config,
        found,
        placement.dtype,
        placement.device_map,
        file,
        packed=placement.packs,
        gguf=gguf_stream(config, file, kernels, keep) if packs and placement.rounds == "stored" else None,
        streaming=streaming(config, found, kernels, keep) if packs and placement.has_kernels else None,
    )
    stream.wait_for_all()
    _check_device(config, model, placement)
    check_vocabulary(config, files.tokenizer, model)
    adapters.join(model)
    vocab_size, length = _vocab_size(model), context_length(config, model)
    longrope = rotary.pin(model, length)
    if placement.on_one_gpu and placement.rounds:
        packed_layers.round_layers(model, placement.rounds, config.id, say)
    again = Retrial(config, kept, model, vocab_size, length, fresh=fresh)
    reference = None
    if not again.known:
        say("a pass of plain transformers, to compare with")
        reference = Reference.of(model, vocab_size, length)
        adapters.compare(model, vocab_size, length, say)
    rounds = placement.rounds_inputs

    def tested(backend: Backend) -> SelfTest:
        if reference is None:
            return again.passed(backend)
        return self_test(model, backend, reference, vocab_size, placement.dtype, length, rounded=rounds)

    report = None
    if placement.on_one_gpu:
        rungs = _rungs(config, placement, model, tested, say)
        backend, test, report = choose_rung(rungs, config.gpu)
    else:
        backend = choose_backend(config, placement, model, kernels, say, keep)
        backend.fuse(model, stored=placement.stored, length=length, progress=say)
        say("self-test")
        test = tested(backend)
        again.note(test, backend)
        kept.finish()
    if reference is not None:
        tolerance = tolerance_of(placement.dtype, rounded=rounds)
        test = adapters.attach(model, backend, test, reference, tolerance, vocab_size, length)
    return ReadyModel(
        model,
        backend,
        placement,
        stream,
        budget,
        test,
        vocab_size,
        length,
        longrope,
        digests(),
        report,
        adapters.ready(),
    )


def _kept(
    config: ModelConfig, found: Checkpoint, placement: Placement, digests: Callable[[], Mapping[Path, str]], packs: bool
) -> KeptWeights:
    """Find the packed weights of an earlier start. Code that comes with a checkpoint may make weights of anything."""
    parts = partial(parts_of, config, found, placement, digests, packs)
    return KeptWeights(config.id, None if config.trust_remote_code else parts)


def _rungs(
    config: ModelConfig, placement: Placement, model: nn.Module, test: Callable[[Backend], SelfTest], say: Progress
) -> Rungs:
    device, length = placement.device, context_length(config, model)
    return Rungs(
        model=model,
        device=device,
        make_kernels=lambda: kernels_of(device),
        test=test,
        size=StepSize(config.max_batch_tokens + config.max_sequences, config.max_sequences, length),
        vocab_size=_vocab_size(model),
        stored=placement.stored,
        length=length,
        weights="int4" if placement.packs else placement.rounded,
        say=say,
    )


def _assemble(config: ModelConfig, found: Checkpoint, ready: ReadyModel, files: TextFiles) -> LoadedModel:
    size, runner = _fit(config, ready)
    text = TextSide.of(config, files, found, ready.model, ready.vocab_size)
    ready = dataclasses.replace(ready, gpu=served(ready.gpu, ready.backend))
    if ready.gpu is not None:
        log.info("%s: computed on %s as %s", config.id, ready.placement.device, ready.gpu.describe())
    memory = ready.budget.describe(size, ready.test.layers or ())
    if memory:
        log.info("%s: %s", config.id, memory)
    return LoadedModel(
        config=config,
        info=identity.describe(config, found, ready, text, size, memory),
        tokenizer=text.tokenizer,
        vocabulary=text.vocabulary,
        template=text.template,
        end_ids=text.end_ids,
        grammars=text.grammars,
        chat_format=text.chat_format,
        closing_ids=text.closing_ids,
        runner=runner,
        scheduler=_scheduler(config, ready, size),
        stream=ready.stream,
        step_bytes={str(device): size for device, size in ready.budget.activations.items()},
    )


def _fit(config: ModelConfig, ready: ReadyModel) -> tuple[CacheSize, Runner]:
    """Size the cache, and make the runner that serves: on a GPU by the memory that the largest step leaves."""
    layers, length, budget = ready.test.layers, ready.context_length, ready.budget
    budget.note_weights()
    host = {torch.device("cpu"): free_memory() // 4}
    size = size_cache(config, length, layers, {**host, **budget.room()})
    if layers is None or not budget.gpus:
        return size, _runner(config, ready, size, serves=True)
    _measure(config, ready, size.context_length)
    size = size_cache(config, length, layers, {**host, **budget.room()})
    return budget.allocate(config, size, layers, lambda size: _runner(config, ready, size, serves=True))


def _measure(config: ModelConfig, ready: ReadyModel, context: int) -> None:
    """Note the memory of the largest step over `context` tokens, and of graphs, in runners with a small cache."""
    rows = _max_rows(ready) + config.max_sequences
    step = LargestStep(config.max_batch_tokens, rows, config.max_sequences, context)
    small = CacheSize(context, step.num_blocks)
    runner = _runner(config, ready, small)
    ready.budget.measure(
        lambda: step.run(runner, ready.placement.device), lambda: _runner(config, ready, small, serves=True)
    )


def _runner(config: ModelConfig, ready: ReadyModel, size: CacheSize, *, serves: bool = False) -> Runner:
    test, model, backend = ready.test, ready.model, ready.backend
    if test.layers is None:
        return FallbackRunner(model, backend, ready.vocab_size, positions=test.positions)
    return backend.runner(
        model,
        backend.allocate(test.layers, size.blocks),
        ready.vocab_size,
        StepSize(config.max_batch_tokens + config.max_sequences, config.max_sequences, size.context_length),
        single_rows=test.single_rows,
        row_safe=test.row_safe,
        skips_masks=test.skips_masks,
        serves=serves,
    )


def _check_device(config: ModelConfig, model: nn.Module, placement: Placement) -> None:
    """Refuse a model whose device map takes tokens elsewhere than on the device that samples."""
    if input_device(model) != placement.device:
        raise LoadError(
            f"{config.id}: device: {config.device} puts the embedding on {input_device(model)}, not on "
            f"{placement.device}; choose another map."
        )


def _scheduler(config: ModelConfig, ready: ReadyModel, size: CacheSize) -> Scheduler:
    packed = ready.runner == "packed"
    return Scheduler(
        BlockPool(size.blocks, BLOCK_SIZE, caching=config.prefix_cache and packed),
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        max_rows=_max_rows(ready),
        whole_prompts=not packed,
    )


def _max_rows(ready: ReadyModel) -> int:
    return max(min(MOST_ROWS, _LOGITS // ready.vocab_size), 16)


def _vocab_size(model: nn.Module) -> int:
    """Count the rows of the output layer: may be more than the tokenizer has tokens."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    size = getattr(head, "out_features", None) or model.config.get_text_config().vocab_size  # type: ignore[operator,union-attr]
    return int(size)
