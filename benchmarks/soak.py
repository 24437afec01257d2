"""What a shared server must survive: being killed, a crowd of all kinds of clients, attacks. Fails if a sum is wrong.

    python benchmarks/soak.py kill [--rounds 20]                    SIGKILL amid 64 requests, restart, check the sums
    python benchmarks/soak.py load [--clients 200] [--seconds 120]  good, bad, slow and vanishing clients at once
    python benchmarks/soak.py hostile [--rounds 2]                  every attack of attacks.py beside honest clients

All start servers of their own on the noise checkpoint, with keys, in a folder that is removed afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this very file would hide the package `server`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import httpx

from benchmarks import machine
from benchmarks.common import RESULTS, summary
from benchmarks.hostile import hostile
from benchmarks.place import HELLO, KEYS, Place, Wrong, check_ledger, place, settled_ledger, tree_bytes
from benchmarks.report import Report

_CONCURRENT = 64


# -- killed ------------------------------------------------------------------------------------------------------------


def kill(report: Report, rounds: int) -> None:
    """SIGKILL in the middle of 64 concurrent requests, `rounds` times, on one database."""
    answered: dict[str, int] = {}
    held = []
    with place() as found:
        for number in range(rounds):
            with found.serve() as (process, url):
                asyncio.run(_until_killed(url, found.keys, process, answered))
            with found.ledger() as ledger:
                held.append(sum(key.held > 0 for key in ledger.all_keys()))
            print(f"round {number + 1}: {len(answered)} answers so far", file=sys.stderr)
        with found.serve():  # a start releases what the last one left held
            rows = check_ledger(found)
    unpaid = [name for name, tokens in answered.items() if rows.get(name) != tokens]
    if unpaid:
        raise Wrong(f"{len(unpaid)} answers were not charged what they used: {unpaid[:3]}")
    if not any(held):
        raise Wrong("no round left anything held: it was not killed in the middle")
    report.add("answers", "", {"in all rounds": summary([float(len(answered))])}, note="each charged once.")
    report.add(
        "settled rows", "", {"in all rounds": summary([float(len(rows))])}, note="those whose answer was lost, too."
    )
    report.add("keys with holds after a kill", f"of {KEYS}", {"by round": summary([float(n) for n in held])})


async def _until_killed(url: str, keys: list[str], process: subprocess.Popen[bytes], answered: dict[str, int]) -> None:
    limits = httpx.Limits(max_connections=_CONCURRENT)
    async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:

        async def work(number: int) -> None:
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "ignore_eos": True}
            headers = {"authorization": f"Bearer {keys[number % KEYS]}"}
            while True:
                try:
                    answer = await client.post("/v1/chat/completions", json=body, headers=headers)
                except httpx.HTTPError:
                    return
                if answer.status_code != 200:
                    raise Wrong(answer.text)
                reply = answer.json()
                answered[reply["id"]] = reply["usage"]["total_tokens"]

        working = [asyncio.create_task(work(number)) for number in range(_CONCURRENT)]
        await asyncio.sleep(1.5)
        process.send_signal(signal.SIGKILL)
        await asyncio.gather(*working)


# -- a crowd -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Crowd:
    """What clients have seen."""

    statuses: Counter[str] = field(default_factory=Counter)
    answered: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


def load(report: Report, clients: int, seconds: float) -> None:
    """Mixed clients for a while; then: no 500, nothing held, every answer charged its usage, memory as before."""
    with place(send_seconds=5, body_seconds=5) as found, found.serve() as (process, url):
        asyncio.run(_crowd(url, found, Crowd(), clients, 5.0))  # warm: allocators and caches have their size
        before = tree_bytes(process.pid)
        crowd = Crowd()
        asyncio.run(_crowd(url, found, crowd, clients, seconds))
        rows = settled_ledger(found)
        after = tree_bytes(process.pid)
    faults = {
        name: count for name, count in crowd.statuses.items() if name.startswith("5") and not name.startswith("503")
    }
    if faults:
        raise Wrong(f"the server failed: {faults}; {(found.folder / 'log')}")
    unpaid = [name for name, tokens in crowd.answered.items() if rows.get(name) != tokens]
    if unpaid:
        raise Wrong(f"{len(unpaid)} answers were not charged what they used")
    if after - before > 64 * 2**20:
        raise Wrong(f"memory grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
    for name, count in sorted(crowd.statuses.items()):
        report.add(f"ended: {name}", "exchanges", {"count": summary([float(count)])})
    report.add("answered and charged", "", {"count": summary([float(len(crowd.answered))])})
    report.add("a good synchronous answer", "s", {"all": summary(crowd.seconds)}, note="under this crowd, 20 tokens.")
    mib = {"before": summary([before / 2**20]), "after": summary([after / 2**20])}
    report.add("resident memory", "MiB", mib)


async def _crowd(url: str, found: Place, crowd: Crowd, clients: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients + 10)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def live(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < end:
                kind = rng.choices(_KINDS, weights=_WEIGHTS)[0]
                headers = {"authorization": f"Bearer {rng.choice(found.keys)}"}
                try:
                    crowd.statuses[await kind(client, headers, rng, crowd)] += 1
                except httpx.HTTPError as error:
                    crowd.statuses[f"connection: {type(error).__name__}"] += 1

        await asyncio.wait_for(asyncio.gather(*(live(number) for number in range(clients))), seconds + 120)


def _body(rng: random.Random, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, "max_tokens": 20, "ignore_eos": True, "seed": rng.randrange(99), **more}


async def _good(client: httpx.AsyncClient, headers: dict[str, str], rng: random.Random, crowd: Crowd) -> str:
    began = time.monotonic()
    answer = await client.post("/v1/chat/completions", json=_body(rng, n=rng.choice([1, 1, 2])), headers=headers)
    if answer.status_code == 200:
        crowd.seconds.append(time.monotonic() - began)
        reply = answer.json()
        crowd.answered[reply["id"]] = reply["usage"]["total_tokens"]
    return f"{answer.status_code} good"


async def _stream(client: httpx.AsyncClient, headers: dict[str, str], rng: random.Random, crowd: Crowd) -> str:
    body = _body(rng, stream=True, stream_options={"include_usage": True})
    last = ""
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                last = line
    if answer.status_code == 200:
        reply = json.loads(last.removeprefix("data: "))
        if not reply.get("usage"):
            raise Wrong(f"a stream ended without its usage: {last}")
        crowd.answered[reply["id"]] = reply["usage"]["total_tokens"]
    return f"{answer.status_code} stream"


async def _bad(client: httpx.AsyncClient, headers: dict[str, str], rng: random.Random, crowd: Crowd) -> str:
    content, wrong = rng.choice(
        [
            (b"{", {}), (b"\xff", {}), (b"[]", {}), (json.dumps(_body(rng, temperature=9)).encode(), {}),
            (json.dumps(_body(rng, model="none")).encode(), {}), (json.dumps(_body(rng, messages=[])).encode(), {}),
            (json.dumps(_body(rng)).encode(), {"authorization": "Bearer vk-nobody"}), (b"x" * 10_000_000, {}),
        ]
    )  # fmt: skip
    answer = await client.post("/v1/chat/completions", content=content, headers={**headers, **wrong})
    return f"{answer.status_code} bad"


async def _vanishing(client: httpx.AsyncClient, headers: dict[str, str], rng: random.Random, crowd: Crowd) -> str:
    body = _body(rng, stream=rng.random() < 0.5, max_tokens=200)
    with contextlib.suppress(httpx.ReadTimeout):
        async with client.stream(
            "POST", "/v1/chat/completions", json=body, headers=headers, timeout=rng.uniform(0.05, 1.0)
        ) as answer:
            async for _ in answer.aiter_bytes():
                if rng.random() < 0.2:
                    break
    return "vanished"


async def _slow(client: httpx.AsyncClient, headers: dict[str, str], rng: random.Random, crowd: Crowd) -> str:
    raw = json.dumps(_body(rng, stream=True)).encode()
    pause = rng.choice([0.05, 0.2, 3.0])  # the last one is too slow

    async def dripping() -> AsyncIterator[bytes]:
        for start in range(0, len(raw), 40):
            yield raw[start : start + 40]
            await asyncio.sleep(pause)

    async with client.stream("POST", "/v1/chat/completions", content=dripping(), headers=headers) as answer:
        async for _ in answer.aiter_bytes():
            await asyncio.sleep(0.05)
    return f"{answer.status_code} slow"


_KINDS = (_good, _stream, _bad, _vanishing, _slow)
_WEIGHTS = (4, 3, 2, 2, 1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "load", "hostile"))
    parser.add_argument("--rounds", type=int, help="default: 20 of killing, 2 of attacks")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--model", type=Path, help="hostile: a folder with a checkpoint; default: the noise checkpoint")
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.rounds is None:
        arguments.rounds = 2 if arguments.what == "hostile" else 20
    if arguments.quick:
        arguments.rounds, arguments.clients, arguments.seconds = 1, 20, 3.0
    settings = {name: getattr(arguments, name) for name in ("rounds", "clients", "seconds")}
    report = Report(
        f"soak-{arguments.what}",
        arguments.model.resolve().name if arguments.model else "noise",
        machine.utc_now(),
        *machine.commit(),
        machine.describe(1),
        settings,
        arguments.quick,
    )
    if arguments.what == "kill":
        kill(report, arguments.rounds)
    elif arguments.what == "hostile":
        hostile(report, arguments.rounds, arguments.quick, arguments.model)
    else:
        load(report, arguments.clients, arguments.seconds)
    report.show()
    if arguments.out or not arguments.quick:
        print(report.write(arguments.out or RESULTS).name)


if __name__ == "__main__":
    main()
