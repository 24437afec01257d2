"""Read a checkpoint's files into transformers' model and tokenizer, for text. Packs and runs nothing.

A multimodal checkpoint is loaded with transformers' class for it; the parts that text does not use are dropped.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoints import claims, gguf_file, gguf_model, gguf_tokenizer, packed_layers
from engine.checkpoints.checkpoint import Checkpoint
from engine.checkpoints.gguf.stream import GGUFStream
from engine.checkpoints.gguf_file import GGUFFile
from engine.checkpoints.json_files import read_json
from engine.checkpoints.streamed import tensor_reader
from engine.checkpoints.streamed.layers import StreamedModel, Streaming
from engine.checkpoints.streamed.quantizer import as_quantizer
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.stored_linear import StoredLinear
from engine.compute.discovery import embedding_rows, input_device
from engine.config import ModelConfig
from engine.errors import LoadError, NotEnoughMemory, one_line, out_of_memory

__all__ = ["check_vocabulary", "dropped_tensors", "load_model", "load_tokenizer"]

log = logging.getLogger("verbatim.engine")

_COMPUTED = re.compile(r"(inv_freq|position_ids|masked_bias|causal_mask|_extra_state)$")
"""Names of buffers that older releases of transformers stored."""
_QUANTISED = re.compile(r"scale|zero|g_idx|absmax|quant|shape|packed")
"""Names of what a quantised layer stores beside its weight."""


def load_model(
    config: ModelConfig,
    found: Checkpoint,
    dtype: torch.dtype,
    device_map: Any,
    file: GGUFFile | None,
    *,
    packed: bool = False,
    kernels: Kernels | None = None,
    streaming: Streaming | None = None,
) -> nn.Module:
    """Load the model with all its weights, ready to compute.

    Args:
        file: the header, if the checkpoint is a GGUF file.
        packed: leave quantised layers packed, as `PackedLayer`; see `packed_layers.can_stay_packed`.
        kernels: those for which a GGUF file's quantised weights stay packed; None: they are widened.
        streaming: pack weights while they are read, from a folder.

    Raises:
        LoadError: transformers cannot load it, or weights are missing; NotEnoughMemory.
    """
    if file is None:
        model = _from_folder(config, found, dtype, device_map, packed, streaming)
    else:
        from transformers import AutoModelForCausalLM

        stream = None if kernels is None else GGUFStream(file, kernels, config.id)
        with gguf_file.fast_reading(), stream.reading() if stream else nullcontext():
            model = _from_pretrained(AutoModelForCausalLM, config, found, dtype, device_map)
            gguf_model.complete_model(file, model, config.id)
        if stream:
            stream.install(model)
    model.eval().requires_grad_(False)
    _drop_other_modalities(model)
    return model


def _from_folder(
    config: ModelConfig,
    found: Checkpoint,
    dtype: torch.dtype,
    device_map: Any,
    packed: bool,
    streaming: Streaming | None,
) -> nn.Module:
    """Load with the causal class if it exists and finds its weights, else with the class for images and text."""
    classes = _classes(config, found)
    for auto in classes[:-1]:
        try:
            return _from_pretrained(auto, config, found, dtype, device_map, packed, streaming)
        except NotEnoughMemory:
            raise
        except LoadError as error:
            log.info("%s: %s", config.id, error.message)
    return _from_pretrained(classes[-1], config, found, dtype, device_map, packed, streaming)


def _classes(config: ModelConfig, found: Checkpoint) -> list[Any]:
    """Return transformers' auto classes that know a checkpoint's type, the one for text first.

    Raises:
        LoadError: an encoder-decoder, or a model with a way to generate of its own: neither continues a text.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    settings = _settings(config, found.folder)
    if getattr(settings, "is_encoder_decoder", False):
        raise LoadError(
            f"{config.id}: {settings.model_type} is an encoder-decoder; only models that continue are served."
        )
    causal = type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING
    if type(settings) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return [AutoModelForCausalLM]
    if causal:
        return [AutoModelForCausalLM, AutoModelForImageTextToText]
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(settings)]
    if getattr(kind, "generate", None) is not GenerationMixin.generate:
        raise LoadError(f"{config.id}: {kind.__name__} does not generate text token by token, and is not served.")
    return [AutoModelForImageTextToText]


