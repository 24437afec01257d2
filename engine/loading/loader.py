"""models.yaml entry → a model that is ready to run.

Order: look at the files, compare needed and free memory, read the weights, pack them, run the self-test, size the
cache. Safetensors and GGUF files, nothing pickled; no network; no remote code unless the entry says so.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoints import checkpoint, claims, gguf_file, quantized
from engine.checkpoints.checkpoint import Checkpoint, human, words
from engine.checkpoints.json_files import read_json
from engine.checkpoints.reading import check_vocabulary, load_model, load_tokenizer
from engine.compute import rotary
from engine.compute.cpu.decoder_layer import fuse_layers
from engine.compute.cpu.kernels import Kernels, KernelsUnavailable
from engine.compute.cpu.pointwise import replace_pointwise
from engine.compute.kv_cache import KEY_BLOCK, KVCache, LayerShape
from engine.compute.linear import (
    Make,
    NativeLinear,
    choose_kernel,
    is_sound,
    merge_shared_projections,
    pack_model,
)
from engine.compute.model_runner import FallbackRunner, PackedRunner, Runner
from engine.config import ModelConfig
from engine.errors import LoadError, NotEnoughMemory, VerbatimError, out_of_memory, panicked
from engine.grammar.compiler import GrammarCompiler
from engine.host_memory import free_memory, give_back_memory
from engine.loading import fingerprint, template_trial, versions
from engine.loading.selftest import Reference, SelfTest, self_test
from engine.replies import expression_trial
from engine.replies.chat_format import ChatFormat, find_chat_format
from engine.scheduling.block_pool import BLOCK_SIZE, BlockPool
from engine.scheduling.scheduler import Scheduler
from engine.templates.chat_template import ChatTemplate
from engine.text.vocabulary import Vocabulary
from engine.types.model_info import ModelInfo
from engine.types.sampling_params import SamplingParams

_LONGEST_MESSAGE = 600
_GENERATION_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_CONTEXT_NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions", "n_positions")
"""What configurations call the number of positions that a model was built for."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

