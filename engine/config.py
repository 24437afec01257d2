"""Read models.yaml into `ModelConfig`s. Reads and checks a file; loads nothing, knows nothing of torch or of HTTP.

Every key is checked: an unknown one is an error that suggests the nearest known one.
"""

from __future__ import annotations

import datetime as dt
import difflib
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.errors import ConfigError, VerbatimError
from engine.types.sampling_params import SamplingParams

M = TypeVar("M", bound=BaseModel)

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|balanced|balanced_low_0|sequential")


class AdapterEntry(BaseModel):
    """One adapter (LoRA) of an entry."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    """What follows the entry's id and a colon in the name that requests use."""
    path: Path
    """A folder with adapter_config.json and adapter_model.safetensors, as PEFT writes them."""
    merge: bool = False
    """Add the adapter to the weights at load, and serve the result under the entry's own id."""

    @property
    def files(self) -> tuple[Path, Path]:
        """The files that are read: the configuration, and the weights."""
        return self.path / "adapter_config.json", self.path / "adapter_model.safetensors"


class ModelConfig(BaseModel):
    """One entry of models.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    id: str = Field(min_length=1, max_length=256)
    """The name that requests use."""
    path: Path | None = None
    """A folder with a checkpoint, or a GGUF file; relative to the file that names it."""
    repo: str | None = None
    """A hub id, looked up in the local hub cache (and pulled only if the server was started with --pull)."""
    builtin: Literal["demo", "noise"] | None = None
    """`demo`: the very small chat model that comes with verbatim. `noise`: a tiny model with random weights, written
    on first use, for tests."""
    revision: str | None = None
    """With repo: a branch, tag or commit. Default: main."""
    load: Literal["at_start", "on_demand"] = "at_start"
    """When the model is loaded: when the server starts, or for the first request that names it. That request waits."""
    idle_seconds: float | None = Field(default=None, gt=0)
    """Seconds without a request after which the model is unloaded; the next request loads it again. Default: never."""
    max_load_seconds: float = Field(default=600.0, gt=0)
    """A request that has waited longer for a model that is being loaded for it is refused; the loading goes on."""
    device: str = "auto"
    """`auto` takes a GPU when there is one; or `cpu`, `cuda`, `cuda:N`, or an accelerate device map (`balanced`, …)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: float32 on a CPU (a bfloat16 checkpoint widens exactly). On a GPU the checkpoint's own, but bfloat16 for
    a float32 checkpoint of more than two billion parameters, and float16 in place of bfloat16 on a GPU that is older
    than Ampere."""
    gpu: Literal["auto", "no-graphs", "no-kernels"] = "auto"
    """For finding faults of a GPU, on which `auto` takes whatever passes the self-test. `no-graphs`: each step is
    launched anew, slower and with the same bits. `no-kernels`: torch's own operations compute, and the law is not
    promised."""
    quantization: Literal["none", "int8", "int4"] | None = None
    """Default: weights are computed with as the checkpoint stores them. On a CPU, those that come quantised (GGUF,
    GPTQ, AWQ, compressed-tensors) stay so, and the inputs of their layers are rounded to bytes in groups of 32; without
    a C compiler, or with a merged adapter, they are widened. `none` widens them: the numbers of plain transformers,
    four bytes each. `int8`, `int4`: weights of linear layers are rounded at load, and on a CPU their inputs at every
    step. Takes less memory and is faster; replies differ from those without it and are just as reproducible. Needs a C
    compiler on a CPU."""
    context_length: int | None = Field(default=None, ge=2)
    """Tokens of prompt and answer together. Default: the checkpoint's, as far as the cache holds it. A model with
    LongRoPE uses its long factors if this is beyond its original context (docs/decisions/0017)."""
    cache_size: int | None = Field(default=None, gt=0)
    """Bytes for keys and values, also as '4GiB'. Default: a quarter of the free memory on a CPU, what weights and the
    largest step leave on a GPU; never more than all sequences can use."""
    max_sequences: int = Field(default=16, ge=1, le=1024)
    """Choices that run at once; more wait."""
    max_batch_tokens: int = Field(default=512, ge=1)
    """Tokens in one forward pass: long prompts are cut into chunks of at most this."""
    max_queue: int = Field(default=256, ge=0)
    """Requests that may wait; one more is refused."""
    max_queue_seconds: float | None = Field(default=None, gt=0)
    """A request that has waited longer in the queue is refused. Default: no limit."""
    max_choices: int = Field(default=16, ge=1)
    """The largest `n`."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The server's own cap on generated tokens."""
    prefix_cache: bool = True
    """Keep the keys and values of finished requests, while there is memory, for prompts with the same beginning."""
    share_prefix_cache: bool = False
    """Let requests of one key use the cached prompts of another. The number of cached tokens, and how soon a reply
    begins, then tell a key how another key's prompts begin. Default: each key finds its own prompts only."""
    speculation: Literal["off", "ngram"] = "off"
    """`ngram`: draft the tokens that followed the same tokens earlier in the text. Replies are the same, and arrive
    sooner where text repeats itself. Not used where the self-test finds that bits depend on the rows of a step."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads. Default: one per core. Bits do not depend on it; time does."""
    isolation: Literal["process", "thread"] = "process"
    """`process`: the model runs in a process of its own. A crash, a driver's fault or want of memory ends this model's
    requests and nothing else, and unloading it gives all its memory back. `thread`: it runs inside the server, which
    takes a few hundred MiB less. Replies are the same."""
    chat_template: Path | None = None
    """A Jinja file in place of the checkpoint's own template."""
    response_template: Path | None = None
    """A JSON file that says how to split replies into thoughts, answer and tool calls, in place of the tokenizer's own
    and of what is derived from the chat template. The format is transformers'."""
    content_special_tokens: Literal["split", "parse"] = "split"
    """How control tokens in messages (`<|im_end|>`) are read: `split` reads them as plain text, `parse` as the tokens,
    as if the template had written them (docs/decisions/0021)."""
    template_clock: dt.datetime | None = None
    """What `strftime_now` sees in templates that print today's date. Default: the real clock."""
    sampling: dict[str, Any] = Field(default_factory=dict)
    """Defaults for sampling fields that a request leaves out; they override the checkpoint's generation_config.json."""
    adapters: tuple[AdapterEntry, ...] = ()
    """LoRA adapters in PEFT's format: a list of mappings with `name`, `path` and `merge`, or a mapping from names to
    paths. Each is a model of its own, `ID:NAME`, computed beside the base on a CPU in float32. With `merge: true`, for
    the only adapter of an entry, it is added to the weights, and the entry's own id serves the result."""
    trust_remote_code: bool = False
    """Run Python files that come with the checkpoint. They can do anything on this machine."""
    stall_timeout: float = Field(default=120.0, gt=0)
    """Seconds without a finished step, while there is work, after which the model is reported as not ready."""

    @field_validator("cache_size", mode="before")
    @classmethod
    def _parse_size(cls, value: Any) -> Any:
        return parse_size(value) if isinstance(value, str) else value

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError(f"{value!r} is not a device; write auto, cpu, cuda, cuda:N or balanced")
        return value

    @field_validator("template_clock", mode="before")
    @classmethod
    def _parse_clock(cls, value: Any) -> Any:
        # YAML reads 2026-01-31 as a date; a date means its first second.
        if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
            return dt.datetime(value.year, value.month, value.day)
        return value

    @field_validator("adapters", mode="before")
    @classmethod
    def _list_adapters(cls, value: Any) -> Any:
        if isinstance(value, dict):  # by name: a path, or a mapping of the other keys
            return [{"name": name, **(of if isinstance(of, dict) else {"path": of})} for name, of in value.items()]
        return value

    @field_validator("adapters")
    @classmethod
    def _check_adapters(cls, value: tuple[AdapterEntry, ...]) -> tuple[AdapterEntry, ...]:
        names = [adapter.name for adapter in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} is used twice")
        merged = [adapter.name for adapter in value if adapter.merge]
        if merged and len(value) > 1:
            raise ValueError(
                f"{merged[0]!r} is merged, so it must be the only adapter: the others were made for the weights "
                "without it; give it an entry of its own"
            )
        return value

    @field_validator("sampling")
    @classmethod
    def _check_sampling(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            SamplingParams.merged(value)
        except VerbatimError as error:
            raise ValueError(error.message) from None
        return value

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if sum(source is not None for source in (self.path, self.repo, self.builtin)) != 1:
            raise ValueError("give exactly one of path (a folder), repo (a hub id) and builtin")
        return self

    @property
    def adapter_ids(self) -> tuple[str, ...]:
        """The ids under which adapters are served beside the model."""
        return tuple(adapter_id(self.id, adapter.name) for adapter in self.adapters if not adapter.merge)

    @property
    def rounding(self) -> Literal["int8", "int4"] | None:
        """To what weights are rounded at load; None if they are not."""
        return None if self.quantization == "none" else self.quantization

    @property
    def merged_adapter(self) -> AdapterEntry | None:
        """The adapter that is added to the weights, if any."""
        return next((adapter for adapter in self.adapters if adapter.merge), None)


def parse_size(text: str) -> int:
    """Return the bytes that a text like `4GiB` names. Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a size; write 4GiB, 500MB or a number of bytes")
    return int(float(match[1]) * _UNITS[(match[2] or "B").lower()])


def adapter_id(model_id: str, name: str) -> str:
    """Return the id of a model with one of its adapters."""
    return f"{model_id}:{name}"


def parse_models(entries: Any, *, base: Path, where: str) -> tuple[ModelConfig, ...]:
    """Check a list of entries as read from YAML; relative paths are taken from `base`.

    Raises:
        ConfigError: names the entry, the key, the value and, for an unknown key, the nearest known one.
    """
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{where}: 'models' must be a list with at least one entry.")
    models = []
    for number, entry in enumerate(entries):
        name = f"{where}: models[{number}]"
        if not isinstance(entry, dict):
            raise ConfigError(f"{name} must be a mapping of keys to values, not {entry!r}.")
        models.append(validate(ModelConfig, _absolute(entry, base), name))
    seen: set[str] = set()
    for model in models:
        for model_id in (model.id, *model.adapter_ids):
            if model_id in seen:
                raise ConfigError(f"{where}: the id {model_id!r} is used twice.")
            seen.add(model_id)
    return tuple(models)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the top-level mapping of a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable or not a mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping with a key 'models'.")
    return data


def entry_of(model: str, where: str, name: str | None = None) -> dict[str, Any]:
    """Build the entry for a model that is a folder, a GGUF file or a hub id. Its id is `name`, or derived from it.

    Raises:
        ConfigError: it is none of these. `where`: begins the message.
    """
    path = Path(os.path.abspath(Path(model).expanduser()))  # links stay: in the hub's cache only the link has a name
    if path.is_dir() or path.is_file():
        return {"id": name or (path.stem if path.suffix == ".gguf" else path.name), "path": path}
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and path.suffix != ".gguf":
        return {"id": name or model, "repo": model}
    raise ConfigError(
        f"{where}: there is no folder {model}, no such GGUF file, and it is not a hub id like Qwen/Qwen3-0.6B."
    )


def validate(model: type[M], data: dict[str, Any], where: str) -> M:
    """Build `model` from `data`; turn pydantic's report into one readable ConfigError."""
    try:
        return model(**data)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                *path, name = item["loc"]
                known = list(_mapping_at(model, path).model_fields)
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
                lines.append(f"unknown key {key!r}{hint}")
            else:
                message = item["msg"].removeprefix("Value error, ").rstrip(".")
                lines.append(f"{key}: {message} (got {item['input']!r})" if key else message)
        raise ConfigError(f"{where}: {'; '.join(lines)}.") from None


def _mapping_at(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    """Return the mapping that a path of keys leads to, as far as each key's value is one."""
    for part in path:
        if isinstance(part, int):  # an item of a list, whose kind is known already
            continue
        field = model.model_fields.get(part)
        kinds = () if field is None else (field.annotation, *typing.get_args(field.annotation))
        found = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if found is None:
            break
        model = found
    return model


def _absolute(entry: dict[str, Any], base: Path) -> dict[str, Any]:
    entry = dict(entry)
    for key in ("path", "chat_template", "response_template"):
        if isinstance(entry.get(key), str):
            entry[key] = _absolute_path(entry[key], base)
    adapters = entry.get("adapters")
    if isinstance(adapters, list):
        entry["adapters"] = [_absolute(one, base) if isinstance(one, dict) else one for one in adapters]
    elif isinstance(adapters, dict):
        entry["adapters"] = {
            name: _absolute(of, base)
            if isinstance(of, dict)
            else _absolute_path(of, base)
            if isinstance(of, str)
            else of
            for name, of in adapters.items()
        }
    return entry


def _absolute_path(path: str, base: Path) -> Path:
    return Path(os.path.abspath(base / Path(path).expanduser()))
