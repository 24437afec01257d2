"""Read a GGUF file's header fast, for this engine and for transformers. Knows nothing of models and tokenizers.

transformers builds configuration, weights and tokenizer from such a file. For most architectures it reads the header
three times through the package gguf, which makes several arrays of each token of the vocabulary; and it reads the files
beside it. Here the header is read in a second, and transformers sees the file alone.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import functools
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoints.checkpoint import Checkpoint
from engine.checkpoints.claims import check_gguf
from engine.errors import LoadError, one_line

__all__ = ["GGUFFile", "TensorPlace", "alone", "fast_reading", "inspect", "open_file", "reader_class"]

_TEMPLATE = "tokenizer.chat_template"
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_ENDING_NAMES = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>"),
        "<｜end▁of▁sentence｜>",
    }
)
"""Control tokens that end an answer whatever the file names: llama.cpp decides by these names, and files rely on it."""
_CONTROL = 3  # llama.cpp's type of control tokens
_HARMONY = {"<|return|>", "<|call|>", "<|end|>"}
"""Tokens of gpt-oss, which ends only a part of its answer with the last of them."""
_MOST_KEYS, _MOST_TENSORS, _MOST_ENTRIES = 10_000, 100_000, 3_000_000
"""Limits of a header: an entry costs 230 bytes of memory, however short. The largest vocabularies have 1.3 million."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies in its file: at which byte, and how many; `shape`: of its numbers, as torch has it."""

    offset: int
    size: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """The header of a GGUF file.

    Attributes:
        metadata: all keys; an array of strings or numbers is a list.
        sizes: number of values of each tensor, by its name in the file.
        types: of each tensor, as ggml names them (`Q4_1`).
        stored_bytes: of all tensors.
        places: of each tensor.
    """

    path: Path
    metadata: dict[str, Any]
    sizes: dict[str, int]
    types: dict[str, str]
    stored_bytes: int
    places: dict[str, TensorPlace] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer: those that the file names, and control tokens in `_ENDING_NAMES`."""
        named = (self.metadata.get(f"tokenizer.ggml.{key}") for key in _ENDS)
        tokens, types = (self.metadata.get(f"tokenizer.ggml.{key}") or [] for key in ("tokens", "token_type"))
        spelled = {
            token: i
            for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
            if kind == _CONTROL and token in _ENDING_NAMES
        }
        if spelled.keys() >= _HARMONY:
            del spelled["<|end|>"]
        return tuple(sorted({*(value for value in named if isinstance(value, int)), *spelled.values()}))

    @property
    def chat_templates(self) -> dict[str, str] | None:
        """Return the file's chat templates by name, `default` the unnamed one; None if it has none."""
        found = {
            key.removeprefix(_TEMPLATE).removeprefix(".") or "default": value
            for key, value in self.metadata.items()
            if (key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")) and isinstance(value, str)
        }
        return found or None


def inspect(file: GGUFFile, as_stored_bytes: int = 0) -> Checkpoint:
    """Describe the weights of a GGUF file as a `Checkpoint`. as_stored_bytes: see there."""
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
        tensors=len(file.sizes),
        values=sum(file.sizes.values()),
        longest=max(file.sizes.values(), default=0),
        as_stored_bytes=as_stored_bytes,
    )


