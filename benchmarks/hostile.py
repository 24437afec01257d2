"""Every attack of attacks.py, one after the other, beside four clients that mean well: none of those may notice.

Run by `python benchmarks/soak.py hostile`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import ROOT, child_environment, summary
from benchmarks.place import HELLO, KEYS, Place, Wrong, place, settled_ledger, tree_bytes
from benchmarks.report import Report

HONEST = 4
_QUIET = 15.0  # seconds of honest clients alone
_HEALTH_PAUSE = 0.02
_SETTLED = 20.0  # seconds after which memory is looked at again


@dataclass(slots=True)
class Seen:
    """What honest clients met: seconds by kind of request, how often health was asked and how long it took."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    health: list[float] = field(default_factory=list)
    replies: dict[str, str] = field(default_factory=dict)
    """The reply to each request; the same one every time, whoever attacks."""
    answered: dict[str, int] = field(default_factory=dict)


def hostile(report: Report, rounds: int, quick: bool, model: Path | None = None) -> None:
    """Attacks, one after the other, beside four clients that mean well: none of those may notice."""
    with place(model) as found, found.serve() as (process, url):
        port = int(url.rsplit(":", 1)[1])
        seen = Seen()
        asyncio.run(_honestly(url, found, seen, 2.0))  # warm
        quiet = Seen(replies=seen.replies)
        asyncio.run(_honestly(url, found, quiet, 2.0 if quick else _QUIET))
        _attack(port, found.keys[-1], 1, 0)  # what is made once (a child for grammars, caches) is made now
        before = tree_bytes(process.pid)
        stormy = Seen(replies=seen.replies)
        attacks = asyncio.run(_stormy(url, found, stormy, port, rounds))
        rows = settled_ledger(found)
        time.sleep(1.0 if quick else _SETTLED)
        after = tree_bytes(process.pid)
        if process.poll() is not None:
            raise Wrong(f"the server ended with {process.returncode}")
    wrong = [attack for attack in attacks if not attack["right"]]
    for attack in attacks:
        said = f"{attack['got'][0]:>8} {attack['seconds']:6.2f} s  {attack['name']}"
        print(said, "" if attack["right"] else "  WRONG", file=sys.stderr)
    if wrong:
        raise Wrong(f"{len(wrong)} attacks had other answers: {[(a['name'], a['got']) for a in wrong]}")
    unpaid = [n for seen in (quiet, stormy) for n, tokens in seen.answered.items() if rows.get(n) != tokens]
    if unpaid:
        raise Wrong(f"{len(unpaid)} honest answers were not charged what they used")
    for kind, alone in quiet.seconds.items():
        besides = stormy.seconds[kind]
        report.add(
            f"an honest request: {kind}",
            "s",
            {"quiet": summary(alone), "under attack": summary(besides)},
            ratio=summary([summary(besides)[name] / summary(alone)[name] for name in ("min", "median", "max")]),
            ratio_of="× quiet: median (shortest … longest)",
            goal="≤ 2 ×, the longest too",
            met=all(summary(besides)[name] <= 2 * summary(alone)[name] for name in ("median", "max")),
        )
    longest = max(stormy.health)
    report.add(
        "/health/live",
        "ms",
        {
            "quiet": summary([1000 * s for s in quiet.health]),
            "under attack": summary([1000 * s for s in stormy.health]),
        },
        goal="≤ 100 at most",
        met=longest <= 0.1,
    )
    report.add(
        "resident memory, the server and its children",
        "MiB",
        {"before": summary([before / 2**20]), "after": summary([after / 2**20])},
        goal="≤ 1.1 ×",
        met=after <= 1.1 * before,
    )
    report.add("attacks", "", {"answered rightly": summary([float(len(attacks))])})
    report.add("an attack's answer", "s", {"all": summary([float(a["seconds"]) for a in attacks])})


async def _stormy(url: str, found: Place, seen: Seen, port: int, rounds: int) -> list[dict[str, Any]]:
    over = asyncio.Event()

    async def attack() -> list[dict[str, Any]]:
        try:
            return await asyncio.to_thread(_attack, port, found.keys[-1], rounds, 1)
        finally:
            over.set()

    attacks, _ = await asyncio.gather(attack(), _honestly(url, found, seen, 600.0, over))
    return attacks


def _attack(port: int, key: str, rounds: int, number: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.attacks", str(port), key, "--rounds", str(rounds), "--number", str(number)],
        cwd=ROOT,
        env=child_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=900,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


async def _honestly(url: str, found: Place, seen: Seen, seconds: float, over: asyncio.Event | None = None) -> None:
    """Four clients, each with one request after the other, and one that asks for the server's health."""
    end = time.monotonic() + seconds

    def goes_on() -> bool:
        return time.monotonic() < end and not (over is not None and over.is_set())

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def live(number: int) -> None:
            headers = {"authorization": f"Bearer {found.keys[number % (KEYS - 1)]}"}
            while goes_on():
                for kind, more in _HONEST_REQUESTS.items():
                    body = {"model": "tiny", "messages": HELLO, "max_tokens": 100, "seed": number, **more}
                    began = time.monotonic()
                    answer = await client.post("/v1/chat/completions", json=body, headers=headers)
                    seen.seconds.setdefault(kind, []).append(time.monotonic() - began)
                    if answer.status_code != 200:
                        raise Wrong(f"an honest request was answered {answer.status_code}: {answer.text[:300]}")
                    reply = answer.json()
                    text = json.dumps(reply["choices"])
                    if seen.replies.setdefault(f"{kind} {number}", text) != text:
                        raise Wrong(f"{kind}, seed {number}: the reply was another one")
                    seen.answered[reply["id"]] = reply["usage"]["total_tokens"]

        async def health() -> None:
            while goes_on():
                began = time.monotonic()
                answer = await client.get("/health/live")
                seen.health.append(time.monotonic() - began)
                if answer.status_code != 200:
                    raise Wrong(f"/health/live answered {answer.status_code}")
                await asyncio.sleep(_HEALTH_PAUSE)

        await asyncio.gather(health(), *(live(number) for number in range(HONEST)))


_HONEST_REQUESTS: dict[str, dict[str, Any]] = {
    "text": {"ignore_eos": True, "logprobs": True},
    "two choices": {"ignore_eos": True, "n": 2},
    "JSON": {"guided_json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
}
