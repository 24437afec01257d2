"""One run's numbers: as dated JSON in `results/`, as a table in the terminal, as Markdown for the README.

    python benchmarks/report.py table            the newest run of every benchmark and model, as Markdown
    python benchmarks/report.py table --all      every run
    python benchmarks/report.py readme           put the newest comparison into README.md

Knows rows and columns; measures nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder holds an engine.py that must not hide the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import real_model
from benchmarks.common import RESULTS, ROOT, Summary


@dataclass(slots=True)
class Row:
    """One measured quantity.

    Attributes:
        values: by contestant or variant, the summary of its repetitions.
        ratio: a ratio within each repetition; `ratio_of` names it.
        goal: what is aimed at, in words; `met` whether it was, by the median.
        note: what the number includes, where that is not plain.
    """

    name: str
    unit: str
    values: dict[str, Summary]
    ratio: Summary | None = None
    ratio_of: str = ""
    goal: str = ""
    met: bool | None = None
    note: str = ""


@dataclass(slots=True)
class Report:
    """All rows of one run.

    Attributes:
        benchmark: `engine`, `server`, …; label: the model's name, part of the file's.
        quick: made with toy settings to see that the runner works; never shown among results.
    """

    benchmark: str
    label: str
    date: str
    commit: str
    dirty: bool
    machine: dict[str, Any]
    settings: dict[str, Any]
    quick: bool = False
    rows: list[Row] = field(default_factory=list)

    def add(self, name: str, unit: str, values: dict[str, Summary], **more: Any) -> None:
        self.rows.append(Row(name, unit, values, **more))

    def write(self, folder: Path) -> Path:
        """`YYYY-MM-DD-BENCHMARK-LABEL-COMMIT.json`; a second run on the same day and commit replaces the first."""
        folder.mkdir(parents=True, exist_ok=True)
        commit = f"{self.commit}-dirty" if self.dirty else self.commit
        label = re.sub(r"[^A-Za-z0-9._-]+", "_", self.label)
        path = folder / f"{self.date[:10]}-{self.benchmark}-{label}-{commit}.json"
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def show(self) -> None:
        """Print the table to the terminal."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", show_lines=False)
        for number, column in enumerate(_COLUMNS):
            table.add_column(column, justify="left" if number in (0, 4) else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*_cells(row))
        # Piped output is kept, too: as wide as the table needs.
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(table)
        for row in self.rows:
            if row.note:
                console.print(f"[dim]{row.name}:[/dim] {row.note}", highlight=False)

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", self._where(), ""]
        lines += ["| " + " | ".join(_COLUMNS) + " |", "|---|---|---|---|---|"]
        lines += ["| " + " | ".join(cell.replace("\n", "<br>") for cell in _cells(row)) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    @property
    def title(self) -> str:
        dirty = ", with uncommitted changes" if self.dirty else ""
        return f"{self.benchmark}: {self.label} ({self.date[:10]}, commit {self.commit}{dirty})"

    def _where(self) -> str:
        m = self.machine
        flags = ", ".join(m["isa_flags"])
        return (
            f"{m['cpu']}, {m['cores']} cores, {m['isa']} ({flags}), {m['memory_gib']} GiB; {m['threads']} threads; "
            f"torch {m['torch']}, transformers {m['transformers']}; load before the run {m['load_average_before']}."
        )


_COLUMNS = ("what", "unit", "median (min … max)", "ratio", "goal")


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    several = len(row.values) > 1
    values = "\n".join(f"{name}: {_range(v)}" if several else _range(v) for name, v in row.values.items())
    ratio = f"{_range(row.ratio)} {row.ratio_of}".strip() if row.ratio else ""
    goal = f"{row.goal}: {'met' if row.met else 'missed'}" if row.goal else ""
    return row.name, row.unit, values, ratio, goal


def _range(s: Summary) -> str:
    if s["n"] == 1:
        return _number(s["median"])
    return f"{_number(s['median'])} ({_number(s['min'])} … {_number(s['max'])})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def read(path: Path) -> Report:
    """A report from its file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return Report(**{**data, "rows": [Row(**row) for row in data["rows"]]})


def newest(reports: list[Report]) -> list[Report]:
    """The latest of every benchmark and label."""
    kept: dict[tuple[str, str], Report] = {}
    for report in sorted(reports, key=lambda r: r.date):
        kept[report.benchmark, report.label] = report
    return list(kept.values())


def _weights(label: str) -> str:
    """What was measured, in words: of the models measured here one is trained, all others are shapes."""
    return f"{label}, a trained model" if label == real_model.LABEL else f"{label}'s shape, random weights"


def readme_table(report: Report) -> str:
    """A comparison of servers as README shows it: medians, a column a contestant."""
    names = list(report.rows[0].values)
    m = report.machine
    where = (
        f"{_weights(report.label)}, over HTTP; {m['cpu']}, {m['threads']} threads, {m['isa']}; torch "
        f"{m['torch'].partition('+')[0]}, commit `{report.commit}`. "
        f"Medians of {report.settings['repeat']} rounds in turn."
    )
    lines = [
        textwrap.fill(where, 118, break_on_hyphens=False),
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for row in report.rows:
        if row.values.keys() != set(names):  # a goal, which sets two of them side by side
            continue
        unit = f", {row.unit}" if row.unit else ""
        cells = [_number(row.values[name]["median"]) for name in names]
        lines.append(f"| {row.name}{unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, table: str) -> str:
    """README's text with the part between its two marks replaced."""
    begin, end = "<!-- benchmarks -->\n", "<!-- /benchmarks -->"
    head, _, rest = readme.partition(begin)
    _, mark, tail = rest.partition(end)
    if not mark:
        raise ValueError(f"README.md has no part between {begin.strip()} and {end}")
    return head + begin + table + mark + tail


def newest_comparison(folder: Path = RESULTS) -> Report | None:
    """The latest comparison that was not made with toy settings."""
    found = [r for r in map(read, sorted(folder.glob("*-compare-*.json"))) if not r.quick]
    return max(found, key=lambda r: r.date, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["table", "readme"])
    parser.add_argument("--dir", type=Path, default=RESULTS)
    parser.add_argument("--all", action="store_true", help="every run, not only the newest")
    arguments = parser.parse_args()
    if arguments.command == "readme":
        comparison = newest_comparison(arguments.dir)
        if comparison is None:
            raise SystemExit("There is no comparison yet: python benchmarks/compare.py")
        path = ROOT / "README.md"
        path.write_text(with_table(path.read_text(encoding="utf-8"), readme_table(comparison)), encoding="utf-8")
        return
    reports = [r for r in map(read, sorted(arguments.dir.glob("*.json"))) if not r.quick]
    shown = sorted(reports if arguments.all else newest(reports), key=lambda r: (r.benchmark, r.label, r.date))
    print("\n".join(report.markdown() for report in shown) or "No results yet.")


if __name__ == "__main__":
    main()