def open_file(path: Path, name: str) -> GGUFFile:
    """Read a file's header, within bounds.

    Raises:
        LoadError: the file is damaged, cut short or one of several parts, or the package gguf is missing.
    """
    try:
        from gguf import gguf_reader

        if not hasattr(gguf_reader.ReaderField, "contents"):
            raise ImportError("too old")
    except ImportError:
        raise LoadError(
            f"{name}: {path.name} is a GGUF file, which needs the package gguf: pip install 'gguf>=0.16,<0.20'."
        ) from None
    try:
        with path.open("rb") as handle:
            _check_counts(handle.read(24))
        reader = reader_class()(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        end = max((t.data_offset + int(t.n_bytes) for t in reader.tensors), default=0)
    except AttributeError:
        raise  # a release of gguf that this was not written for, and no fault of the file
    except Exception as error:  # the reader trusts what it reads: anything may come out of a damaged file
        raise LoadError(f"{name}: {path.name} is not a readable GGUF file ({one_line(error)}).") from None
    if end > path.stat().st_size:
        raise LoadError(f"{name}: {path.name} is cut short: {path.stat().st_size} bytes of {end}. Copy it again.")
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise LoadError(
            f"{name}: {path.name} is one of {parts} parts, which transformers does not read; join them with "
            "llama.cpp's `llama-gguf-split --merge`."
        )
    sizes = {t.name: int(t.n_elements) for t in reader.tensors}
    check_gguf(metadata, sizes, f"{name}: {path.name}")
    return GGUFFile(
        path,
        metadata,
        sizes,
        {t.name: t.tensor_type.name for t in reader.tensors},
        sum(int(t.n_bytes) for t in reader.tensors),
        {t.name: TensorPlace(t.data_offset, int(t.n_bytes), tuple(map(int, t.shape[::-1]))) for t in reader.tensors},
    )


# -- reading fast ----------------------------------------------------------------------------------------------------


def _check_counts(head: bytes) -> None:
    """Refuse a header that claims far more keys or tensors than any model has: 24 bytes can claim any number.

    And files for machines that put the high byte first, whose numbers gguf's dequantisation takes for others.
    """
    if len(head) < 24:
        raise ValueError("it is shorter than a header")
    if head[4:6] == b"\0\0":  # of the version
        raise ValueError("it was written for machines that put the high byte first")
    tensors, keys = struct.unpack_from("<QQ", head, 8)
    if keys > _MOST_KEYS or tensors > _MOST_TENSORS:
        raise ValueError(
            f"it has {keys} keys and {tensors} tensors; more than {_MOST_KEYS} and {_MOST_TENSORS} are not read"
        )


def reader_class() -> Any:
    """Return gguf's reader, changed to read the metadata's arrays in one pass: a second, not half a minute."""
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):  # type: ignore[misc]
        entries = 0

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, length = struct.unpack_from("<IQ", self.data, orig_offs)
            items = GGUFValueType(kind)
            self.entries += length
            if self.entries > _MOST_ENTRIES:
                raise ValueError(f"its arrays have {self.entries} entries; more than {_MOST_ENTRIES} are not read")
            head = [self._get(orig_offs, "<u4"), self._get(orig_offs + 4, "<u8")]
            at = orig_offs + 12
            parts: list[Any]
            scalar = self.gguf_scalar_to_np.get(items)
            if scalar is not None:
                values = self._get(at, scalar, length).view(type=np.ndarray)
                end = at + values.nbytes
                parts = list(values.reshape(-1, 1))
            elif items == GGUFValueType.STRING:
                parts, end = _strings(self.data, at, length)
            else:
                raise ValueError("arrays within arrays are not read")
            if len(parts) != length:
                raise ValueError("an array is longer than the file")
            return end - orig_offs, head + parts, list(range(2, 2 + length)), [GGUFValueType.ARRAY, items]

    return Reader


class _Text(bytes):
    """The bytes of a string, with the one method of an array that gguf calls."""

    def tobytes(self) -> bytes:
        return self


def _strings(data: Any, at: int, count: int) -> tuple[list[_Text], int]:
    """Read `count` strings from `at` on; return them and where they end."""
    view = memoryview(data)
    if count > (len(view) - at) // 8:
        raise ValueError("an array is longer than the file")
    parts = []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", view, at)
        parts.append(_Text(view[at + 8 : at + 8 + length]))
        at += 8 + length
        if at > len(view):
            raise ValueError("a string is longer than the file")
    return parts, at


@contextmanager
def fast_reading() -> Iterator[None]:
    """Give transformers the fast reader and cached tensor names inside the `with` block: it imports both at each call.

    It asks for the names of all tensors once for every module of the model, and gguf computes them anew each time.
    """
    import gguf
    from gguf.gguf_reader import GGUFReader
    from gguf.tensor_mapping import get_tensor_name_map

    gguf.GGUFReader, gguf.get_tensor_name_map = reader_class(), functools.cache(get_tensor_name_map)
    try:
        yield
    finally:  # the package's own, not what was found: two loads may overlap
        gguf.GGUFReader, gguf.get_tensor_name_map = GGUFReader, get_tensor_name_map


@contextmanager
def alone(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the keywords with which transformers' `from_pretrained` finds a GGUF file and no file beside it.

    A folder of downloads is no checkpoint: files there (`tokenizer_config.json`, an adapter) belong to other models,
    and could change the tokens or name code to run.
    """
    with tempfile.TemporaryDirectory(prefix="verbatim-gguf-") as folder:
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf", "trust_remote_code": False}