def _settings(config: ModelConfig, folder: Path) -> Any:
    """Read the configuration as transformers does.

    Raises:
        LoadError: it is not valid, or of a type that this transformers does not know.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a configuration may be wrong in any way; the words are what helps
        raise LoadError(
            f"{config.id}: transformers cannot load the config.json of {folder}: {one_line(error)}"
        ) from error


def _from_pretrained(
    auto: Any,
    config: ModelConfig,
    found: Checkpoint,
    dtype: torch.dtype,
    device_map: Any,
    packed: bool = False,
    streaming: Streaming | None = None,
) -> nn.Module:
    folder = found.folder
    if folder.is_dir():
        _check_size(auto, config, found)
    streamed = None if streaming is None else StreamedModel(streaming)
    try:
        with _source(config, folder) as source, _streamed(config, found, streamed, source):
            if packed:
                source["config"] = settings = _settings(config, folder)
                settings.quantization_config = packed_layers.describe(found, config.id)
            model, report = auto.from_pretrained(
                **source,
                dtype=dtype,
                device_map=device_map,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name; transformers does not name them
            )
    except Exception as told:  # any of a hundred architectures may object in its own way; the words are what helps
        error = (streamed and streamed.error) or told
        if isinstance(error, LoadError) and error.message.startswith(f"{config.id}: "):
            raise error from None
        if out_of_memory(error):
            raise NotEnoughMemory(
                f"{config.id}: memory ran out while the weights were read: {one_line(error)}"
            ) from error
        raise LoadError(f"{config.id}: transformers cannot load {folder}: {one_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would fill them with random numbers and answer noise
        raise LoadError(
            f"{config.id}: the checkpoint lacks {len(missing)} tensors of {type(model).__name__}: {missing[0]}, …"
        )
    mismatched = sorted([*report["mismatched_keys"], *(streamed.mismatched if streamed else ())], key=str)
    if mismatched:
        tensor, stored, wanted = mismatched[0]
        raise LoadError(
            f"{config.id}: {tensor} has the shape {list(stored)} in the checkpoint, and {type(model).__name__} with "
            f"this configuration wants {list(wanted)} ({len(mismatched)} such tensors)."
        )
    dropped = dropped_tensors(model, report["unexpected_keys"], found)
    if dropped:  # transformers would go on without them
        raise LoadError(
            f"{config.id}: the checkpoint holds {dropped[0]}, for which {type(model).__name__} with this configuration "
            f"has no place ({len(dropped)} such tensors): its replies would be wrong. Does config.json belong to it?"
        )
    if streamed is not None:
        streamed.finish(model)
    return model  # type: ignore[no-any-return]


@contextmanager
def _streamed(
    config: ModelConfig, found: Checkpoint, streamed: StreamedModel | None, source: dict[str, Any]
) -> Iterator[None]:
    """Add to `source` what makes transformers hand weights to `streamed` inside the `with` block; nothing for None."""
    if streamed is None:
        yield
        return
    settings = _settings(config, found.folder)
    for part in (settings, settings.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    quantization, stays = as_quantizer(streamed)
    source |= {"config": settings, "quantization_config": quantization}
    with tensor_reader.reading(found, config.id, stays):
        yield


def _check_size(auto: Any, config: ModelConfig, found: Checkpoint) -> None:
    """Refuse a configuration of a far larger model, before transformers allocates what the files do not hold."""
    if config.trust_remote_code:  # its code can allocate anything anyway
        return
    settings = _settings(config, found.folder)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    try:
        with torch.device("meta"):
            model = auto.from_config(settings, trust_remote_code=False)
    except Exception:  # reading the weights will report it
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    claims.check_size(parameters, sum(b.numel() * b.itemsize for b in model.buffers()), found, config.id)


def dropped_tensors(model: nn.Module, unexpected: Iterable[str], found: Checkpoint) -> list[str]:
    """List the tensors that the model has no place for, although its results depend on them.

    From a GGUF file all of them. From a folder, parameters of modules that exist and have others: a bias of a linear
    layer without one, say. Missing modules may have good reasons (images and sound, layers that predict several tokens,
    heads of another task), as may buffers that are computed and scales of another dtype.
    """
    if found.folder.is_file():
        return sorted(set(unexpected) - {"rope_freqs.weight"})
    modules = dict(model.named_modules())
    dropped = []
    for key in sorted(unexpected):
        place, _, own = key.rpartition(".")
        parent = modules.get(place)
        if parent is None or next(parent.parameters(recurse=False), None) is None or _COMPUTED.search(own):
            continue
        if not ("quantization_config" in str(found.config) and _QUANTISED.search(own)):
            dropped.append(key)
    return dropped


@contextmanager
def _source(config: ModelConfig, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the keywords that tell transformers where to look: a folder, or a GGUF file with no file beside it."""
    if folder.is_file():
        with gguf_file.alone(folder) as source:
            yield source
    else:
        yield {"pretrained_model_name_or_path": folder, "trust_remote_code": config.trust_remote_code}


# -- the parts for images and sound -----------------------------------------------------------------------------------


