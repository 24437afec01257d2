"""Runs the clients of versions.toml against a scripted server and writes results.json and the page of them.

    python -m clients.run                 all of them: `make clients`
    python -m clients.run codex llm       some; the others' results are kept
    python -m clients.run --newest        the newest releases in place of the pinned ones; writes no page

Every client runs in a process of its own that ends after a while, and without a network: the server is on loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clients.environments import HERE, ROOT, Client, clients, install, versions
from clients.page import PAGE, page

RESULTS = HERE / "results.json"
SECONDS = 420
"""After which a client's script is ended; each of its tries has a bound of its own."""
OFFLINE = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_COLOR": "1"}


@contextlib.contextmanager
def scripted_server(folder: Path) -> Iterator[str]:
    """Run `clients.scripted_server` until the block ends. Yields its address."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "clients.scripted_server", str(folder)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise RuntimeError((folder / "server.log").read_text()[-2000:])
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def attempt(client: Client, root: str, log: Path, scratch: Path) -> list[dict[str, Any]]:
    """Run a client's script. Returns its tries, each with what the server says about it."""
    told, output = scratch / f"{client.id}.jsonl", scratch / f"{client.id}.log"
    told.touch()
    before = log.stat().st_size if log.exists() else 0
    script = HERE / client.script
    program = "node" if client.npm else str(client.folder / "bin" / "python")
    command = [program if script.parent.name != "commands" else sys.executable, str(script)]
    path = f"{HERE / 'python'}:{HERE / 'commands'}"
    variables = {"CLIENT_ROOT": root, "CLIENT_RESULTS": str(told), "CLIENT_ENVIRONMENT": str(client.folder)}
    home = scratch / f"{client.id}-home"
    home.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": path, **OFFLINE, **variables}
    fault = ""
    with output.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(SECONDS)
            fault = f"exit code {code}: {output.read_text()[-300:]}" if code else ""
        except subprocess.TimeoutExpired:
            fault = f"it was still running after {SECONDS} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with log.open() as lines:
        lines.seek(before)
        requests = [json.loads(line) for line in lines]
    tries = [json.loads(line) for line in told.read_text().splitlines()]
    if fault or not tries:
        last = requests[-1] if requests else {}
        tries.append({"endpoint": last.get("endpoint") or "", "try": "script", "error": fault or "it tried nothing"})
    return [judged(one, requests, str(scratch)) for one in tries]


def judged(one: dict[str, Any], requests: list[dict[str, Any]], scratch: str) -> dict[str, Any]:
    """Add to a try what the server said in it: refusals, ignored fields, fields that came."""
    mine = [r for r in requests if (r["endpoint"], r["try"]) == (one["endpoint"], one["try"])]
    fields = sorted({name for r in mine for name in r["fields"]})
    refusals = {f"{r['method']} {r['path']}: {r['status']} {_reason(r['error'])}" for r in mine if r["error"]}
    if one["try"] == "seed" and one["error"] and mine and not refusals and "seed" not in fields:
        refusals.add("the client does not send `seed`")
    return {
        "endpoint": one["endpoint"],
        "try": one["try"],
        "error": _told(one["error"], scratch) if not refusals or not one["error"] else "refused",
        "refusals": sorted(refusals)[:8],
        "ignored": sorted({name for r in mine for name in r["ignored"].split(", ") if name}),
        "fields": fields,
    }


def _told(error: str, scratch: str) -> str:
    """An error without the folders of this machine, so that results of two runs can be compared."""
    for folder in (scratch, str(ROOT), tempfile.gettempdir()):
        error = error.replace(folder, "…")
    return error[:600]


def _reason(body: str) -> str:
    """What an error body says, and the field that it names."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(body)["error"]
        message = error["message"].split(" There are: ")[0]  # a 404 lists every path
        return message + (f" (`{error['param']}`)" if error.get("param") else "")
    return body[:300]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="clients of versions.toml; default: all")
    parser.add_argument("--newest", action="store_true", help="without pins; writes no page")
    settings = parser.parse_args(argv)
    listed = clients()
    unknown = set(settings.names) - {client.id for client in listed}
    if unknown:
        parser.error(f"not in versions.toml: {', '.join(sorted(unknown))}")
    chosen = [client for client in listed if not settings.names or client.id in settings.names]
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"clients": {}}
    with tempfile.TemporaryDirectory(prefix="clients-") as scratch, scripted_server(Path(scratch)) as root:
        for client in chosen:
            client = client.newest() if settings.newest else client
            started = time.monotonic()
            reason = install(client)
            found = [] if reason else attempt(client, root, Path(scratch, "requests.jsonl"), Path(scratch))
            results["clients"][client.id] = {
                "versions": {} if reason else versions(client),
                "not installed": reason.replace(str(ROOT), "…"),
                "date": dt.date.today().isoformat(),
                "tries": found,
            }
            failed = [f"{one['endpoint']} {one['try']}" for one in found if one["error"]]
            summary = reason or f"{len(found) - len(failed)} of {len(found)} work"
            summary += f"; not {', '.join(failed)}" if failed else ""
            print(f"{client.name}: {summary} ({time.monotonic() - started:.0f} s)", flush=True)
            if not settings.newest:
                RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                PAGE.write_text(page(listed, results), encoding="utf-8")


if __name__ == "__main__":
    main()
