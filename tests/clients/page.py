"""The page of clients: `docs/reference/clients.md`, from versions.toml and results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clients.environments import ROOT, Client

PAGE = ROOT / "docs" / "reference" / "clients.md"
USUAL = ("plain", "stream", "tools", "structured", "seed")
HEAD = """\
<!-- Written by `make clients` from what it found. Do not edit. -->
# Clients

Programs and libraries that were run against this server, each in the release that is named, installed from its own
registry. The server is real, from the request to the stream; its model is made to say what a try wants.

- **plain**: a question and its answer. **stream**: the same, in pieces, which are put together again.
- **tools**: the model calls a tool, the client runs it and sends the result, the model answers. Clients that leave the
  call to their caller only hand it over.
- **structured**: an answer in the form of a schema. **seed**: a seed gives the same reply twice, and another seed
  another.

A dash: the client has no such thing, or none that can be tried from outside.
"""
HOW = """
## Run them again

`make clients` installs every client into an environment of its own (`.venv-clients`, `.node-clients`) and writes this
page anew. `make clients ARGS="codex llm"` runs some. `make clients ARGS="--newest"` takes the newest releases in place
of those in `tests/clients/versions.toml`, prints what it finds and writes nothing.
"""


def page(clients: Sequence[Client], results: Mapping[str, Any]) -> str:
    """Write the page."""
    rows, notes, ignored = [], [], []
    for client in clients:
        found = results["clients"].get(client.id)
        if found is None:
            rows.append(_row(client.name, "", "not run yet", *[""] * 6))
        elif found["not installed"]:
            rows.append(_row(client.name, "", f"not installable: {_line(found['not installed'])}", *[""] * 6))
        else:
            rows += _rows(client, found, notes)
            ignored += _ignored(client, found)
    table = [_row("client", "release", "endpoint", *USUAL, "more"), "|" + "---|" * 9, *rows]
    parts = [HEAD, _counted(clients, results), "\n".join(table) + "\n"]
    if notes:
        parts.append("\n## What is lacking\n\n" + "\n".join(f"{n}. {text}" for n, text in enumerate(notes, 1)) + "\n")
    if ignored:
        parts.append(
            "\n## Fields that are ignored\n\nSent by a client, without effect here, and named in the header "
            "`x-ignored-fields` of the reply.\n\n" + "\n".join(ignored) + "\n"
        )
    setups = [f"### {client.name}\n\n```{client.language}\n{client.setup}\n```\n" for client in clients]
    parts.append(
        "\n## Set-up\n\nFor a server without keys, on its own port; any word is a key.\n\n" + "\n".join(setups)
    )
    return "".join([*parts, HOW])


def _counted(clients: Sequence[Client], results: Mapping[str, Any]) -> str:
    tries = [one for found in results["clients"].values() for one in found["tries"]]
    works = sum(not one["error"] for one in tries)
    dates = sorted({found["date"] for found in results["clients"].values()})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"\nRun on {days}: {works} of {len(tries)} tries with {len(clients)} clients work.\n\n"


def _rows(client: Client, found: Mapping[str, Any], notes: list[str]) -> list[str]:
    """One row for each endpoint; what fails is a number, and is explained in `notes`."""
    rows = []
    for number, endpoint in enumerate(dict.fromkeys(one["endpoint"] for one in found["tries"])):
        cells: dict[str, str] = {}
        for one in found["tries"]:
            if one["endpoint"] == endpoint:
                cells[one["try"]] = _cell(one, notes)
        more = ", ".join(f"{name}: {cell}" for name, cell in cells.items() if name not in USUAL)
        version = next(iter(found["versions"].values()), "")
        head = ("", "") if number else (client.name, version)
        rows.append(_row(*head, f"`/v1/{endpoint}`", *(cells.get(name, "—") for name in USUAL), more))
    return rows


def _cell(one: Mapping[str, Any], notes: list[str]) -> str:
    """What became of a try. Tries that fail for the same reason share its number."""
    if not one["error"]:
        return "works"
    reason = "; ".join(_line(reason) for reason in one["refusals"] or [one["error"]])
    if reason not in notes:
        notes.append(reason)
    return f"no ({notes.index(reason) + 1})"


def _ignored(client: Client, found: Mapping[str, Any]) -> list[str]:
    lines = []
    for endpoint in dict.fromkeys(one["endpoint"] for one in found["tries"]):
        names = sorted({name for one in found["tries"] if one["endpoint"] == endpoint for name in one["ignored"]})
        if names:
            lines.append(f"- {client.name}, `/v1/{endpoint}`: {', '.join(f'`{name}`' for name in names)}")
    return lines


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _line(text: str) -> str:
    """One line that cannot be taken for markup, and not too long."""
    flat = " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")
    return flat if len(flat) <= 300 else flat[:299] + "…"