log = logging.getLogger("verbatim.engine")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything a model needs to serve, each part made once and handed on."""

    config: ModelConfig
    info: ModelInfo
    tokenizer: Any
    vocabulary: Vocabulary
    template: ChatTemplate
    end_ids: tuple[int, ...]
    grammars: GrammarCompiler
    chat_format: ChatFormat
    closing_ids: tuple[int, ...]
    """What ends thoughts by force."""
    runner: Runner
    scheduler: Scheduler
    device: torch.device


def load(config: ModelConfig, *, pull: bool = False, progress: Progress | None = None) -> LoadedModel:
    """Load one entry.

    Raises:
        LoadError: whatever is wrong, in one sentence; NotEnoughMemory with `needed` and `free` bytes.
    """
    try:
        return _load(config, pull, progress or (lambda _: None))
    except VerbatimError as error:
        told = checkpoint.line(error.message, _LONGEST_MESSAGE)  # it may quote a stranger's file
        if isinstance(error, LoadError) and told.startswith(f"{config.id}: "):
            error.message, error.args = told, (told,)
            raise
        raise LoadError(f"{config.id}: {told}") from error
    except BaseException as error:  # a checkpoint is a stranger's data, read by libraries that trust it
        if not isinstance(error, Exception) and not panicked(error):
            raise
        if out_of_memory(error):
            raise NotEnoughMemory(f"{config.id}: memory ran out while the model was loaded: {words(error)}") from error
        raise LoadError(f"{config.id}: cannot be loaded: {type(error).__name__}: {words(error)}") from error


def _load(config: ModelConfig, pull: bool, say: Progress) -> LoadedModel:
    versions.warn_of_untried()
    checkpoint.prepare_environment(pull=pull)
    folder = checkpoint.locate(config, pull=pull)
    file = gguf_file.open_file(folder, config.id) if folder.is_file() else None
    found = gguf_file.inspect(file) if file else checkpoint.inspect(folder, config.id)
    claims.check_config(found, config.id)
    device, device_map = _resolve_device(config)
    dtype = _resolve_dtype(config, found, device)
    if config.quantization and (device.type != "cpu" or dtype != torch.float32):
        raise LoadError(
            f"{config.id}: quantization: {config.quantization} is for float32 on a CPU, not {dtype} on {device}."
        )
    _check_memory(config, found, device, dtype, quantized.check(config, found, device_map, dtype))
    if config.threads:
        torch.set_num_threads(config.threads)
    source = _read_template(config) if config.chat_template else None
    with ThreadPoolExecutor(max_workers=2) as pool:  # the files are hashed, and templates tried, while others are read
        digest = pool.submit(fingerprint.weights_digest, found.files)
        say(f"reading {human(found.stored_bytes)} of weights")
        tokenizer = load_tokenizer(config, folder, file)
        sources = ChatTemplate.sources(tokenizer, source)
        trial = pool.submit(template_trial.check, *sources, tokenizer.special_tokens_map)
        given, shipped = _response_templates(config, tokenizer)
        search = pool.submit(expression_trial.check, given if given is not None else shipped)
        model = load_model(config, found, dtype, device_map, file)
        check_vocabulary(config, tokenizer, model)
        vocab_size, length = _vocab_size(model), _context_length(config, model)
        longrope = rotary.pin(model, length)
        say("a pass of plain transformers, to compare with")
        reference = Reference.of(model, vocab_size, length)
        kernel, native = "torch", None
        if device.type == "cpu" and dtype == torch.float32:
            kernel, make, native = _choose_kernel(config, model, say)
            pack_model(model, _DTYPES.get(found.dtype, torch.float32), make, _packing_progress(say))
            if native is not None:
                replace_pointwise(model, native)
                merge_shared_projections(model)
                fused = fuse_layers(model, native, length)
                say(f"{fused} layers run as one kernel each ({native.target})")
        say("self-test")
        test = self_test(
            model,
            reference,
            vocab_size,
            dtype,
            length,
            kernels=native,
            rounded=config.quantization is not None,
        )
        weights = digest.result()
        trial.result()
        search.result()
    give_back_memory()
    return _assemble(
        config, found, model, tokenizer, test, vocab_size, device, dtype, weights, kernel, native, longrope, source
    )


def _assemble(
    config: ModelConfig,
    found: Checkpoint,
    model: nn.Module,
    tokenizer: Any,
    test: SelfTest,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype,
    weights: str,
    kernel: str,
    native: Kernels | None,
    longrope: str | None,
    source: str | None,
) -> LoadedModel:
    context, blocks = _size_cache(config, _context_length(config, model), test.layers, device)
    runner: Runner
    if test.layers is None:
        runner = FallbackRunner(model, vocab_size, positions=test.positions)
    else:
        runner = PackedRunner(
            model,
            KVCache(test.layers, blocks, BLOCK_SIZE, native),
            vocab_size,
            single_rows=test.single_rows,
            row_safe=test.row_safe,
        )
    packed = test.layers is not None
    scheduler = Scheduler(
        BlockPool(blocks, BLOCK_SIZE, caching=config.prefix_cache and packed),
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        whole_prompts=not packed,
    )
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    clock = config.template_clock
    template = ChatTemplate.from_tokenizer(tokenizer, source=source, clock=(lambda: clock) if clock else None)
    end_ids = _end_ids(found, model, tokenizer, vocab_size)
    parts = {
        "weights": weights,
        "tokenizer": fingerprint.tokenizer_digest(tokenizer),
        "template": template.source,
        **({"tool template": template.tool_use.source} if template.tool_use else {}),
        "config": found.config,
        "dtype": str(dtype),
        "runner": "packed" if packed else "fallback",
        "linear": kernel,
        "longrope": longrope,
        # What a request leaves open is filled in from these.
        "defaults": _default_sampling(config, found.folder),
        "end_ids": end_ids,
        "template_clock": config.template_clock,
        "content": config.content_special_tokens,
        "threads": None if test.report.holds else torch.get_num_threads(),
        **fingerprint.hardware(device),
    }
    chat_format = _find_chat_format(config, template, tokenizer)
    reasoning = chat_format.reasoning
    info = ModelInfo(
        id=config.id,
        created=found.created,
        architecture=type(model).__name__,
        runner="packed" if packed else "fallback",
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        context_length=context,
        cache_tokens=blocks * BLOCK_SIZE,
        max_sequences=config.max_sequences,
        vocab_size=vocab_size,
        system_fingerprint=fingerprint.fingerprint(parts),
        law=test.report,
        default_sampling=_default_sampling(config, found.folder),
        weight_bytes=found.stored_bytes,
        linear=kernel,
        reasoning=(reasoning.open, reasoning.close) if reasoning else None,
        tool_calls=chat_format.describe(),
        tool_calls_source=chat_format.source,
    )

    grammars = GrammarCompiler(vocabulary, vocab_size, end_ids, _plain_encoder(tokenizer))
    return LoadedModel(
        config=config,
        info=info,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        template=template,
        end_ids=end_ids,
        grammars=grammars,
        chat_format=chat_format,
        closing_ids=tuple(tokenizer(reasoning.closing, add_special_tokens=False)["input_ids"]) if reasoning else (),
        runner=runner,
        scheduler=scheduler,
        device=device,
    )


# -- where and how ---------------------------------------------------------------------------------------------------


def _resolve_device(config: ModelConfig) -> tuple[torch.device, Any]:
    """The device that logits come to, and accelerate's device map."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.version.cuda:
            log.warning(
                "%s: this build of torch is for CUDA %s and sees no GPU: taking the CPU", config.id, torch.version.cuda
            )
    if name == "cpu":
        return torch.device("cpu"), {"": "cpu"}
    if not torch.cuda.is_available():
        raise LoadError(
            f"{config.id}: device {config.device!r} was asked for, but torch {torch.__version__} sees no GPU."
        )
    if not name.startswith("cuda"):
        return torch.device("cuda:0"), name
    device = torch.device(name if ":" in name else "cuda:0")
    if (device.index or 0) >= torch.cuda.device_count():
        raise LoadError(f"{config.id}: there is no {device}; this machine has {torch.cuda.device_count()} GPU(s).")
    return device, {"": str(device)}


