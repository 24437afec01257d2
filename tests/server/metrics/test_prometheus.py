"""A real Prometheus scrapes a real server, and its figures are those of the ledger and of the replies."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest
from live_server import Server, start
from prometheus_process import BOUND, MISSING, PROMETHEUS, prometheus, until

from server.ledger.store import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROMETHEUS is None, reason=MISSING)]


def use(server: Server, secret: str) -> list[dict[str, int]]:
    """Some replies, whole, streamed and left. Returns the usage of those that tell it."""
    headers, told = {"authorization": f"Bearer {secret}"}, []
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        for i in range(3):
            # Without `ignore_eos` a drawn reply ends by itself now and then.
            body = {"model": "noise", "messages": [{"role": "user", "content": "Hi" * 40}], "n": 2, "ignore_eos": True}
            body |= {"max_tokens": 8 + i}
            told.append(client.post("/v1/chat/completions", json=body).json()["usage"])
        stream = {**body, "stream": True}
        assert client.post("/v1/chat/completions", json=stream).text.endswith("data: [DONE]\n\n")
        with client.stream("POST", "/v1/chat/completions", json={**stream, "max_tokens": 400}) as left:
            next(left.iter_lines())
        assert client.post("/v1/chat/completions", json={**body, "temperature": 9}).status_code == 422
    return told


def test_its_figures_are_those_of_the_ledger(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "models.yaml").write_text("models:\n  - {id: noise, builtin: noise}\nserver: {ledger: keys.db}\n")
    ledger = Ledger(f"sqlite:///{folder / 'keys.db'}", time.time)
    root, ada = ledger.create_key("root", admin=True), ledger.create_key("ada")
    with start([], folder) as server, prometheus(f"127.0.0.1:{server.port}", root.secret, tmp_path / "it") as address:
        until(address, "up", 1)
        told = use(server, ada.secret)
        until(address, "sum(verbatim:replies_total)", 5)
        deadline = time.monotonic() + BOUND
        while not (rows := ledger.usage()) or rows[0]["requests"] < 5:
            assert time.monotonic() < deadline, rows
            time.sleep(0.1)
        [row] = rows
        assert row["completion_tokens"] > sum(usage["completion_tokens"] for usage in told)
        for metric, column in (
            ("prompt_tokens_total", "prompt_tokens"),
            ("prefix_cache_hits_total", "cached_tokens"),
            ("generation_tokens_total", "completion_tokens"),
        ):
            until(address, f'verbatim:{metric}{{model_name="noise"}}', row[column])
        until(address, 'verbatim:replies_total{outcome="complete"}', 4)
        until(address, 'verbatim:request_success_total{finished_reason="length"}', 8)
        until(address, 'verbatim:refusals_total{status="422"}', 1)
        until(address, "verbatim:time_to_first_token_seconds_count", 5)
        until(address, 'verbatim:model_state{state="ready"}', 1)
        until(address, "verbatim:ledger_up", 1)
    ledger.close()
