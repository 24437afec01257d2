"""The command `verbatim`: parses arguments, prints results, and turns errors into one sentence and an exit code.

Heavy imports are inside the commands, because `--help` must not wait for torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from engine import ModelConfig, SamplingParams, VerbatimError, validate
from server import fingerprints
from server.accounts import commands
from server.accounts.location import in_use
from server.batch.commands import batch
from server.bundle.commands import bundle
from server.configuration import ConfigOption, ModelOption, PullOption, before_anything_heavy, read_configuration
from server.gpu_probe import gpu_probe
from server.logs import printable
from server.receipts import commands as receipts, keeping_commands
from server.settings import ServerSettings
from server.terminal import Terminal

if TYPE_CHECKING:
    from engine import LLM, ModelInfo

app = typer.Typer(
    help="A local inference server whose every reply can be reproduced, word for word.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(commands.keys, name="keys")
app.command("usage")(commands.usage)
app.command("verify")(receipts.verify)
app.command("replay")(receipts.replay)
app.command("diff")(receipts.diff)
app.command("batch")(batch)
app.command("gpu-probe")(gpu_probe)
app.add_typer(bundle, name="bundle")
app.add_typer(keeping_commands.receipts, name="receipts")
models_app = typer.Typer(help="Inspect the models of a configuration.", no_args_is_help=True)
app.add_typer(models_app, name="models")

out = Terminal()
err = Terminal(stderr=True)


def main() -> None:
    """Run the command. An expected error is printed as one line, and the exit code is 1."""
    try:
        app()
    except VerbatimError as error:
        err.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except MemoryError:
        err.print("[bold red]error:[/] there is not enough memory for this.", highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def serve(
    config: ConfigOption = None,
    model: ModelOption = None,
    name: Annotated[str | None, typer.Option(help="With --model: the model's id in requests.")] = None,
    host: Annotated[str | None, typer.Option(help="Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default: 8000.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Accept requests for this host name; may be repeated. Adds to `hosts`.")
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option(help="Serve without keys on an address that others can reach.")
    ] = False,
    pull: PullOption = False,
) -> None:
    """Serve chat completions at http://HOST:PORT/v1 and /api/v1."""
    entries, settings = read_configuration(config, model, name)
    hosts = [*settings.hosts, *validate(ServerSettings, {"hosts": allow_host or []}, "--allow-host").hosts]
    flags = (("host", host), ("port", port), ("hosts", hosts), ("allow_anonymous", allow_anonymous or None))
    given = {key: value for key, value in flags if value is not None}
    settings = settings.model_copy(update=given)
    ledger = in_use(settings, config)  # before anything heavy, so that an error is shown at once
    from server.receipts.location import open_receipts

    receipts = open_receipts(settings, config)
    before_anything_heavy(pull)
    from server.run import run

    run(entries, settings, ledger=ledger, receipts=receipts, pull=pull, console=err)


@models_app.command("check")
def check(config: ConfigOption = None, model: ModelOption = None, pull: PullOption = False) -> None:
    """Load every model, run the self-test on this machine and print the findings."""
    entries, _ = read_configuration(config, model, None)
    before_anything_heavy(pull)
    failed = 0
    for entry in entries:
        with err.status(escape(f"{entry.id}: loading")) as status:
            try:
                info = _open(entry, pull, lambda text, name=entry.id: status.update(escape(f"{name}: {text}"))).info
            except VerbatimError as error:
                err.print(f"[bold red]{escape(entry.id)}:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
                failed += 1
                continue
        out.print(_findings(info))
    raise typer.Exit(1 if failed else 0)


def _findings(info: ModelInfo) -> Table:
    """Return the findings about a model, one per line: a table of columns would cut the fingerprints."""
    defaults = ", ".join(f"{key} {value}" for key, value in info.default_sampling.items()) or "the API's own"
    table = Table.grid(padding=(0, 2))
    for key, value in (
        (info.id, ""),
        ("  architecture", f"{info.architecture}, {info.runner} runner"),
        ("  device", f"{info.device}, {info.dtype}, linear layers: {info.linear}"),
        *([("  gpu", info.gpu.describe())] if info.gpu else []),
        ("  context", f"{info.context_length} tokens; the cache holds {info.cache_tokens}"),
        *([("  memory", info.memory)] if info.memory else []),
        ("  sampling", defaults),
        ("  thoughts", " … ".join(info.reasoning) if info.reasoning else "none that its template knows of"),
        ("  tool calls", info.tool_calls),
        ("", f"from: {info.tool_calls_source}"),
        ("  reproducible", ("yes: " if info.law.holds else "no: ") + info.law.reason),
        ("  fingerprint", info.system_fingerprint),
        ("  defaults", info.defaults_fingerprint),
        *([("  merged adapter", info.merged_adapter)] if info.merged_adapter else []),
        *(
            (f"  {one.id}", f"{one.system_fingerprint}; reproducible: {one.law.reason}")
            for one in info.adapters.values()
        ),
    ):
        table.add_row(escape(key), escape(value))
    return table


@app.command()
def fingerprint(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Two files, written with --json or by GET /v1/models/ID: print what differs."),
    ] = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of lines.")] = False,
    pull: PullOption = False,
) -> None:
    """Load every model and print its fingerprint, part by part; or compare two files and load none.

    A comparison exits with 0 if the fingerprints are the same, 1 if they differ, 2 if a file could not be read.
    """
    if files:
        if len(files) != 2 or model is not None or config is not None or as_json:
            raise typer.BadParameter("to compare, give two files and no option; else give no file.")
        code, lines = fingerprints.compare(*files)
        print(*lines, sep="\n", file=sys.stderr if code == fingerprints.UNREADABLE else sys.stdout)
        raise typer.Exit(code)
    entries, _ = read_configuration(config, model, None)
    before_anything_heavy(pull)
    found = []
    for entry in entries:
        with err.status(escape(f"{entry.id}: loading")) as status:
            found.append(_open(entry, pull, lambda text, name=entry.id: status.update(escape(f"{name}: {text}"))).info)
    lines = [fingerprints.as_json(found)] if as_json else [line for i in found for line in fingerprints.lines_of(i)]
    print(*lines, sep="\n")


@app.command()
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
    """Answer one prompt, without a server."""
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
        "max_tokens": max_tokens,
    }
    sampling = {key: value for key, value in given.items() if value is not None}
    SamplingParams.merged(sampling)  # refuses a value out of range before a model is loaded
    entries, _ = read_configuration(config, model, None)
    before_anything_heavy(pull)
    with err.status(escape(f"{entries[0].id}: loading")) as status:
        llm = _open(entries[0], pull, lambda text: status.update(escape(f"{entries[0].id}: {text}")))
    from engine import ChatMessage

    system_messages = [ChatMessage("system", system)] if system else []
    messages = [*system_messages, ChatMessage("user", prompt)]
    for output in llm.stream(prompt if raw else messages, **sampling):
        text = "".join(delta.text for delta in output.deltas)
        sys.stdout.write(printable(text, keep="\n\t") if sys.stdout.isatty() else text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _open(entry: ModelConfig, pull: bool, progress: Any) -> LLM:
    from engine import LLM

    return LLM.from_config(entry, pull=pull, progress=progress)
