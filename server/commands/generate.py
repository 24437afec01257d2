"""The command `verbatim generate`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from server.configuration import ConfigOption, ModelOption, PullOption, read_configuration

__all__ = ["generate"]


def generate(
    prompt: Annotated[str, typer.Argument(help="The user's message.")],
    model: ModelOption = None,
    config: ConfigOption = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    raw: Annotated[bool, typer.Option(help="Continue the prompt as plain text, without the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Generate at most this many tokens.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this mass.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    pull: PullOption = False,
) -> None:
    """Answer one prompt with the first model, without a server.

    The text goes to standard output; the seed and the fingerprint, with which it can be had again, to standard error.
    """
    from engine import ChatMessage, ConfigError, SamplingParams
    from server.commands import opening
    from server.logs import printable

    given: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
        "max_tokens": max_tokens,
    }
    if raw and system is not None:
        raise ConfigError("--system goes into the chat template, which --raw leaves out: give one of them.")
    sampling = {key: value for key, value in given.items() if value is not None}
    SamplingParams.merged(sampling)  # refuses a value out of range before a model is loaded
    entries, _ = read_configuration(config, model, None)
    llm = opening.open_model(entries[0], pull)
    system_messages = [ChatMessage("system", system)] if system else []
    messages = [*system_messages, ChatMessage("user", prompt)]
    prepared = llm.add(prompt if raw else messages, **sampling)
    for output in llm.outputs(prepared.request_id):
        text = "".join(delta.text for delta in output.deltas)
        sys.stdout.write(printable(text, keep="\n\t") if sys.stdout.isatty() else text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    print(f"seed {prepared.params.seed} · {llm.info.system_fingerprint}", file=sys.stderr)
