"""Requests made from the served description: none of them is a 500, and what the description promises is so.

`VERBATIM_SCHEMA_REQUESTS=5000` makes that many; a hundred otherwise.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode

import pytest
import schemathesis
from asgi import Answer, begin
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from engine import AsyncEngine, Registry
from server.accounts.authentication import OPEN
from server.accounts.charging import Meter
from server.app import create_app
from server.errors import TABLE
from server.ledger.store import Ledger

REQUESTS = int(os.environ.get("VERBATIM_SCHEMA_REQUESTS", "120"))
CHAT = "/v1/chat/completions"
CAPS = {
    "/responses": {"max_output_tokens": 2},
    "/completions": {"max_tokens": 2, "max_completion_tokens": 2, "n": 1},
}
"""Fields that keep a reply short."""


@pytest.fixture
def app(registry: Registry, tmp_path: Path) -> Iterator[tuple[Any, str]]:
    """The application over a real engine, and a key that is not metered."""
    meter = Meter(Ledger(f"sqlite:///{tmp_path / 'verbatim.db'}", lambda: 1.8e9), {}, lambda: 1.8e9)
    yield create_app(registry, meter=meter), meter._ledger.create_key("ada").secret
    meter.close()


async def send(app: Any, secret: str, case: Any, body: Any) -> Answer:
    """A generated case as a request; text where there should be JSON stays as it is."""
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    query = urlencode(case.query or {}, doseq=True, errors="replace").encode()
    path = unquote(case.formatted_path, errors="replace")
    headers = [(b"authorization", f"Bearer {secret}".encode())]
    return await begin(app, raw, path=path, method=case.method, headers=headers, query=query).ended(30)


def _exchange(app: Any, secret: str, strategy: Any, seen: Counter[int], count: int) -> None:
    """Send what a strategy makes, every other completion to the model that is there, and short."""

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def ask(case: Any) -> None:
        body = case.body if case.method == "POST" and case.body is not schemathesis.core.NOT_SET else None
        if isinstance(body, dict) and "model" in body and sum(seen.values()) % 2:
            short = next((cap for path, cap in CAPS.items() if case.path.endswith(path)), {"max_tokens": 2})
            body = {**body, "model": "tiny", **short}
        answer = asyncio.run(send(app, secret, case, body))
        seen[answer.status] += 1
        assert answer.status < 500, (case.formatted_path, body, answer.body)
        if answer.status >= 400:
            assert answer.error["message"]

    ask()


@pytest.mark.slow
def test_no_request_is_a_500(app: tuple[Any, str], engine: AsyncEngine) -> None:
    application, secret = app
    seen: Counter[int] = Counter()
    operations = [found.ok() for found in schemathesis.openapi.from_dict(application.openapi()).get_all_operations()]
    assert len(operations) >= 8
    for operation in operations:
        chat = operation.path.endswith(("/chat/completions", "/messages", "/responses"))
        share = REQUESTS // 4 if chat else max(REQUESTS // 40, 3)  # most of them for replies, under either prefix
        for mode in GenerationMode if chat else (GenerationMode.POSITIVE,):
            strategy = operation.as_strategy(generation_mode=mode)

            _exchange(application, secret, strategy, seen, share)
    assert {200, 400, 404, 422} <= set(seen)
    assert sum(seen.values()) >= REQUESTS * 0.9, seen


def test_the_description_names_every_status_and_field() -> None:
    from fakes import make_app

    from server.api.fields import CHAT as TABLE_OF_CHAT

    document = make_app().openapi()
    operation = document["paths"][CHAT]["post"]
    assert {int(status) for status in operation["responses"]} >= {status for _, status, _ in TABLE} - {409} | {200}
    for path, status in (("load", 503), ("unload", 409)):
        assert str(status) in document["paths"][f"/v1/models/{{model_id}}/{path}"]["post"]["responses"]
    fields = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert TABLE_OF_CHAT.honoured.keys() == set(fields)


def test_the_description_of_a_server_with_keys(app: tuple[Any, str]) -> None:
    document = app[0].openapi()
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    free = {path for path, item in document["paths"].items() if item.get("get", {}).get("security") == []}
    assert free == OPEN
