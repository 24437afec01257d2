"""The commands `verbatim verify`, `verbatim replay` and `verbatim diff`.

Exit codes: 0, everything holds (or is the same); 1, something is refuted (or differs); 2, something could not be read
or checked, and nothing is refuted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from engine import (
    TOLERANCE,
    ConfigError,
    Mode,
    ModelConfig,
    Receipt,
    ReceiptError,
    VerbatimError,
    load_public_key,
    pair_receipts,
    receipt_differences,
)
from server.configuration import ConfigOption, ModelOption, PullOption, before_anything_heavy, read_configuration
from server.receipts.files import Entry, read_entries
from server.receipts.remote import RemoteServer
from server.receipts.report import VERDICTS
from server.receipts.tables import report_table
from server.terminal import Terminal, one_line

if TYPE_CHECKING:
    from engine import LLM

out = Terminal()
err = Terminal(stderr=True)

HOLDS: Final = 0
REFUTED: Final = 1
NOT_CHECKED: Final = 2

_UNSIGNED: Final = "signed; give --key to have the signature checked"
_IN_REPLY: Final = "only the receipt was checked, not the text around it"

_FilesArgument = Annotated[
    list[Path], typer.Argument(metavar="RECEIPT…", help="Files with a receipt, or .jsonl files with one in each line.")
]
_UrlOption = Annotated[str | None, typer.Option(help="Let the server at this URL check, instead of a model here.")]
_ApiKeyOption = Annotated[
    str | None, typer.Option(envvar="VERBATIM_API_KEY", help="With --url: the API key, if the server wants one.")
]
_KeyOption = Annotated[
    list[Path] | None,
    typer.Option("--key", help="A public key (PEM): each receipt must be signed by it; may be repeated."),
]
_ToleranceOption = Annotated[
    float,
    typer.Option(min=0.0, max=10.0, help="How far behind a token may be that another machine's rounding explains."),
]
_JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object for each receipt instead of a table.")]


def verify(
    receipts: _FilesArgument,
    model: ModelOption = None,
    config: ConfigOption = None,
    url: _UrlOption = None,
    api_key: _ApiKeyOption = None,
    key: _KeyOption = None,
    tolerance: _ToleranceOption = TOLERANCE,
    as_json: _JsonOption = False,
    pull: PullOption = False,
) -> None:
    """Check receipts at the speed of reading: their tokens are computed as drafts.

    Exits with 0 if every reply holds, 1 if one is refuted, 2 if one could not be checked.
    """
    _check_all("verify", receipts, _Where(model, config, url, api_key, pull), key, tolerance, as_json)


def replay(
    receipts: _FilesArgument,
    model: ModelOption = None,
    config: ConfigOption = None,
    url: _UrlOption = None,
    api_key: _ApiKeyOption = None,
    key: _KeyOption = None,
    tolerance: _ToleranceOption = TOLERANCE,
    as_json: _JsonOption = False,
    pull: PullOption = False,
) -> None:
    """Check receipts by generating their replies again, token by token.

    Exits with 0 if every reply holds, 1 if one is refuted, 2 if one could not be checked.
    """
    _check_all("replay", receipts, _Where(model, config, url, api_key, pull), key, tolerance, as_json)


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A file with a receipt, or a .jsonl file of them.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The file to compare it with.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Show tokens as this model's text, instead of their ids.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for each pair.")] = False,
    pull: PullOption = False,
) -> None:
    """Say in what two receipts differ, causes first; or the receipts of two .jsonl files, by id or by request.

    Exits with 0 if they record the same, 1 if they differ, 2 if one could not be read.
    """
    ours, theirs = list(read_entries(first)), list(read_entries(second))
    broken = [entry for entry in (*ours, *theirs) if entry.receipt is None]
    for entry in broken:
        err.print(f"[bold red]error:[/] {one_line(f'{entry.where}: {entry.error}')}", highlight=False, soft_wrap=True)
    a, b = ([entry.receipt for entry in entries if entry.receipt] for entries in (ours, theirs))
    try:
        text_of = _Where(model, None, None, None, pull).load().token_text if model else None
    except VerbatimError as error:
        raise _failed(error) from None
    pairs = zip_longest(a, b) if len(a) <= 1 and len(b) <= 1 else pair_receipts(a, b)
    differ = False
    for one, other in pairs:
        found = _compare(one, other, text_of)
        differ = differ or bool(found["differences"])
        _print_differences(found, as_json)
    raise typer.Exit(NOT_CHECKED if broken else REFUTED if differ else HOLDS)


@dataclass(slots=True)
class _Where:
    """Where receipts are checked: on a server, or with a model that is loaded when it is first needed."""

    model: str | None
    config: Path | None
    url: str | None
    api_key: str | None
    pull: bool
    entries: tuple[ModelConfig, ...] = ()
    loaded: dict[str, LLM] = field(default_factory=dict)

    def checker(self, mode: Mode, tolerance: float) -> Callable[[Entry], dict[str, Any]]:
        """Return the function that checks one receipt and returns its report."""
        if self.url is None:
            return lambda entry: self._check_here(entry, mode, tolerance)
        if self.model is not None or self.config is not None:
            raise ConfigError("give either --url, or --model or --config.")
        server = RemoteServer(self.url, self.api_key)
        return lambda entry: server.check(entry, mode, tolerance)

    def _check_here(self, entry: Entry, mode: Mode, tolerance: float) -> dict[str, Any]:
        assert entry.receipt is not None
        llm = self.load(entry.receipt)
        from engine import check_receipt

        return check_receipt(llm, entry.receipt, mode=mode, tolerance=tolerance).to_json()

    def load(self, receipt: Receipt | None = None) -> LLM:
        """Return the model that a receipt speaks of, loaded. One at a time is kept."""
        self.entries = self.entries or read_configuration(self.config, self.model, None)[0]
        entry = _entry_for(receipt, self.entries)
        if entry.id not in self.loaded:
            before_anything_heavy(self.pull)
            from engine import LLM

            for other in self.loaded.values():
                other.close()
            self.loaded.clear()
            with err.status(one_line(f"{entry.id}: loading")) as status:
                self.loaded[entry.id] = LLM.from_config(
                    entry, pull=self.pull, progress=lambda text: status.update(one_line(f"{entry.id}: {text}"))
                )
        return self.loaded[entry.id]


def _entry_for(receipt: Receipt | None, entries: Sequence[ModelConfig]) -> ModelConfig:
    """Return the entry of a receipt's model: the only one, or the one of that name."""
    if len(entries) == 1 or receipt is None:
        return entries[0]
    name = receipt.model.name
    for entry in entries:
        if name in _names_of(entry):
            return entry
    raise ReceiptError(f"the configuration has no model {name!r:.100}; name the receipt's model with --model.")


