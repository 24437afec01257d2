"""Read an adapter's adapter_config.json, and refuse by name whatever changes numbers and is not computed here.

Format: `peft.LoraConfig` (https://github.com/huggingface/peft). A key that is not known must be off (null, false or
empty), as PEFT's own keys are by default. Knows no tensor.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from engine.adapters.patterns import first_match, is_named, matches
from engine.checkpoints.json_files import read_json
from engine.errors import LoadError

__all__ = ["AdapterSettings", "read_settings"]

_WITHOUT_EFFECT: Final = frozenset(
    {"base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "lora_dropout"}
    | {"fan_in_fan_out", "megatron_core", "runtime_config", "qalora_group_size"}
    | {"eva_config", "corda_config", "lora_ga_config", "loftq_config"}
)
"""Keys that say where an adapter comes from and how it was trained, or what the layers themselves say: PEFT sets
`fan_in_fan_out` by the kind of layer. What an initialisation did to the base is asked of `init_lora_weights`."""

_OFF: Final = {
    "use_dora": "weights split into size and direction (DoRA)",
    "use_qalora": "pooled inputs (QA-LoRA)",
    "use_bdlora": "block-diagonal matrices",
    "lora_bias": "a bias of its own",
    "modules_to_save": "whole modules beside the adapter",
    "trainable_token_indices": "embeddings of its own for some tokens",
    "layer_replication": "layers that are computed more than once",
    "target_parameters": "adapters of parameters that are no layer's weight",
    "alora_invocation_tokens": "an adapter that begins at certain tokens (aLoRA)",
    "arrow_config": "routing between adapters",
    "kasa_config": "singular values of its own",
    "monteclora_config": "sampled weights",
    "velora_config": "compressed activations",
    "megatron_config": "layers of Megatron",
    "ensure_weight_tying": "adapters that are tied to each other",
}
"""Keys that change what is computed, and how; they must be off."""

_INITIALISED: Final = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it."""

_READ: Final = frozenset(
    {"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"}
)
_ALL_LINEAR: Final = "all-linear"
_LARGEST: Final = 1 << 20
_MOST_PATTERNS: Final = 1 << 14


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What an adapter's configuration says about the computation. Its methods raise `BadPattern`.

    Attributes:
        rank, alpha: of layers that no pattern names; root: whether the product is scaled by α/√r, not by α/r.
        targets: the layers that are adapted: the ends of their names, an expression, or `all-linear`.
        excluded: layers that are not, though they are among the targets.
        layers, layers_under: numbers of the decoder layers that are adapted, and the names of the lists they are in.
        base: what it says it was trained for; for people only.
    """

    rank: int
    alpha: float
    root: bool
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] = ()
    layers_under: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base: str = ""

    def covers(self, module: str, *, is_head: bool) -> bool:
        """Tell whether a linear layer is to be adapted, as PEFT decides it. `is_head`: it makes the logits."""
        if self.excluded and _is_among(self.excluded, module, "exclude_modules"):
            return False
        if self.targets == _ALL_LINEAR:
            return not is_head
        if isinstance(self.targets, str):
            return matches(self.targets, module, "target_modules")
        return is_named(self.targets, module) and (not self.layers or self._layer_of(module) in self.layers)

    def rank_of(self, module: str) -> int:
        return first_match(self.rank_pattern, module, self.rank, "rank_pattern")

    def scale_of(self, module: str) -> float:
        """Return the factor of a layer's product."""
        rank = self.rank_of(module)
        alpha = first_match(self.alpha_pattern, module, self.alpha, "alpha_pattern")
        return alpha / math.sqrt(rank) if self.root else alpha / rank

    def _layer_of(self, module: str) -> int | None:
        """Return the number of a module's decoder layer: the first number in its name, or that after a given list."""
        if not self.layers_under:
            found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
            return int(found[1]) if found else None
        parts = module.split(".")
        pairs = list(itertools.pairwise(parts))
        return next((int(n) for name in self.layers_under for at, n in pairs if at == name and n.isdecimal()), None)


