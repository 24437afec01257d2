"""Inspect a checkpoint on disk before anything is loaded. Knows files and sizes; loads no tensor.

Reports everything that can be wrong with a folder, in one sentence that says what to do about it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints.json_files import check_file, read_json
from engine.checkpoints.noise_checkpoint import demo_model, ensure_noise_checkpoint
from engine.checkpoints.safetensors_file import read_header
from engine.config import ModelConfig
from engine.errors import LoadError

_FLOATS = {"F64", "F32", "F16", "BF16"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_PARSED_BY_LIBRARIES = ("tokenizer.json", "vocab.json", "tekken.json")
_READ_BY_LIBRARIES = (
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "processor_config.json", "preprocessor_config.json"),
)
_HIGHEST_ID = 1 << 24  # the largest vocabularies have 1.3 million
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}

_INT8, _SIX_BITS, _FOUR_BITS = 1 + 4 / 128, 0.75 + 1 / 32 + 2 / 256, 0.5 + 2 / 32 + 4 / 256
"""Bytes of a rounded number on a CPU, its share of scales included: `quantization: int8`, and the two kinds of int4."""
_SPREAD = 1.1
"""Bytes of packed groups over those of a quantised checkpoint: each of our groups has a scale of its own."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the configuration and the headers of a checkpoint say.

    Attributes:
        folder: the checkpoint's folder, or a GGUF file.
        files: the files with the weights that are loaded, sorted; the folder may hold others.
        parameters: number of floating-point values stored.
        stored_bytes: size of the tensors on disk.
        dtype: the most common floating-point type, as torch names it.
        embedding_parameters: those of the input embedding, if its name is known, else 0.
        tied: whether the output layer is the input embedding.
        created: Unix seconds of the newest file.
        end_ids: tokens that end an answer, if a GGUF file names them.
        tensors, values, longest: the number of tensors, of values in all of them, and the longest axis.
        as_stored_bytes: memory of a GGUF file's weights if its quantised ones stay packed; 0 if they cannot.
    """

    folder: Path
    files: tuple[Path, ...]
    config: dict[str, Any]
    parameters: int
    stored_bytes: int
    dtype: str
    embedding_parameters: int
    tied: bool
    created: int
    end_ids: tuple[int, ...] = ()
    tensors: int = 0
    values: int = 0
    longest: int = 0
    as_stored_bytes: int = 0

    def packed_bytes(self, rounds: str | None) -> int:
        """Estimate the model's memory in float32 on a CPU, packed while it was read.

        Args:
            rounds: `int8` or `int4`; `stored` for a checkpoint that comes quantised and stays so; None: not at all.
        """
        value = 2 if self.dtype == "bfloat16" else 4  # float16 is not a part of bfloat16
        table, head = self.embedding_parameters, 0 if self.tied else self.embedding_parameters
        if rounds == "stored" and self.as_stored_bytes:
            return self.as_stored_bytes
        if rounds == "stored":
            return round((self.stored_bytes - self.parameters * 2) * _SPREAD) + self.parameters * value
        if rounds == "int4":
            return round(_FOUR_BITS * (self.parameters - table - head) + _SIX_BITS * (table + head))
        if rounds == "int8":
            rounded = self.parameters - (0 if self.tied else table)
            return round(_INT8 * rounded) + table * (4 if self.dtype == "float32" else 2)
        return self.parameters * value

    def float32_bytes(self) -> int:
        """Estimate the model's memory in packed float32: a tied embedding is held in its own dtype and packed once."""
        extra = self.embedding_parameters * (2 if self.dtype != "float32" else 4) if self.tied else 0
        return self.parameters * 4 + extra


