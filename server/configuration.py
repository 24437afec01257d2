"""Read which models and settings a command works on: from --model, --config, ./models.yaml, or the demo model.

Loads nothing. The options that several commands have are declared here, once. What reads and checks a file is imported
where it is used: the first line of `verbatim serve` does not wait for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from engine import ModelConfig
    from server.settings import ServerSettings

__all__ = [
    "DEFAULT_CONFIG",
    "ConfigOption",
    "ModelOption",
    "PullOption",
    "before_anything_heavy",
    "chosen_file",
    "configured",
    "demo_entry",
    "is_a_path",
    "read_configuration",
    "rereading",
]

DEFAULT_CONFIG: Final = Path("models.yaml")
LEAST_ADDRESS_SPACE: Final = 1536 * 2**20
"""Bytes. Measured on two cores: 1,200 MiB suffice for the demo model; with 1,024 MiB threads cannot be started."""

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="A models.yaml. Default: ./models.yaml.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="An id of the configuration, or else a folder, a GGUF file or a hub id."),
]
PullOption = Annotated[
    bool, typer.Option("--pull", help="Allow downloads from the hub. Default: nothing is downloaded.")
]


def demo_entry() -> ModelConfig:
    """Return the entry of the demo model."""
    from engine import ModelConfig

    return ModelConfig(id="demo", builtin="demo", max_completion_tokens=512)


def read_configuration(
    config: Path | None, model: str | None, name: str | None
) -> tuple[tuple[ModelConfig, ...], ServerSettings]:
    """Return entries and settings: from --model, from --config, from ./models.yaml, or of the demo model.

    `model` may be the id of an entry; then only that entry is returned, with the settings of its file. An id wins over
    a folder of the same name, which can be written `./NAME`.

    Raises:
        ConfigError: the options contradict each other, or the file is missing or wrong.
    """
    from engine import ConfigError
    from server.settings import ServerSettings

    if model is not None:
        return _named(config, model, name)
    if name is not None:
        raise ConfigError("--name goes with --model; in a models.yaml each entry has its id.")
    if chosen_file(config) is None:
        told = f"No {DEFAULT_CONFIG} here and no --model: taking the demo model, which knows little."
        print(told, file=sys.stderr)
        return (demo_entry(),), ServerSettings()
    return configured(config)


def chosen_file(config: Path | None) -> Path | None:
    """Return the configuration's file: the named one, or ./models.yaml if it exists; None if there is none.

    Raises:
        ConfigError: the named one does not exist.
    """
    from engine import ConfigError

    if config is None:
        return DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None
    if not config.exists():
        raise ConfigError(
            f"{config} does not exist. Name another with --config, or a folder with a checkpoint with --model DIR."
        )
    return config


def configured(config: Path | None) -> tuple[tuple[ModelConfig, ...], ServerSettings]:
    """Return all entries and the settings of the configuration's file; nothing and the defaults if there is none.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    from engine import ConfigError, parse_models, read_yaml
    from server.settings import ServerSettings, read_settings

    file = chosen_file(config)
    if file is None:
        return (), ServerSettings()
    data = read_yaml(file)
    settings = read_settings(data, str(file))
    models = parse_models(data.get("models"), base=file.resolve().parent, where=str(file))
    at_start = sum(entry.load == "at_start" for entry in models)
    if settings.max_loaded is not None and at_start > settings.max_loaded:
        raise ConfigError(
            f"{file}: server: max_loaded: {settings.max_loaded} does not hold the {at_start} models that are loaded at "
            "start; give some of them load: on_demand."
        )
    return models, settings


def rereading(
    config: Path | None, model: str | None, fitted: Callable[[ServerSettings], ServerSettings]
) -> Callable[[], tuple[tuple[ModelConfig, ...], ServerSettings]] | None:
    """Return what reads the configuration that `read_configuration` has read again; None where it has read no file.

    Args:
        fitted: settings of the file → those with the options of the command line.
    """
    file = (config or DEFAULT_CONFIG).absolute()
    if model is not None or not file.exists():
        return None

    def reread() -> tuple[tuple[ModelConfig, ...], ServerSettings]:
        entries, settings = read_configuration(file, None, None)
        return entries, fitted(settings)

    return reread


def before_anything_heavy(pull: bool) -> None:
    """Check the memory limit and set the hub's variables, both of which must happen before torch is imported.

    Raises:
        ConfigError: the process may address less memory than the libraries need; they would end it with a signal.
    """
    from engine import ConfigError, address_space

    limit = address_space()
    if limit is not None and limit < LEAST_ADDRESS_SPACE:
        raise ConfigError(
            f"this process may address {limit >> 20} MiB (ulimit -v); torch and its threads alone take up to "
            f"{LEAST_ADDRESS_SPACE >> 20} MiB. Raise the limit, or lift it with: ulimit -v unlimited."
        )
    if not pull:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # The loader shows its own progress; a second bar would garble the display, or a log file.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")


def _named(config: Path | None, model: str, name: str | None) -> tuple[tuple[ModelConfig, ...], ServerSettings]:
    """Return the one entry that --model names, and its file's settings."""
    from engine import ConfigError, ModelConfig, entry_of, validate
    from server.logs import printable
    from server.settings import ServerSettings

    entries: tuple[ModelConfig, ...] = ()
    settings = ServerSettings()
    if config is not None or not is_a_path(model):
        entries, settings = configured(config)
    known = {entry.id: entry for entry in entries}
    if config is None:
        known = {"demo": demo_entry(), **known}
    if model in known:
        entry = known[model]
        renamed = entry if name is None else validate(ModelConfig, {**entry.model_dump(), "id": name}, "--name")
        return (renamed,), settings
    if config is not None:
        raise ConfigError(f"--model: {config} has no model {printable(model)!r:.200}; there is: {', '.join(known)}.")
    try:
        return (validate(ModelConfig, entry_of(model, "--model", name), "--model"),), ServerSettings()
    except ConfigError as error:
        if not entries or "hub id" not in error.message:
            raise
        told = error.message.rstrip(".")
        raise ConfigError(f"{told}, nor an id of {DEFAULT_CONFIG}, which has: {', '.join(known)}.") from None


def is_a_path(model: str) -> bool:
    """Whether the text can only be a path, so that a wrong ./models.yaml beside it does not matter."""
    return model.startswith((".", "/", "~")) or model.endswith(".gguf")