def read_settings(path: Path, name: str) -> AdapterSettings:
    """Read an adapter's configuration.

    Raises:
        LoadError: it is missing or damaged, or says something that is not computed here; names the key.
    """
    data = read_json(path, name)
    try:
        _refuse_others(data)
        return AdapterSettings(
            rank=_count(data.get("r"), "r"),
            alpha=_number(data.get("lora_alpha"), "lora_alpha"),
            root=_flag(data.get("use_rslora"), "use_rslora"),
            targets=_names(data.get("target_modules"), "target_modules", required=True),
            excluded=_names(data.get("exclude_modules"), "exclude_modules"),
            layers=_layers(data),
            layers_under=_lists(data),
            rank_pattern={key: _count(value, key) for key, value in _table(data, "rank_pattern").items()},
            alpha_pattern={key: _number(value, key) for key, value in _table(data, "alpha_pattern").items()},
            base=str(data.get("base_model_name_or_path") or "")[:200],
        )
    except LoadError as error:
        raise LoadError(f"{name}: {path.name}: {error.message}") from None


def _refuse_others(data: Mapping[str, Any]) -> None:
    kind = data.get("peft_type")
    if kind != "LORA":
        raise LoadError(f"peft_type is {kind!r:.100}; only LORA is served.")
    if data.get("task_type") not in (None, "CAUSAL_LM"):
        raise LoadError(f"task_type is {data['task_type']!r:.100}; only CAUSAL_LM is served.")
    if data.get("bias", "none") != "none":
        raise LoadError(
            f"bias is {data['bias']!r:.100}: trained biases of the base are not read; only 'none' is served."
        )
    start = data.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in _INITIALISED:
        raise LoadError(
            f"init_lora_weights is {start!r:.100}, which changes the base model's weights: save the adapter as plain "
            "LoRA (PEFT's path_initial_model_for_weight_conversion)."
        )
    for key, value in data.items():
        if key in _WITHOUT_EFFECT or key in _READ or _is_off(value):
            continue
        if key in _OFF:
            raise LoadError(f"{key} asks for {_OFF[key]}, which is not served.")
        raise LoadError(f"{key[:100]!r} is not known, and is {value!r:.100}: what it changes would be left out.")


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _is_among(names: tuple[str, ...] | str, module: str, key: str) -> bool:
    return matches(names, module, key) if isinstance(names, str) else is_named(names, module)


def _names(value: Any, key: str, *, required: bool = False) -> tuple[str, ...] | str:
    if _is_off(value) and not required:
        return ()
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise LoadError(f"{key} must be a list of names or an expression, not {value!r:.100}.")


def _layers(data: Mapping[str, Any]) -> tuple[int, ...]:
    value = data.get("layers_to_transform")
    if value is None or value == []:
        return ()
    if isinstance(data.get("target_modules"), str):  # as PEFT refuses it
        raise LoadError("layers_to_transform needs target_modules to be a list.")
    return tuple(_count(one, "layers_to_transform", least=0) for one in (value if isinstance(value, list) else [value]))


def _lists(data: Mapping[str, Any]) -> tuple[str, ...]:
    names = _names(data.get("layers_pattern"), "layers_pattern")
    names = (names,) if isinstance(names, str) else names
    for name in names:
        if not name.isidentifier():  # PEFT reads it as an expression
            raise LoadError(f"layers_pattern: {name!r:.100} is no name of a list of layers.")
    return names


def _table(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MOST_PATTERNS:
        raise LoadError(f"{key} must be a mapping of at most {_MOST_PATTERNS} patterns to numbers.")
    return value


def _count(value: Any, key: str, *, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= _LARGEST:
        raise LoadError(f"{key[:100]} must be a whole number of at least {least}, not {value!r:.100}.")
    return value


def _number(value: Any, key: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > _LARGEST:
        raise LoadError(f"{key[:100]} must be a number of at most {_LARGEST}, not {value!r:.100}.")
    return float(value)


def _flag(value: Any, key: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise LoadError(f"{key} must be true or false, not {value!r:.100}.")
    return bool(value)