def locate(config: ModelConfig, *, pull: bool) -> Path:
    """Find the folder or GGUF file of an entry's checkpoint.

    Raises:
        LoadError: it does not exist; says where it was looked for and what to do.
    """
    if config.path is not None:
        if config.path.suffix == ".gguf" and config.path.is_file():
            return config.path
        if config.path.is_file():
            raise LoadError(f"{config.id}: {config.path} is a file; give the folder of a checkpoint, or a .gguf file.")
        if not config.path.is_dir():
            raise LoadError(f"{config.id}: the folder {config.path} does not exist.")
        return config.path
    if config.builtin is not None:
        return demo_model() if config.builtin == "demo" else ensure_noise_checkpoint()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert config.repo is not None
    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        return Path(
            snapshot_download(config.repo, revision=config.revision, local_files_only=not pull, allow_patterns=patterns)
        )
    except LocalEntryNotFoundError:
        where = f"{config.repo} (revision {config.revision or 'main'})"
        raise LoadError(
            f"{config.id}: {where} is not in the local hub cache. Start with --pull to download it, "
            "or copy the checkpoint here and give its folder as path."
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise LoadError(f"{config.id}: cannot fetch {config.repo}: {error}") from error


def inspect(folder: Path, name: str) -> Checkpoint:
    """Read the configuration and the headers of all weights of a folder.

    Raises:
        LoadError: a file is missing, broken or of a kind that is not loaded.
    """
    check_places(folder, name)
    _check_kind(folder, name)
    config = read_json(folder / "config.json", name)
    files = _weight_files(folder, config, name)
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        # transformers would make an empty tokenizer of the right class and say nothing
        raise LoadError(f"{name}: {folder} holds no tokenizer.json.")
    _check_files(folder, name)
    counts: dict[str, int] = {}
    stored = embedding = tensors = values = longest = 0
    head = False
    for file in files:
        for key, tensor in read_header(file, name).items():
            stored += tensor.size
            tensors, values, longest = tensors + 1, values + tensor.numel, max(longest, *tensor.shape, 0)
            if tensor.dtype in _FLOATS:
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel
            if key.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")):
                embedding = tensor.numel
            head = head or key.endswith(("lm_head.weight", "embed_out.weight"))
    return Checkpoint(
        folder=folder,
        files=files,
        config=config,
        parameters=sum(counts.values()),
        stored_bytes=stored,
        dtype=_NAMES[max(counts, key=lambda k: counts[k], default="F32")],
        embedding_parameters=embedding,
        tied=not head,
        created=max(int(p.stat().st_mtime) for p in (folder / "config.json", *files)),
        tensors=tensors,
        values=values,
        longest=longest,
    )


def _check_files(folder: Path, name: str) -> None:
    """Refuse files beyond our bounds before a library reads them: most libraries parse anything, by recursion."""
    for file in _PARSED_BY_LIBRARIES:
        check_file(folder / file, name)
    for file in _READ_BY_LIBRARIES:
        if not (folder / file).exists():
            continue
        data = read_json(folder / file, name)
        ids: list[Any] = [*data.values()] if file == "added_tokens.json" else []
        if isinstance(added := data.get("added_tokens_decoder"), dict):
            ids += [int(i) for i in added if i.isdecimal()]
        highest = max((i for i in ids if isinstance(i, int)), default=0)
        if highest > _HIGHEST_ID:  # transformers fills the gap below it, token by token
            raise LoadError(f"{name}: {file} names a token {highest}; ids beyond {_HIGHEST_ID} are not read.")


def check_places(folder: Path, name: str) -> None:
    """Refuse links that leave the folder, and what is no regular file: a pipe never ends, `/etc/passwd` is no template.

    Weights may lie on another disk: reading them refuses any file that is not in safetensors format.
    """
    home = folder.resolve()
    inside = [home]
    if home.parent.name == "snapshots":  # the hub's cache: the contents lie beside, the snapshot holds links
        inside.append(home.parents[1] / "blobs")
    templates = folder / "additional_chat_templates"
    for path in (*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())):
        if path.is_dir() and path != templates:  # nothing is read there
            continue
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise LoadError(f"{name}: {path} is no regular file.")
        if path.suffix == ".safetensors":
            continue
        if path.exists() and not any(path.resolve().is_relative_to(place) for place in inside):
            raise LoadError(
                f"{name}: {path} is a link to {path.resolve()}, outside the checkpoint's folder: put the file itself "
                "there."
            )


