"""`verbatim keys` and `verbatim usage`: the ledger from the command line. Works beside a running server."""

from __future__ import annotations

import csv
import datetime as dt
import json
import re
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from engine import ConfigError, read_yaml
from server.ledger.money import LARGEST
from server.settings import LOOPBACK, ServerSettings, read_settings
from server.terminal import Terminal

if TYPE_CHECKING:
    from server.ledger.store import Key, Ledger, Limits

keys = typer.Typer(help="Keys, their balances and their limits.", no_args_is_help=True)
out = Terminal()

DEFAULT_FILE: Final = "verbatim.db"
_DURATION: Final = re.compile(r"(\d{1,5})([hdw])")
_SECONDS: Final = {"h": 3600, "d": 86400, "w": 7 * 86400}


def _in_range(value: int | None, least: int) -> int | None:
    """Refuse a number that no ledger holds, before one is opened or made."""
    if value is not None and not least <= value <= LARGEST:
        raise typer.BadParameter(f"{value} is not in the range {least} to {LARGEST}.")
    return value


def _natural(value: int | None) -> int | None:
    return _in_range(value, 0)


def _amount(value: int | None) -> int | None:
    return _in_range(value, -LARGEST)


ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="A models.yaml. Default: ./models.yaml.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
NameArgument = Annotated[str, typer.Argument(help="Its name or id.")]
RpmOption = Annotated[
    int | None, typer.Option("--requests-per-minute", callback=_natural, help="0 takes the limit away.")
]
TpmOption = Annotated[
    int | None, typer.Option("--tokens-per-minute", callback=_natural, help="0 takes the limit away.")
]
ConcurrentOption = Annotated[
    int | None, typer.Option(callback=_natural, help="Requests at once; 0 takes the limit away.")
]
ContextOption = Annotated[
    int | None, typer.Option(callback=_natural, help="Prompt and answer, tokens; 0 takes the limit away.")
]
ModelsOption = Annotated[
    list[str] | None, typer.Option("--model", "-m", help="May use this one only; may be repeated. '*' is all.")
]


def location(settings: ServerSettings, config: Path | None) -> str:
    """The ledger's URL: as configured, or a file beside the configuration."""
    given = settings.ledger or DEFAULT_FILE
    if "://" in given:
        return given
    folder = config.parent if config is not None else Path()
    return f"sqlite:///{(folder / Path(given).expanduser()).resolve()}"


def existing(settings: ServerSettings, config: Path | None) -> str | None:
    """The ledger's URL, if it was configured or is there."""
    url = location(settings, config)
    file = Path(url.removeprefix("sqlite:///"))
    return url if settings.ledger is not None or file.exists() else None


def in_use(settings: ServerSettings, config: Path | None) -> str | None:
    """The ledger's URL if there has ever been a key in it. Then every request needs one.

    Raises:
        ConfigError: everybody could reach a server without keys, and nobody said that this is meant.
        LedgerFault: it cannot be read.
    """
    url = existing(settings, config)
    if url is not None:
        from server.ledger.store import Ledger

        with closing(Ledger(url, time.time)) as ledger:  # noqa: TID251
            if ledger.all_keys():
                return url
    if settings.host not in LOOPBACK and not settings.allow_anonymous:
        raise ConfigError(
            f"host {settings.host} lets others in, and there are no keys. Make one with `verbatim keys create NAME`, "
            "or serve everybody with --allow-anonymous."
        )
    return None