def _names_of(entry: ModelConfig) -> set[str]:
    """List what receipts may call the models of an entry: the model, if it is served as it is, and its adapters."""
    own = [entry.id, entry.repo, entry.builtin, Path(entry.path).name if entry.path else None]
    plain = {name for name in own if name is not None}
    adapted = {f"{name}:{adapter.name}" for name in plain for adapter in entry.adapters}
    return adapted if entry.merged_adapter else plain | adapted


def _check_all(
    mode: Mode, files: Sequence[Path], where: _Where, keys: list[Path] | None, tolerance: float, as_json: bool
) -> None:
    try:
        public = [load_public_key(path) for path in keys or ()]
        check = where.checker(mode, tolerance)
    except VerbatimError as error:
        raise _failed(error) from None
    reports = []
    for entry in (entry for path in files for entry in read_entries(path, public)):
        report = _checked(entry, check)
        reports.append((entry.where, report))
        if as_json:
            print(json.dumps({"file": entry.where, **report}))
    if not as_json:
        _print_reports(reports)
    raise typer.Exit(_exit_code([report for _, report in reports]))


def _checked(entry: Entry, check: Callable[[Entry], dict[str, Any]]) -> dict[str, Any]:
    """Return the report about one receipt, or `{"error": …}`."""
    if entry.receipt is None:
        return {"error": entry.error}
    try:
        report = check(entry)
    except VerbatimError as error:
        return {"id": entry.receipt.id, "error": error.message}
    except Exception as error:  # a fault of this program refutes nothing, and the other receipts are checked
        return {"id": entry.receipt.id, "error": f"the check has failed: {type(error).__name__}: {error!s:.200}"}
    notes = [_UNSIGNED] if entry.unchecked else []
    notes += [_IN_REPLY] if entry.in_reply else []
    told = {"note": "; ".join(notes)} if notes else {}
    return {**report, "signed_by": entry.signed_by or report.get("signed_by"), **told}


def _print_reports(reports: Sequence[tuple[str, dict[str, Any]]]) -> None:
    checked = [(where, report) for where, report in reports if "error" not in report]
    if checked:
        out.print(report_table(checked))
    for where, report in reports:
        if "error" in report:
            err.print(
                f"[bold red]error:[/] {one_line(where)}: {one_line(str(report['error']))}",
                highlight=False,
                soft_wrap=True,
            )
            continue
        told = [report.get("sentence"), *(report.get("environment") or ()), report.get("note")]
        if report.get("signed_by"):
            told.append(f"signed by {report['signed_by']}")
        out.print(one_line(where), highlight=False, soft_wrap=True)
        for line in filter(None, told):
            out.print(f"  {one_line(str(line))}", highlight=False, soft_wrap=True)
    if len(reports) > 1:
        out.print(_counts([report for _, report in reports]), highlight=False, soft_wrap=True)


def _counts(reports: Sequence[dict[str, Any]]) -> str:
    """Return how many receipts got which verdict."""
    verdicts = Counter(report.get("verdict", "not_checkable") for report in reports)
    told = ", ".join(f"{verdicts[name]} {name.replace('_', ' ')}" for name in VERDICTS if verdicts[name])
    return f"{len(reports)} receipts: {told}"


def _exit_code(reports: Iterable[dict[str, Any]]) -> int:
    verdicts = {report.get("verdict", "not_checkable") for report in reports}
    if "refuted" in verdicts:
        return REFUTED
    return NOT_CHECKED if "not_checkable" in verdicts or not verdicts else HOLDS


def _compare(a: Receipt | None, b: Receipt | None, text_of: Callable[[int], str] | None) -> dict[str, Any]:
    found: list[dict[str, str]] = []
    if a is None or b is None:
        which = "second" if a is None else "first"
        found.append({"part": "receipt", "where": "", "sentence": f"only in the {which} file"})
    else:
        for one in receipt_differences(a, b, text_of):
            found.append({"part": one.part, "where": one.where, "sentence": one.sentence})
    return {"a": a and a.id, "b": b and b.id, "differences": found}


def _print_differences(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    ids = found["a"] or found["b"] if found["a"] == found["b"] or not (found["a"] and found["b"]) else None
    out.print(one_line(ids or f"{found['a']} → {found['b']}"), highlight=False, soft_wrap=True)
    for one in found["differences"] or [{"part": "", "sentence": "the same"}]:
        out.print(f"  {one_line(one['part']):<13} {one_line(one['sentence'])}", highlight=False, soft_wrap=True)


def _failed(error: VerbatimError) -> typer.Exit:
    err.print(f"[bold red]error:[/] {one_line(error.message)}", highlight=False, soft_wrap=True)
    return typer.Exit(NOT_CHECKED)
