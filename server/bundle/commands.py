"""The commands `verbatim bundle create` and `verbatim bundle check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from engine import ConfigError, ModelConfig, entry_of, public_pem, validate
from server.configuration import (
    DEFAULT_CONFIG,
    ConfigOption,
    PullOption,
    before_anything_heavy,
    configured,
    demo_entry,
)
from server.logs import printable
from server.settings import ServerSettings
from server.terminal import Terminal

__all__ = ["bundle"]

bundle = typer.Typer(
    help="Pack models and the software that serves them into one folder, for a machine without a network.",
    no_args_is_help=True,
)
err = Terminal(stderr=True)


@bundle.command("create")
def create(
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make. It must not exist.")],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="An id of the configuration, or a folder, GGUF file or hub id; may be repeated."
        ),
    ] = None,
    config: ConfigOption = None,
    torch: Annotated[
        str | None, typer.Option(help="The build of torch to pack, cpu or cu130. Default: the one installed here.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            help="A PEM file: the public key that checks receipts. Default: that of `receipts: sign:` in models.yaml."
        ),
    ] = None,
    no_models: Annotated[
        bool,
        typer.Option("--no-models", help="Pack only the software: models are brought to the other side by themselves."),
    ] = False,
    pull: PullOption = False,
) -> None:
    """Make a bundle for this platform and this version of Python. Needs pip, and the network or a folder of wheels."""
    from server.bundle.create import BundleJob, create_bundle, read_public_key
    from server.bundle.wheels import installed_build

    if torch not in (None, "cpu", "cu130"):
        raise ConfigError(f"--torch must be cpu or cu130, not {torch!r}.")
    if no_models and models:
        raise ConfigError(f"--no-models packs no model, and --model names {models[0]}: leave one of them out.")
    before_anything_heavy(pull)
    entries, settings = configured(config)
    public = _signing_key(settings, config) if key is None else read_public_key(key)
    chosen = () if no_models else _chosen(models or [], entries)
    job = BundleJob(target, chosen, torch or installed_build(), public, pull)  # type: ignore[arg-type]
    with err.status("bundle") as status:
        digest = create_bundle(job, lambda text: status.update(escape(text)))
    err.print(escape(f"{target} is complete. Its checksums have the SHA-256:"), highlight=False, soft_wrap=True)
    print(digest)


@bundle.command("check")
def check(target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a bundle.")]) -> None:
    """Compare a bundle with its checksums, and print each fault. Exits with 1 if one is found."""
    from server.bundle.check import check_bundle
    from server.bundle.checksums import FILE, digest_of

    found = 0
    for fault in check_bundle(target):
        print(printable(fault))
        found += 1
    if found:
        raise typer.Exit(1)
    print(printable(f"{target} is complete and unchanged. Its checksums have the SHA-256 {digest_of(target / FILE)}."))


def _signing_key(settings: ServerSettings, config: Path | None) -> bytes | None:
    """Return the public half of the key that the settings name; None if they name none.

    Raises:
        ReceiptError: it cannot be read, or is no private Ed25519 key.
    """
    from server.receipts.location import open_signer

    signer = open_signer(settings, config)
    return None if signer is None else public_pem(signer.public_key).encode()


def _chosen(models: list[str], entries: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
    """Return the entries to pack: those that are named, by id or by place, or else all of the configuration."""
    if not models:
        if not entries:
            raise ConfigError(
                f"name a model with --model, or a configuration with --config: there is no {DEFAULT_CONFIG}."
            )
        return entries
    by_id = {"demo": demo_entry(), **{entry.id: entry for entry in entries}}
    chosen = [
        by_id[name] if name in by_id else validate(ModelConfig, entry_of(name, "--model"), "--model") for name in models
    ]
    twice = next((entry.id for i, entry in enumerate(chosen) if entry.id in {e.id for e in chosen[:i]}), None)
    if twice is not None:
        raise ConfigError(f"--model: the id {twice!r} is there twice.")
    return tuple(chosen)
