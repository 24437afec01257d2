"""The command `verbatim chat`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.configuration import ConfigOption, PullOption, read_configuration

if TYPE_CHECKING:
    from pathlib import Path

    from server.commands.chat.talker import Talker

__all__ = ["chat"]


def chat(
    model: Annotated[
        str | None,
        typer.Argument(help="An id of the configuration, a folder, GGUF file or hub id. Default: the first model."),
    ] = None,
    config: ConfigOption = None,
    url: Annotated[str | None, typer.Option(help="Talk to a model of the server at this URL.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="VERBATIM_API_KEY", help="With --url: the API key, if the server wants one.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of every reply. Default: one is drawn for each.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Generate at most this many tokens a reply.")] = 1024,
    pull: PullOption = False,
) -> None:
    """Talk to a model. Under each reply are its seed and fingerprint; /again gives the same bits once more.

    Without a terminal, each line of standard input is a message, and standard output has nothing but the replies.
    """
    import sys

    from engine import SamplingParams
    from server.commands.chat.screen import Screen
    from server.commands.chat.session import Session

    given = {"temperature": temperature, "max_tokens": max_tokens}
    sampling = {name: value for name, value in given.items() if value is not None}
    SamplingParams.merged({**sampling, **({} if seed is None else {"seed": seed})})  # refuses what is out of range
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    talker = _talker(model, config, url, api_key, sampling, pull)
    screen = Screen()
    screen.note(" · ".join(filter(None, [talker.name, talker.fingerprint, "/help" if screen.interactive else ""])))
    session = Session(talker, screen, system=system, seed=seed)
    try:
        session.run()
    finally:
        talker.close()
    raise typer.Exit(1 if session.failed and not screen.interactive else 0)


def _talker(
    model: str | None, config: Path | None, url: str | None, key: str | None, sampling: dict[str, Any], pull: bool
) -> Talker:
    from engine import ConfigError
    from server.commands import opening

    if url is not None:
        if config is not None:
            raise ConfigError("give either --url or --config: the server has its own configuration.")
        from server.commands.chat.remote import RemoteTalker

        return RemoteTalker(url, key, model, sampling)
    entries, _ = read_configuration(config, model, None)
    llm = opening.open_model(entries[0], pull)
    from server.commands.chat.local import LocalTalker

    return LocalTalker(llm, sampling)