def _resolve_dtype(config: ModelConfig, found: Checkpoint, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    return torch.float32 if device.type == "cpu" else _DTYPES.get(found.dtype, torch.float32)


def _choose_kernel(config: ModelConfig, model: nn.Module, say: Progress) -> tuple[str, Make, Kernels | None]:
    """Name and maker of the linear layers, and our own kernels if they are sound here."""
    native, why = None, ""
    try:
        native = Kernels.load(progress=say)
    except KernelsUnavailable as error:
        why = str(error)
    if config.quantization:
        if native is None:
            raise LoadError(f"{config.id}: quantization: {config.quantization} needs compiled kernels: {why}.")
        make: Make = partial(NativeLinear, native, config.quantization)
        if not is_sound(make, 192, 80, tolerance=0.1):
            raise LoadError(
                f"{config.id}: quantization: {config.quantization} does not compute rightly on this machine."
            )
        return f"native {config.quantization}", make, native
    if native is None:
        log.warning("%s: no compiled kernels (%s): linear layers run in torch", config.id, why)
    name, make = choose_kernel(model, native)
    if native is not None and name != "native":
        log.warning("%s: the compiled kernels do not compute rightly here: linear layers run in torch", config.id)
        native = None
    return name, make, native


def _check_memory(
    config: ModelConfig, found: Checkpoint, device: torch.device, dtype: torch.dtype, quantised: int | None
) -> None:
    on_cpu = device.type == "cpu"
    needed = quantised
    if needed is None:
        needed = found.float32_bytes() if on_cpu and dtype == torch.float32 else found.parameters * dtype.itemsize
    free = free_memory() if on_cpu else sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    if needed > free:
        place = "memory" if on_cpu else "GPU memory"
        raise NotEnoughMemory(
            f"{config.id}: the weights need {human(needed)} of {place} as {str(dtype).removeprefix('torch.')}, "
            f"{human(free)} are free.",
            needed=needed,
            free=free,
        )


def _context_length(config: ModelConfig, model: nn.Module) -> int:
    """How many tokens a sequence may have, memory aside."""
    text = model.config.get_text_config()  # type: ignore[operator,union-attr]
    said = (getattr(text, name, None) for name in _CONTEXT_NAMES)
    # Not said, or without an end: a length that most machines can hold.
    trained = next((int(number) for number in said if isinstance(number, int) and number > 0), 32768)
    if config.context_length and config.context_length > trained:
        raise LoadError(f"{config.id}: context_length is {config.context_length}, the model was built for {trained}.")
    return config.context_length or trained


def _size_cache(
    config: ModelConfig, wanted: int, layers: tuple[LayerShape, ...] | None, device: torch.device
) -> tuple[int, int]:
    """Context length and number of blocks.

    Without a size in the entry: a quarter of the free memory on a CPU, 80 % on a GPU, and never more than all sequences
    can use.
    """
    most = -(-wanted // BLOCK_SIZE) * config.max_sequences
    if layers is None:  # transformers allocates its own caches; blocks only count tokens
        return wanted, most
    per_block = sum(layer.bytes_per_token for layer in layers) * BLOCK_SIZE
    if config.cache_size:
        room = config.cache_size
    elif device.type == "cpu":
        room = free_memory() // 4
    else:
        room = int(torch.cuda.mem_get_info(device)[0] * 0.8)
    spare = sum(layer.bytes_per_token for layer in layers) * KEY_BLOCK
    blocks = min(max(room - spare, 0) // per_block, most)
    least = -(-(config.context_length or 2) // BLOCK_SIZE)
    if blocks < least:
        raise NotEnoughMemory(
            f"{config.id}: the cache for {least * BLOCK_SIZE} tokens needs {human(least * per_block + spare)}, "
            f"{human(room)} are given to it; lower context_length or raise cache_size.",
            needed=least * per_block + spare,
            free=room,
        )
    return min(wanted, blocks * BLOCK_SIZE), blocks


# -- transformers ----------------------------------------------------------------------------------------------------


def _plain_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text → ids, where the name of a special token is text like any other."""
    plain = copy.deepcopy(tokenizer.backend_tokenizer)  # the switch is the tokenizer's, and prompts want it off
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()

    def encode(text: str) -> list[int]:
        ids: list[int] = plain.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _packing_progress(say: Progress) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if done == total or done % 32 == 0:
            say(f"packing layers {done}/{total}")

    return report


def _vocab_size(model: nn.Module) -> int:
    """Rows of the output layer: may be more than the tokenizer has tokens."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    size = getattr(head, "out_features", None) or model.config.get_text_config().vocab_size  # type: ignore[operator,union-attr]
    return int(size)


def _read_template(config: ModelConfig) -> str:
    assert config.chat_template is not None
    try:
        return config.chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{config.id}: cannot read the chat template {config.chat_template}: {error}") from None


def _response_templates(config: ModelConfig, tokenizer: Any) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The one that the entry names, and the one that the tokenizer brings along."""
    given = read_json(config.response_template, config.id) if config.response_template is not None else None
    shipped = getattr(tokenizer, "response_template", None)
    return given, shipped if isinstance(shipped, dict) else None


def _find_chat_format(config: ModelConfig, template: ChatTemplate, tokenizer: Any) -> ChatFormat:
    given, shipped = _response_templates(config, tokenizer)
    try:
        return find_chat_format(template, given=given, shipped=shipped)
    except ValueError as error:
        raise LoadError(f"{config.id}: {config.response_template} is no response template: {error}") from None


def _end_ids(found: Checkpoint, model: nn.Module, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end an answer: those of the generation config, the model's config, the tokenizer and a GGUF file."""
    settings: Any = model.config
    sources = (
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(settings, "eos_token_id", None),
        getattr(settings.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
        found.end_ids,
    )
    ids: set[int] = set()
    for source in sources:
        ids.update(source if isinstance(source, list | tuple) else [] if source is None else [source])
    odd = [i for i in ids if not isinstance(i, int)]
    if odd:
        raise LoadError(f"{found.folder}: eos_token_id must be a token's id or a list of them, not {odd[0]!r}.")
    return tuple(sorted(i for i in ids if 0 <= i < vocab_size))


def _default_sampling(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Defaults for fields that a request leaves out: the checkpoint's generation config, then the entry's own."""
    path = folder / "generation_config.json"
    given = read_json(path, config.id) if path.exists() else {}
    if given.get("do_sample") is False:
        given = {}
    defaults = {name: given[name] for name in _GENERATION_FIELDS if given.get(name) is not None}
    try:
        SamplingParams.merged(defaults)
    except VerbatimError as error:
        log.warning("%s: generation_config.json is ignored: %s", config.id, error.message)
        defaults = {}
    return {**defaults, **config.sampling}