@keys.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is; stands in reports and in the log.")],
    balance: Annotated[
        int | None, typer.Option(callback=_natural, help="What it may spend. Default: it is not metered.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="A date (2026-12-31, its end in UTC), or 12h, 30d, 8w.")] = None,
    models: ModelsOption = None,
    requests_per_minute: RpmOption = None,
    tokens_per_minute: TpmOption = None,
    concurrent: ConcurrentOption = None,
    context: ContextOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key. It is shown this once: only its hash is kept."""
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise ConfigError(f"a name has 1 to 200 printable characters, unlike {name[:200]!r}.")
    until = _until(expires)
    with closing(_ledger(config, make=True)) as ledger:
        first = not ledger.all_keys()
        limits = _limits(requests_per_minute, tokens_per_minute, concurrent, context)
        new = ledger.create_key(name, balance=balance, expires=until, models=_models(models), limits=limits)
        if as_json:
            print(json.dumps({**_as_dict(new.key), "key": new.secret}))
            return
        out.print(_table([new.key]))
        out.print("The key, shown this once:", highlight=False)
        print(new.secret)
        if first:
            out.print("From its next start the server wants a key with every request.", highlight=False)


@keys.command("list")
def list_keys(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """All keys, revoked and expired ones, too."""
    with closing(_ledger(config)) as ledger:
        _show(ledger.all_keys(), as_json, many=True)


@keys.command("show")
def show(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """One key: its balance, limits and state."""
    with closing(_ledger(config)) as ledger:
        _show([ledger.key(name)], as_json)


@keys.command("revoke")
def revoke(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Let a key open nothing any more, at once. What it has used stays in the books."""
    with closing(_ledger(config)) as ledger:
        _show([ledger.revoke(name)], as_json)


@keys.command("credit", context_settings={"ignore_unknown_options": True})
def credit(
    name: NameArgument,
    amount: Annotated[
        int,
        typer.Argument(callback=_amount, help="Tokens, or micro-credits as the prices say; negative takes away."),
    ],
    note: Annotated[str, typer.Option(help="What for.")] = "",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add to a key's balance. A key that was not metered is from now on."""
    with closing(_ledger(config)) as ledger:
        _show([ledger.credit(name, amount, note)], as_json)


@keys.command("limit")
def limit(
    name: NameArgument,
    models: ModelsOption = None,
    requests_per_minute: RpmOption = None,
    tokens_per_minute: TpmOption = None,
    concurrent: ConcurrentOption = None,
    context: ContextOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change a key's limits; what is not given stays as it is."""
    with closing(_ledger(config)) as ledger:
        limits = _limits(requests_per_minute, tokens_per_minute, concurrent, context, ledger.key(name).limits)
        _show([ledger.limit(name, limits, None if models is None else _models(models))], as_json)


@keys.command("check")
def check(
    seen: Annotated[bool, typer.Option("--seen", help="What was set aside is known: say it no more.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether the books add up, and what could not be written into them. Exit code 1 if there is something."""
    with closing(_ledger(config)) as ledger:
        problems, aside = ledger.check(), ledger.aside(seen=seen)
    if as_json:
        print(json.dumps({"problems": problems, "set_aside": aside}))
    else:
        for problem in problems:
            print(problem)
        for row in aside:
            print(f"set aside: {row['row']} (charged {row['charged']}; {row['reason']})")
        if not problems and not aside:
            print("The books add up.")
    raise typer.Exit(1 if problems or aside else 0)


def usage(
    key: Annotated[str | None, typer.Option(help="One key only, by name or id.")] = None,
    since: Annotated[str | None, typer.Option(help="A date (2026-11-01) or Unix seconds.")] = None,
    by: Annotated[str | None, typer.Option(help="day or model: one row for each.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV instead of a table.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """What was used and what it cost, by key."""
    if by not in (None, "day", "model"):
        raise ConfigError(f"--by must be day or model, not {by!r}.")
    from server.ledger.store import read_since

    with closing(_ledger(config)) as ledger:
        rows = ledger.usage(key=key, since=read_since(since), by=by)
    if as_json:
        print(json.dumps(rows))
        return
    columns = ["key", *([by] if by else []), "requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost"]
    if as_csv:
        writer = csv.DictWriter(sys.stdout, columns)
        writer.writeheader()
        writer.writerows({**row, "key": _harmless(row["key"])} for row in rows)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(
            column.replace("_tokens", ""), justify="left" if column in ("key", "day", "model") else "right"
        )
    for row in rows:
        table.add_row(*(escape(str(row[column])) for column in columns))
    out.print(table)


# -- the parts ---------------------------------------------------------------------------------------------------------


def _ledger(config: Path | None, *, make: bool = False) -> Ledger:
    from server.ledger.store import Ledger

    file = config or Path("models.yaml")
    settings = read_settings(read_yaml(file), str(file)) if config is not None or file.exists() else ServerSettings()
    if not make and existing(settings, config) is None:
        raise ConfigError("there are no keys yet. Make one with `verbatim keys create NAME`.")
    return Ledger(location(settings, config), time.time)  # noqa: TID251  the books want the wall clock


def _limits(
    requests: int | None, tokens: int | None, concurrent: int | None, context: int | None, old: Limits | None = None
) -> Limits:
    """New limits: None keeps the old one, 0 takes it away."""
    from server.ledger.store import Limits

    before = old or Limits()

    def chosen(given: int | None, kept: int | None) -> int | None:
        return kept if given is None else given or None

    return Limits(
        chosen(requests, before.requests_per_minute),
        chosen(tokens, before.tokens_per_minute),
        chosen(concurrent, before.concurrent),
        chosen(context, before.context),
    )


def _models(given: list[str] | None) -> list[str]:
    for model in given or []:
        if not 1 <= len(model) <= 1000 or not model.isprintable():
            raise ConfigError(f"a model's id has 1 to 1000 printable characters, unlike {model[:200]!r}.")
    return [model for model in given or [] if model != "*"]


def _until(text: str | None) -> float | None:
    if text is None:
        return None
    now = time.time()  # noqa: TID251
    duration = _DURATION.fullmatch(text)
    if duration:
        return now + int(duration[1]) * _SECONDS[duration[2]]
    try:
        day = dt.datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=dt.UTC)
        return (day + dt.timedelta(days=1)).timestamp()
    except (ValueError, OverflowError):  # the end of 9999-12-31 is no date
        raise ConfigError(f"--expires must be a date like 2026-12-31, or 12h, 30d, 8w, not {text[:100]!r}.") from None


def _show(found: Sequence[Key], as_json: bool, *, many: bool = False) -> None:
    if as_json:
        rows = [_as_dict(key) for key in found]
        print(json.dumps(rows if many else rows[0]))
    else:
        out.print(_table(found))


def _as_dict(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "shown": key.shown,
        "state": _state(key),
        "created": key.created,
        "expires": key.expires,
        "revoked": key.revoked,
        "models": list(key.models),
        "balance": key.balance,
        "held": key.held,
        **asdict(key.limits),
    }


def _state(key: Key) -> str:
    if key.revoked is not None:
        return "revoked"
    return "good" if key.usable(time.time()) else "expired"  # noqa: TID251


def _table(found: Sequence[Key]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "key", "state", "balance", "limits", "models"):
        table.add_column(column, overflow="fold", no_wrap=column in ("key", "state"))
    for key in found:
        limits = key.limits
        said = [
            (limits.requests_per_minute, "requests a minute"),
            (limits.tokens_per_minute, "tokens a minute"),
            (limits.concurrent, "at once"),
            (limits.context, "tokens of context"),
        ]
        balance = "" if key.balance is None else str(key.balance) + (f", {key.held} held" if key.held else "")
        table.add_row(
            escape(key.name),
            key.shown,
            _state(key),
            balance or "not metered",
            ", ".join(f"{number} {what}" for number, what in said if number) or "none",
            escape(", ".join(key.models) or "all"),
        )
    return table


def _harmless(text: str) -> str:
    """A spreadsheet takes what begins like a formula for one."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
