"""Try everything on a graphics card, and write one file and one page to send home.

    make gpu                                                  everything, with Qwen3-0.6B's shape and random weights
    make gpu ARGS="--model DIR --only probe --only bench"     a checkpoint of yours; only these parts
    python benchmarks/gpu_report.py --device cpu --quick      the same steps without a card

Parts: what the card is, the checks of `verbatim gpu-probe`, the tests that need a GPU, the law's own tests, times of
the linear kernel's tiles, and speeds beside transformers. Each runs in a process of its own, so that each survives the
failure of another. The page names no path, host or user.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder holds files that must not hide packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine
from benchmarks.common import RESULTS, ROOT, summary
from benchmarks.gpu_parts import PARTS
from benchmarks.report import Report

COMMAND = ["-m", "benchmarks.gpu_parts"]
_MINUTES = {"card": 5, "probe": 30, "tests": 30, "invariants": 60, "tune": 60, "bench": 60}
"""What a part may take; one that takes longer is ended."""


def run_part(name: str, settings: dict[str, Any], minutes: float) -> dict[str, Any]:
    """Run one part in a process of its own: `state` (ok, failed), `seconds`, and what it found or why it failed."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        out = Path(folder) / "found.json"
        command = [sys.executable, *COMMAND, name, str(out), json.dumps(settings)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        fault = ""
        try:
            status = child.wait(minutes * 60)
            if status:
                fault = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        except subprocess.TimeoutExpired:
            fault = f"took longer than {minutes:g} minutes"
        finally:
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        seconds = round(time.monotonic() - start, 1)
        if fault or not out.exists():
            said.seek(0, os.SEEK_END)
            said.seek(max(0, said.tell() - 3000))
            tail = said.read().decode(errors="replace")
            return {"state": "failed", "seconds": seconds, "fault": fault or "found nothing", "tail": tail}
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return {"state": "ok" if found.get("well", True) else "failed", "seconds": seconds, "found": found}


def scrubbed(value: Any) -> Any:
    """The same value without the paths of this checkout, its environment and this user."""
    if isinstance(value, dict):
        return {key: scrubbed(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(inner) for inner in value]
    if not isinstance(value, str):
        return value
    for path, name in ((str(ROOT), "."), (sys.prefix, "VENV"), (tempfile.gettempdir(), "TMP"), (str(Path.home()), "~")):
        if path != "/":
            value = value.replace(path, name)
    return value


def add_rows(report: Report, parts: dict[str, Any]) -> None:
    """Bring what was measured into rows; parts that failed have none."""
    for name, part in parts.items():
        report.add(f"part: {name}", "1 is well", {"verbatim": summary([float(part["state"] == "ok")])})
    speed = parts.get("card", {}).get("found", {}).get("copy_bytes_per_second")
    if speed:
        report.add("a copy", "GB/s", {"read and written": summary([speed / 1e9])})
    bench = parts.get("bench", {}).get("found", {})
    for row in bench.get("rows", ()):
        more = {"ratio": row["ratio"], "ratio_of": "× transformers"} if "ratio" in row else {}
        report.add(row["name"], "tokens/s", row["values"], **more)
        streams = re.match(r"decode, (\d+) streams", row["name"])
        if streams and speed:
            shares = {
                who: summary([100 * bench["weight_bytes"] * found["median"] / int(streams[1]) / speed])
                for who, found in row["values"].items()
            }
            report.add(f"share of a copy's speed, {row['name']}", "%", shares, note="weights alone, read once a step")


def page(report: Report, parts: dict[str, Any]) -> str:
    """The page: hardware, what each part found, the numbers, and the proposed table of tiles."""
    card = parts.get("card", {}).get("found", {})
    lines = [f"# {report.title}", ""]
    lines += [f"- {key}: {value}" for key, value in card.items() if value != ""]
    lines += ["", "| part | | seconds | |", "|---|---|---|---|"]
    for name, part in parts.items():
        lines.append(f"| {name} | {part['state']} | {part['seconds']:g} | {_cell(_told(name, part))} |")
    probe = parts.get("probe", {}).get("found", {})
    if probe:
        lines += ["", "## Checks", "", "| check | | |", "|---|---|---|"]
        lines += [f"| {c['name']} | {c['state']} | {_cell(c['detail'])} |" for c in probe["checks"]]
    lines += ["", "## Numbers", "", report.markdown()]
    tune = parts.get("tune", {}).get("found", {})
    if tune:
        lines += ["## Tiles", "", f"The fastest on this card, as a proposal for the family `{tune['family']}`:"]
        lines += [
            "lines few, some, many rows; columns narrow, middle, wide, output layer; each `block_m, block_n, warps,"
        ]
        lines += ["stages`.", "", "```json", json.dumps(tune["table"], indent=1), "```", ""]
    for name, part in parts.items():
        tail = part.get("tail") or part.get("found", {}).get("tail")
        if tail:
            lines += [f"## The end of what {name} said", "", "```", tail.replace("```", "'''"), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _told(name: str, part: dict[str, Any]) -> str:
    found = part.get("found", {})
    if "fault" in part:
        return str(part["fault"])
    if name == "bench":
        loaded = found["loaded"].get("verbatim", {})
        law = {True: "the law holds", False: "the law does not hold"}.get(loaded.get("law_holds"), "")
        rung = loaded.get("gpu")
        known = [found["model"], *([law] if law else []), *([f"rung {rung}"] if rung else [])]
        return "; ".join([*known, *(f"{k}: {v}" for k, v in found["faults"].items())])
    if name in ("tests", "invariants"):
        return "; ".join([found["summary"], *found["failed"]])
    return ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--model", type=Path, help="a folder with a checkpoint; default: random weights")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="run only this part; may be repeated")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--minutes", type=float, help="the most that one part may take")
    parser.add_argument("--out", type=Path, help="folder for both files; default benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    arguments = parser.parse_args(argv)
    model = str(arguments.model.resolve()) if arguments.model else ""
    settings = {"device": arguments.device, "quick": arguments.quick, "threads": arguments.threads, "model": model}
    parts: dict[str, Any] = {}
    for name in arguments.only or PARTS:
        print(f"{name} …", file=sys.stderr, flush=True)
        parts[name] = scrubbed(run_part(name, settings, arguments.minutes or _MINUTES[name]))
        print(f"{name}: {parts[name]['state']} {parts[name].get('fault', '')}", file=sys.stderr, flush=True)
    commit, dirty = machine.commit()
    card = parts.get("card", {}).get("found", {}).get("gpu") or arguments.device
    where, told = machine.describe(arguments.threads), {"device": arguments.device, "parts": parts}
    report = Report("gpu-report", card, machine.utc_now(), commit, dirty, where, told, bool(arguments.quick))
    add_rows(report, parts)
    report.show()
    if arguments.out or not arguments.quick:
        path = report.write(arguments.out or RESULTS)
        path.with_suffix(".md").write_text(page(report, parts), encoding="utf-8")
        print(f"To send home: {path.name} and {path.with_suffix('.md').name} (docs/guides/gpu.md)")
    return 0 if all(part["state"] == "ok" for part in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