def _check_kind(folder: Path, name: str) -> None:
    """Refuse folders that hold no checkpoint of a whole model, or one and an adapter beside it."""
    adapter, whole = (folder / "adapter_config.json").exists(), (folder / "config.json").exists()
    if adapter and not whole:
        base = read_json(folder / "adapter_config.json", name).get("base_model_name_or_path")
        raise LoadError(
            f"{name}: {folder} holds an adapter (LoRA) for {base or 'another model'}, not a model: serve that one, and "
            "name this folder under adapters in its entry."
        )
    if adapter:  # transformers would load it if peft is installed, and ignore it if not
        raise LoadError(
            f"{name}: {folder} holds an adapter (adapter_config.json) beside a whole model: move the adapter's files "
            "into a folder of their own, and name that under adapters in the entry to serve it."
        )
    ggufs = sorted(p.name for p in folder.glob("*.gguf"))
    if ggufs and not whole:
        raise LoadError(f"{name}: {folder} holds GGUF files: give one of them, such as {folder / ggufs[0]}.")


def _weight_files(folder: Path, config: dict[str, Any], name: str) -> tuple[Path, ...]:
    """Return the files that transformers loads: `model.safetensors`, or else those that the index names."""
    if _names_weights(config):
        raise LoadError(
            f"{name}: config.json names other weights in transformers_weights, which is not honoured: call them "
            "model.safetensors, or name them in model.safetensors.index.json, and take the key out."
        )
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    shards = _shards(index, name) if index.exists() else ()
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    distributed = next((file for file in others if _DISTRIBUTED.match(file)), None)
    if distributed:
        raise LoadError(
            f"{name}: {folder} holds {distributed}, a part of a distributed checkpoint, which transformers would load "
            "in place of the others: save the model whole, with save_pretrained()."
        )
    if single.exists():
        return (single,)
    if shards:
        return shards
    if others:
        raise LoadError(
            f"{name}: {folder} holds {others[0]}, but neither model.safetensors nor model.safetensors.index.json, "
            "which transformers loads; take the checkpoint in transformers' format."
        )
    pickled = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
    hint = f" {pickled[0]} can run code when it is opened and is not loaded; convert it." if pickled else ""
    raise LoadError(f"{name}: {folder} holds no *.safetensors file.{hint}")


def _names_weights(config: Any) -> bool:
    """Tell whether a configuration, or one inside it, names files that transformers takes for the weights."""
    if not isinstance(config, dict):
        return False
    return config.get("transformers_weights") is not None or any(_names_weights(part) for part in config.values())


def _shards(index: Path, name: str) -> tuple[Path, ...]:
    weight_map = read_json(index, name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise LoadError(f"{name}: {index} names no weight files in weight_map.")
    files = set(weight_map.values())
    elsewhere = next((file for file in sorted(files) if file != Path(file).name or "\\" in file), None)
    if elsewhere is not None:
        raise LoadError(f"{name}: {index} names {elsewhere!r}, which is no name of a file beside it.")
    needed = {index.parent / file for file in files}
    missing = sorted(file.name for file in needed if not file.is_file())
    if missing:
        raise LoadError(
            f"{name}: {index.parent} lacks {len(missing)} of {len(needed)} weight files: {', '.join(missing[:3])}."
        )
    return tuple(sorted(needed))


def prepare_environment(*, pull: bool) -> None:
    """Set the environment variables that libraries read once: at the first matrix product, hub call or use of a GPU.

    `MKL_CBWR`: attention's matrix products then keep their bits from shape to shape (docs/decisions/0002).
    `ONEDNN_MAX_CPU_ISA`: no AMX, whose bfloat16 products depend on the number of rows, and no instructions that
    `ATEN_CPU_CAPABILITY` forbids torch.
    `CUBLAS_WORKSPACE_CONFIG`: cuBLAS then gives products of one shape the same bits every time (NVIDIA's manual,
    "Results reproducibility"). `PYTORCH_ALLOC_CONF`: memory that steps of one size have freed serves steps of another;
    torch reads it on first use, and not at all where `PYTORCH_CUDA_ALLOC_CONF` is set.
    Values that the user has set are kept; the self-test judges them.
    """
    import torch

    limits = {"AVX512": ("AVX512,STRICT", "AVX512_CORE_BF16"), "AVX2": ("AVX2,STRICT", "AVX2")}
    limit = limits.get(torch.backends.cpu.get_cpu_capability())
    if limit:
        os.environ.setdefault("MKL_CBWR", limit[0])
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", limit[1])
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not pull:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
