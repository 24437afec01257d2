"""A GGUF file: what its header says, and what transformers must be helped with to read it right and in seconds.

transformers builds configuration, weights and tokenizer from such a file. For most architectures it reads the header
three times through the package gguf, which makes several arrays of each token of the vocabulary, and it skips keys that
it does not know. Here the header is read fast, and a file that says something that would be skipped is refused.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.checkpoint import Checkpoint, words
from engine.errors import LoadError

__all__ = ["GGUFFile", "fast_reading", "inspect", "open_file"]

log = logging.getLogger("verbatim.engine")

_TEMPLATE = "tokenizer.chat_template"
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_HARMLESS = frozenset({"vocab_size", "context_length", "rope.scaling.finetuned", "use_parallel_residual"})
"""Keys of an architecture that change no number: sizes that the tensors have anyway, and remarks."""
_CHECKED = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.sliding_window": "sliding_window",
    "attention.scale": "attention_multiplier",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "rope.scaling.original_context_length": "max_position_embeddings",
}
"""Keys that transformers may skip, and the attribute of its configuration that must then have their value."""
_PLAIN_SPLITS = frozenset({"gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion", "granite-docling"})
"""Values of `tokenizer.ggml.pre` whose words are split as GPT-2's, which is what transformers does by itself."""
_DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Those that cut every digit off first, and then split as GPT-2 does."""


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """The header of a file.

    Attributes:
        metadata: all keys; an array of strings or numbers is a list.
        sizes: number of values of each tensor, by its name in the file.
        types: of each tensor, as ggml names them (`Q4_1`).
        stored_bytes: of all tensors.
    """

    path: Path
    metadata: dict[str, Any]
    sizes: dict[str, int]
    types: dict[str, str]
    stored_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, as far as the file names them."""
        found = (self.metadata.get(f"tokenizer.ggml.{key}") for key in _ENDS)
        return tuple(value for value in found if isinstance(value, int))

    @property
    def chat_templates(self) -> dict[str, str] | None:
        """Its chat templates by name, `default` the unnamed one; None if it has none."""
        found = {
            key.removeprefix(_TEMPLATE).removeprefix(".") or "default": value
            for key, value in self.metadata.items()
            if (key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")) and isinstance(value, str)
        }
        return found or None


def inspect(file: GGUFFile) -> Checkpoint:
    """What a file says of its weights."""
    return Checkpoint(
        folder=file.path,
        files=(file.path,),
        config={"gguf": sorted(set(file.types.values()))},
        parameters=sum(file.sizes.values()),
        stored_bytes=file.stored_bytes,
        dtype="float32",
        embedding_parameters=file.sizes.get("token_embd.weight", 0),
        tied="output.weight" not in file.sizes,
        created=int(file.path.stat().st_mtime),
        end_ids=file.end_ids,
    )


def open_file(path: Path, name: str) -> GGUFFile:
    """Read a header.

    Raises:
        LoadError: the file is damaged, cut short or one of several parts, or the package gguf is missing.
    """
    try:
        reader = _reader_class()(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        end = max((t.data_offset + int(t.n_bytes) for t in reader.tensors), default=0)
    except ImportError:
        raise LoadError(
            f"{name}: {path.name} is a GGUF file, which needs the package gguf: pip install gguf."
        ) from None
    except Exception as error:  # the reader trusts what it reads: anything may come out of a damaged file
        raise LoadError(f"{name}: {path.name} is not a readable GGUF file ({words(error)}).") from None
    if end > path.stat().st_size:
        raise LoadError(f"{name}: {path.name} is cut short: {path.stat().st_size} bytes of {end}. Copy it again.")
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise LoadError(
            f"{name}: {path.name} is one of {parts} parts, which transformers does not read; join them with "
            "llama.cpp's `llama-gguf-split --merge`."
        )
    return GGUFFile(
        path,
        metadata,
        {t.name: int(t.n_elements) for t in reader.tensors},
        {t.name: t.tensor_type.name for t in reader.tensors},
        sum(int(t.n_bytes) for t in reader.tensors),
    )


# -- reading fast ----------------------------------------------------------------------------------------------------


def _reader_class() -> Any:
    """gguf's reader, with the arrays of the metadata read in one pass: a second in place of half a minute."""
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):  # type: ignore[misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            kind, length = struct.unpack_from("<IQ", self.data, orig_offs)
            items = GGUFValueType(kind)
            head = [self._get(orig_offs, "<u4"), self._get(orig_offs + 4, "<u8")]
            at = orig_offs + 12
            scalar = self.gguf_scalar_to_np.get(items)
            if scalar is not None:
                values = self._get(at, scalar, length).view(type=np.ndarray)
                end = at + values.nbytes
                parts = list(values.reshape(-1, 1))
            elif items == GGUFValueType.STRING:
                parts, end = _strings(self.data, at, length)
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            if len(parts) != length:
                raise ValueError("an array is longer than the file")
            return end - orig_offs, head + parts, list(range(2, 2 + length)), [GGUFValueType.ARRAY, items]

    return Reader


class _Text(bytes):
    """The bytes of a string, with the one method of an array that gguf calls."""

    def tobytes(self) -> bytes:
        return self


def _strings(data: Any, at: int, count: int) -> tuple[list[_Text], int]:
    """`count` strings from `at` on, and where they end."""
    view = memoryview(data)
    if count > (len(view) - at) // 8:
        raise ValueError("an array is longer than the file")
    parts = []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", view, at)
        parts.append(_Text(view[at + 8 : at + 8 + length]))
        at += 8 + length
    return parts, at


@contextmanager
def fast_reading() -> Iterator[None]:
    """Lend transformers, which imports both anew at each call, the reader above and tensor names that are made once.

    It asks for the names of all tensors once for every module of the model, and gguf makes them anew each time.
    """
    import gguf
    from gguf.gguf_reader import GGUFReader
    from gguf.tensor_mapping import get_tensor_name_map

    gguf.GGUFReader, gguf.get_tensor_name_map = _reader_class(), functools.cache(get_tensor_name_map)
    try:
        yield
    finally:  # the package's own, not what was found: two loads may overlap
        gguf.GGUFReader, gguf.get_tensor_name_map = GGUFReader, get_tensor_name_map


# -- what transformers skips -----------------------------------------------------------------------------------------


def complete_model(file: GGUFFile, model: nn.Module, name: str) -> None:
    """Give a model what its file says and transformers does not read: the factors of scaled rotary embeddings.

    Raises:
        LoadError: the file says something that would change the model's numbers and is not understood.
    """
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    prefix = f"{file.architecture}."
    read = _keys_read(file.architecture)
    for key, value in file.metadata.items():
        short = key.removeprefix(prefix)
        if read is not None and key.startswith(prefix) and short not in read and not _agrees(short, value, config):
            raise LoadError(
                f"{name}: {file.path.name} says {key} = {str(value)[:60]}, which transformers does not read: its "
                "replies would be wrong. Serve the checkpoint that the file was made of."
            )
    longrope = next((tensor for tensor in file.sizes if tensor.startswith("rope_factors_")), None)
    if longrope:
        raise LoadError(
            f"{name}: {file.path.name} holds {longrope}, which transformers does not read: its replies would be wrong. "
            "Serve the checkpoint that the file was made of."
        )
    if "rope_freqs.weight" in file.sizes:
        _scale_frequencies(file, model, name)


def _keys_read(architecture: str) -> frozenset[str] | None:
    """Keys of an architecture that transformers reads; None where it reads all that there are."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:
        pass
    else:
        if architecture in GGUF_CONFIG_ARCHS:
            return None
    spelled = {architecture, architecture.replace("-", "_"), architecture.replace("moe", "_moe")}
    return frozenset(key for name in spelled for key in GGUF_CONFIG_MAPPING.get(name, ()))


def _agrees(key: str, value: Any, config: Any) -> bool:
    """Whether a key that is skipped says only what the configuration says anyway."""
    if key in _HARMLESS:
        return True
    if key == "rope.scaling.type":
        return str(value) == "none"
    if key in ("rope.scaling.factor", "rope.scaling.attn_factor"):
        return bool(value in (0.0, 1.0))
    if key not in _CHECKED:
        return False
    own = getattr(config, _CHECKED[key], None)
    if own is None and _CHECKED[key] == "head_dim":
        own = config.hidden_size // config.num_attention_heads
    return own is not None and bool(abs(float(own) - float(value)) <= 1e-6 * abs(float(value)))


def _scale_frequencies(file: GGUFFile, model: nn.Module, name: str) -> None:
    """Divide the rotary frequencies by `rope_freqs.weight`: Llama 3.1's scaling, as llama.cpp stores and applies it."""
    tensor = next(t for t in _reader_class()(file.path).tensors if t.name == "rope_freqs.weight")
    factors = torch.tensor(tensor.data.tolist(), dtype=torch.float32)
    rotary = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)]
    if not rotary or any(m.inv_freq.shape != factors.shape or getattr(m, "rope_type", "") != "default" for m in rotary):
        raise LoadError(
            f"{name}: {file.path.name} holds rope_freqs.weight, and {type(model).__name__} has no rotary embedding "
            "that it fits. Serve the checkpoint that the file was made of."
        )
    for module in rotary:
        for buffer in ("inv_freq", "original_inv_freq"):
            if hasattr(module, buffer):
                own = getattr(module, buffer)
                setattr(module, buffer, own / factors.to(own.device))


def complete_tokenizer(file: GGUFFile, tokenizer: Any, name: str) -> None:
    """Split words as the file's vocabulary wants it, and take its own named chat templates.

    Raises:
        LoadError: the file names a way to split that is not known: text would become other tokens than in training.
    """
    templates = file.chat_templates
    if templates is not None:
        tokenizer.chat_template = templates["default"] if list(templates) == ["default"] else templates
    how = file.metadata.get("tokenizer.ggml.pre")
    if file.metadata.get("tokenizer.ggml.model") != "gpt2" or how in _known_splits():
        return
    if how in (None, "default"):
        log.warning("%s: %s does not say how text is split into words: as GPT-2 does, then", name, file.path.name)
    elif how in _DIGIT_SPLITS:
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif how not in _PLAIN_SPLITS:
        raise LoadError(
            f"{name}: {file.path.name} splits text the way {how!r} (tokenizer.ggml.pre), which is not known here: its "
            "tokens would be wrong. Serve the checkpoint that the file was made of."
        )


def _known_splits() -> frozenset[str]:
    """Ways to split that transformers follows by itself."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return frozenset()
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)
