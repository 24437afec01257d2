"""Read which models and settings a command works on: from --model, --config, ./models.yaml, or the demo model.

Loads nothing. The options that several commands have are declared here, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import typer

from engine import ConfigError, ModelConfig, address_space, entry_of, parse_models, read_yaml, validate
from server.settings import ServerSettings, read_settings
from server.terminal import Terminal

__all__ = [
    "DEFAULT_CONFIG",
    "DEMO",
    "ConfigOption",
    "ModelOption",
    "PullOption",
    "before_anything_heavy",
    "read_configuration",
    "rereading",
]

err = Terminal(stderr=True)

DEFAULT_CONFIG: Final = Path("models.yaml")
DEMO: Final = ModelConfig(id="demo", builtin="demo", max_completion_tokens=512)
LEAST_ADDRESS_SPACE: Final = 1536 * 2**20
"""Bytes. Measured on two cores: 1,200 MiB suffice for the demo model; with 1,024 MiB threads cannot be started."""

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="A models.yaml. Default: ./models.yaml.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Use this folder, GGUF file or hub id instead of a configuration.")
]
PullOption = Annotated[
    bool, typer.Option("--pull", help="Allow downloads from the hub. Default: nothing is downloaded.")
]


def read_configuration(
    config: Path | None, model: str | None, name: str | None
) -> tuple[tuple[ModelConfig, ...], ServerSettings]:
    """Return entries and settings: from --model, from --config, from ./models.yaml, or of the demo model.

    Raises:
        ConfigError: the options contradict each other, or the file is missing or wrong.
    """
    if model is not None:
        if config is not None:
            raise ConfigError("give either --config or --model, not both.")
        entry = entry_of(model, "--model", name)
        return (validate(ModelConfig, entry, "--model"),), ServerSettings()
    if name is not None:
        raise ConfigError("--name goes with --model; in a models.yaml each entry has its id.")
    file = config or DEFAULT_CONFIG
    if config is None and not file.exists():
        err.print(
            f"No {DEFAULT_CONFIG} here and no --model: taking the demo model, [bold]which knows little.[/]",
            highlight=False,
        )
        return (DEMO,), ServerSettings()
    if not file.exists():
        raise ConfigError(
            f"{file} does not exist. Name another with --config, or a folder with a checkpoint with --model DIR."
        )
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
    limit = address_space()
    if limit is not None and limit < LEAST_ADDRESS_SPACE:
        raise ConfigError(
            f"this process may address {limit >> 20} MiB (ulimit -v); torch and its threads alone take up to "
            f"{LEAST_ADDRESS_SPACE >> 20} MiB. Raise the limit, or lift it with: ulimit -v unlimited."
        )
    if not pull:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # The loader shows its own progress; a second bar would garble the display.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