def _drop_other_modalities(model: nn.Module) -> None:
    """Drop the parts of a multimodal model that text does not pass through; the logits keep their bits.

    A few tokens are computed before and after; if their logits differ, the parts stay.
    """
    settings: Any = model.config
    base = getattr(model, "base_model", model)
    if settings.get_text_config() is settings or base is model:
        return
    try:
        text = model.get_decoder()  # type: ignore[operator]
    except Exception:  # not every class has a decoder; without one, everything stays
        return
    inside = set(text.modules())
    others = {
        n: part for n, part in base.named_children() if not inside & set(part.modules()) and _has_parameters(part)
    }
    if text is base or not others:
        return
    texts = _texts(model)
    before = [_logits(model, tokens) for tokens in texts]
    if before[0] is None:
        return
    for part in others:
        base._modules[part] = None
    after = [_logits(model, tokens) for tokens in texts]
    if all(one is None or (two is not None and torch.equal(one, two)) for one, two in zip(before, after, strict=True)):
        log.info("%s: text only, without %s", type(model).__name__, ", ".join(others))
    else:
        base._modules.update(others)


def _has_parameters(part: nn.Module) -> bool:
    return next(part.parameters(), None) is not None or any(isinstance(m, StoredLinear) for m in part.modules())


def _texts(model: nn.Module) -> list[list[int]]:
    """Return token ids to try: ordinary ones, and those that stand for an image or a sound, which a text may spell."""
    settings: Any = model.config
    rows = embedding_rows(model)
    named = [value for key, value in settings.to_dict().items() if key.endswith(("_token_id", "_token_index"))]
    placeholders = sorted({value for value in named if isinstance(value, int) and 0 <= value < rows})
    return [list(range(3, 11)), [3, *placeholders, 4]]


@torch.inference_mode()
def _logits(model: nn.Module, tokens: list[int]) -> torch.Tensor | None:
    """Run a forward pass as the runners do; None if the model cannot."""
    device = input_device(model)
    ids = torch.tensor([tokens], dtype=torch.int64, device=device)
    try:
        logits: torch.Tensor = model(ids, position_ids=torch.arange(len(tokens), device=device)[None], use_cache=False)[
            0
        ]
    except Exception:  # whatever an unknown architecture does
        return None
    return logits


# -- the tokenizer ---------------------------------------------------------------------------------------------------


def load_tokenizer(config: ModelConfig, folder: Path, file: GGUFFile | None) -> Any:
    """Load the tokenizer, with the chat templates that lie beside it.

    Raises:
        LoadError: it cannot be loaded, or has no fast form.
    """
    from transformers import AutoTokenizer

    if file is None:
        _settings(config, folder)  # it chooses the tokenizer's class, whose error would hide its own
    try:
        with _source(config, folder) as source, gguf_file.fast_reading() if file else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(**source, local_files_only=True)
    except Exception as error:
        raise LoadError(f"{config.id}: cannot load the tokenizer of {folder}: {one_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise LoadError(
            f"{config.id}: {type(tokenizer).__name__} has no tokenizer.json; only fast tokenizers are served."
        )
    if file is not None:
        gguf_tokenizer.complete_tokenizer(file, tokenizer, config.id)
    else:
        _complete_templates(tokenizer, folder, config.id)
    return tokenizer


def _complete_templates(tokenizer: Any, folder: Path, name: str) -> None:
    """Add what transformers leaves out: a processor's template; a default that stands elsewhere than the named ones."""
    given = tokenizer.chat_template
    if given is None:
        tokenizer.chat_template = _processor_templates(folder, name)
    elif isinstance(given, dict) and "default" not in given:
        own = read_json(folder / "tokenizer_config.json", name).get("chat_template")
        default = own if isinstance(own, str) else _processor_templates(folder, name)
        if isinstance(default, str):
            tokenizer.chat_template = {**given, "default": default}


def _processor_templates(folder: Path, name: str) -> str | dict[str, str] | None:
    """Read the templates of `chat_template.json`, where older processors of transformers keep them."""
    path = folder / "chat_template.json"
    if not path.exists():
        return None
    given = read_json(path, name).get("chat_template")
    if isinstance(given, list) and all(isinstance(item, dict) for item in given):
        given = {item.get("name"): item.get("template") for item in given}
    texts = given.values() if isinstance(given, dict) else [given]
    if not all(isinstance(text, str) for text in texts):
        raise LoadError(f"{name}: {path} holds no chat template: chat_template must be text, or texts by name.")
    return given


def check_vocabulary(config: ModelConfig, tokenizer: Any, model: nn.Module) -> None:
    """Refuse a tokenizer of another model: one with ordinary tokens for which the embedding has no rows.

    Added tokens may lie beyond it (Gemma 3's for images do); a request whose text holds one is refused.
    """
    rows = embedding_rows(model)
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    highest = max(vocabulary.values(), default=-1)
    if highest >= rows:
        raise LoadError(
            f"{config.id}: the tokenizer's ids go up to {highest}, but the model embeds only {rows} tokens: it is "
            "another model's tokenizer."
        )
    if not vocabulary:
        raise LoadError(f"{config.id}: the tokenizer knows no tokens.")
    if len(set(vocabulary.values())) < len(vocabulary):  # one of the two would be written as the other
        raise LoadError(f"{config.id}: the tokenizer gives one id to several of its {len(vocabulary)} tokens.")
