"""The dashboard and the rules of `deploy/`, asked of a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from live_server import start
from prometheus_process import BOUND, MISSING, PROMETHEUS, prometheus, results, until

from server.ledger.store import Ledger

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
VARIABLES = {"$__rate_interval": "1m", "$model": ".*", "$job": ".*"}
WITHOUT_NUMBERS = {"verbatim:spec_decode_num_draft_tokens_total"}
"""Denominators that may stay 0 here: NaN is then right."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROMETHEUS is None, reason=MISSING)]


def queries() -> Iterator[tuple[str, str]]:
    """Each panel's title, and each of its queries as Grafana sends it."""
    for panel in json.loads((DEPLOY / "grafana.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], re.sub(r"\$\w+", lambda found: VARIABLES[found[0]], target["expr"])


def settled(address: str, query: str) -> bool:
    values = [float(one["value"][1]) for one in results(address, query)]
    return bool(values) and (any(not math.isnan(value) for value in values) or any(n in query for n in WITHOUT_NUMBERS))


def test_every_panel_has_data_and_no_rule_fires(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "models.yaml").write_text("models:\n  - {id: noise, builtin: noise}\nserver: {ledger: keys.db}\n")
    ledger = Ledger(f"sqlite:///{folder / 'keys.db'}", time.time)
    secret = ledger.create_key("root", admin=True).secret
    ledger.close()
    body = {"model": "noise", "messages": [{"role": "user", "content": "Hi" * 40}], "max_tokens": 8}
    with start([], folder) as server, prometheus(f"127.0.0.1:{server.port}", secret, tmp_path / "it") as address:
        until(address, "up", 1)
        waiting, deadline = dict.fromkeys(queries()), time.monotonic() + BOUND
        with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {secret}"}, timeout=60) as client:
            while waiting:  # a rate needs two scrapes, and something that happened between them
                assert time.monotonic() < deadline, list(waiting)
                assert client.post("/v1/chat/completions", json=body).status_code == 200
                assert client.post("/v1/chat/completions", json={**body, "temperature": 9}).status_code == 422
                time.sleep(1)
                waiting = {query: None for query in waiting if not settled(address, query[1])}
        for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]:
            for rule in group["rules"]:
                assert results(address, rule["expr"]) == [], rule["alert"]
