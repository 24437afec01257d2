"""The commands `verbatim keys` and `verbatim usage`. They work on the ledger while a server runs, too."""

from __future__ import annotations

import csv
import datetime as dt
import json
import re
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from engine import ConfigError, read_yaml
from server.accounts.key_table import as_dict, table_of
from server.accounts.location import existing, location
from server.configuration import ConfigOption, configured, demo_entry
from server.ledger.records import LARGEST
from server.settings import ServerSettings, read_settings
from server.terminal import Terminal, one_line

if TYPE_CHECKING:
    from server.ledger.records import Key, Limits
    from server.ledger.store import Ledger

keys = typer.Typer(help="Manage keys, their balances and their limits.", no_args_is_help=True)
out = Terminal()
err = Terminal(stderr=True)

_DURATION: Final = re.compile(r"(\d{1,5})([hdw])")
_SECONDS: Final = {"h": 3600, "d": 86400, "w": 7 * 86400}


def _in_range(value: int | None, least: int) -> int | None:
    """Refuse a number that no ledger can hold, before one is opened or created."""
    if value is not None and not least <= value <= LARGEST:
        raise typer.BadParameter(f"{value} is not in the range {least} to {LARGEST}.")
    return value


def _natural(value: int | None) -> int | None:
    return _in_range(value, 0)


def _amount(value: int | None) -> int | None:
    return _in_range(value, -LARGEST)


JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
NameArgument = Annotated[str, typer.Argument(help="The key's name or id.")]
RpmOption = Annotated[int | None, typer.Option("--requests-per-minute", callback=_natural, help="0 removes the limit.")]
TpmOption = Annotated[int | None, typer.Option("--tokens-per-minute", callback=_natural, help="0 removes the limit.")]
ConcurrentOption = Annotated[
    int | None, typer.Option(callback=_natural, help="Requests running at once; 0 removes the limit.")
]
ContextOption = Annotated[
    int | None, typer.Option(callback=_natural, help="Tokens of prompt and reply together; 0 removes the limit.")
]
ModelsOption = Annotated[
    list[str] | None, typer.Option("--model", "-m", help="Allow only this model; may be repeated. '*' allows all.")
]


@keys.command("create")
def create(
    name: Annotated[str, typer.Argument(help="The key's name in reports and in the log.")],
    balance: Annotated[
        int | None, typer.Option(callback=_natural, help="What it may spend. Default: not metered.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="A date (2026-12-31, its end in UTC), or 12h, 30d, 8w.")] = None,
    models: ModelsOption = None,
    requests_per_minute: RpmOption = None,
    tokens_per_minute: TpmOption = None,
    concurrent: ConcurrentOption = None,
    context: ContextOption = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may manage the server: load and unload models, see all keys and usage.")
    ] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a key. It is shown only now, because the ledger stores only its hash."""
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise ConfigError(f"a name has 1 to 200 printable characters, unlike {name[:200]!r}.")
    until = _until(expires)
    allowed = _models(models, config)
    with closing(_ledger(config, make=True)) as ledger:
        first = not ledger.all_keys()
        limits = _limits(requests_per_minute, tokens_per_minute, concurrent, context)
        new = ledger.create_key(name, balance=balance, expires=until, models=allowed, limits=limits, admin=admin)
        if as_json:
            print(json.dumps({**as_dict(new.key), "key": new.secret}))
            return
        out.print(table_of([new.key]))
        out.print("The key, shown this once:", highlight=False)
        print(new.secret)
        if first:
            out.print("From its next start the server wants a key with every request.", highlight=False)


@keys.command("list")
def list_keys(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List all keys, including revoked and expired ones."""
    with closing(_ledger(config)) as ledger:
        _show(ledger.all_keys(), as_json, many=True)


@keys.command("show")
def show(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show one key: its balance, limits and state."""
    with closing(_ledger(config)) as ledger:
        _show([ledger.key(name)], as_json)


@keys.command("revoke")
def revoke(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Revoke a key at once. What it has used stays in the ledger."""
    with closing(_ledger(config)) as ledger:
        _show([ledger.revoke(name)], as_json)


@keys.command("credit", context_settings={"ignore_unknown_options": True})
def credit(
    name: NameArgument,
    amount: Annotated[
        int,
        typer.Argument(callback=_amount, help="Tokens, or micro-credits where there are prices; negative takes away."),
    ],
    note: Annotated[str, typer.Option(help="A note to store with the amount.")] = "",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add to a key's balance. A key that was not metered becomes metered."""
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
    """Change a key's limits. Limits that are not given stay as they are."""
    allowed = None if models is None else _models(models, config)
    with closing(_ledger(config)) as ledger:
        limits = _limits(requests_per_minute, tokens_per_minute, concurrent, context, ledger.key(name).limits)
        _show([ledger.limit(name, limits, allowed)], as_json)


@keys.command("check")
def check(
    seen: Annotated[bool, typer.Option("--seen", help="Do not show these settlements again.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check that the ledger adds up, and show settlements that could not be written. Exits with 1 if one is found."""
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
            print("The ledger adds up.")
    raise typer.Exit(1 if problems or aside else 0)


def usage(
    key: Annotated[str | None, typer.Option(help="Only this key, by name or id.")] = None,
    since: Annotated[str | None, typer.Option(help="Only requests since this date (2026-11-01) or Unix time.")] = None,
    by: Annotated[str | None, typer.Option(help="One row per day or per model.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV instead of a table.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each key has used and what it cost."""
    if by not in (None, "day", "model"):
        raise ConfigError(f"--by must be day or model, not {by!r}.")
    from server.ledger.records import read_since

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
    return Ledger(location(settings, config), time.time)  # noqa: TID251  the ledger records the wall clock


def _limits(
    requests: int | None, tokens: int | None, concurrent: int | None, context: int | None, old: Limits | None = None
) -> Limits:
    """Merge new limits into old ones: None keeps the old limit, 0 removes it."""
    from server.ledger.records import Limits

    before = old or Limits()

    def chosen(given: int | None, kept: int | None) -> int | None:
        return kept if given is None else given or None

    return Limits(
        chosen(requests, before.requests_per_minute),
        chosen(tokens, before.tokens_per_minute),
        chosen(concurrent, before.concurrent),
        chosen(context, before.context),
    )


def _models(given: list[str] | None, config: Path | None) -> list[str]:
    """Check ids of models. One that is not configured is allowed, for it may come later, and named in a warning."""
    for model in given or []:
        if not 1 <= len(model) <= 1000 or not model.isprintable():
            raise ConfigError(f"a model's id has 1 to 1000 printable characters, unlike {model[:200]!r}.")
    wanted = [model for model in given or [] if model != "*"]
    known = [entry.id for entry in configured(config)[0] or (demo_entry(),)] if wanted else []
    for model in wanted:
        # An adapter's id is `base:adapter`.
        if model not in known and model.partition(":")[0] not in known:
            told = f"warning: no model {model!r:.200} is configured; there is: {', '.join(known)}."
            err.print(one_line(told), style="yellow", highlight=False, soft_wrap=True)
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
        rows = [as_dict(key) for key in found]
        print(json.dumps(rows if many else rows[0]))
    else:
        out.print(table_of(found))


def _harmless(text: str) -> str:
    """Quote text that a spreadsheet would read as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
