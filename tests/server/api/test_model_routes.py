"""Models over HTTP: listed before they are loaded, loaded by requests and by those who may, unloaded by nobody else."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Answer, begin, call, run
from fakes import HELLO, INFO, SILENT, STATS, FakeEngine, chat
from ledger_for_tests import Clock

from engine import LoadProgress, ModelConfig, Outline, Registry
from server.accounts.charging import Meter
from server.app import create_app
from server.ledger.store import Ledger
from server.settings import ServerSettings

TAKEN = 2 * 2**30
ORIGIN = (b"origin", b"https://elsewhere.test")


class Opened:
    """Opens fake engines when `gate` allows it."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.script = HELLO
        self.begun: list[str] = []

    def __call__(self, config: ModelConfig, *, progress: Any, **_: Any) -> Any:
        self.begun.append(config.id)
        while not self.gate.wait(0.005):
            progress(LoadProgress(text="reading", bytes_read=25, total_bytes=100))
        info = dataclasses.replace(INFO, id=config.id, weight_bytes=2 * 2**30)
        return FakeEngine(self.script, info=info, stats=dataclasses.replace(STATS, resident_bytes=TAKEN))


class Memory:
    """Three GiB, of which each model takes two."""

    registry: Registry

    def free(self) -> int:
        return (3 - 2 * sum(one.memory_bytes is not None for one in self.registry.list())) * 2**30

    def outline(self, config: ModelConfig) -> Outline:
        return Outline(config.id, 1_700_000_001, "FakeForCausalLM", 123, 2 * 2**30)


@pytest.fixture
def opened() -> Opened:
    return Opened()


@pytest.fixture
def made(opened: Opened) -> Iterator[Callable[..., Registry]]:
    registries: list[Registry] = []

    def make(**loads: str) -> Registry:
        entries = [
            ModelConfig(id=name.replace("__", "/"), path=Path("/m"), load=load)  # type: ignore[arg-type]
            for name, load in loads.items()
        ]
        memory = Memory()
        memory.registry = Registry(entries, open=opened, memory=memory)
        registries.append(memory.registry)
        memory.registry.start()
        return memory.registry

    yield make
    opened.gate.set()
    for registry in registries:
        registry.close()


async def post(app: Any, path: str, body: Any = b"", **how: Any) -> Answer:
    return await begin(app, body, path=path, method="POST", **how).ended()


async def get(app: Any, path: str) -> Answer:
    return await begin(app, path=path).ended()


@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
def test_from_unloaded_to_unloaded(made: Callable[..., Registry], opened: Opened, prefix: str) -> None:
    registry = made(org__fake="on_demand")
    app = create_app(registry)
    path = f"{prefix}/models/org/fake"

    async def main() -> None:
        model = {}
        while "architecture" not in model:
            model = (await get(app, path)).json
        assert model == {
            "id": "org/fake",
            "object": "model",
            "created": 1_700_000_001,
            "owned_by": "local",
            "root": "org/fake",
            "parent": None,
            "state": "unloaded",
            "load": "on_demand",
            "memory_bytes": None,
            "detail": "loaded on demand",
            "architecture": "FakeForCausalLM",
            "weight_bytes": 123,
        }
        assert (await get(app, "/health/ready")).status == 200
        opened.gate.clear()
        answer = await post(app, f"{path}/load", b'{"wait": false, "odd": 1}')
        assert (answer.status, answer.headers["x-ignored-fields"]) == (202, "odd")
        asked = begin(app, chat(model="org/fake"))
        gone = begin(app, chat(model="org/fake"))
        await asked.until(lambda: registry.status("org/fake").progress is not None)
        model = (await get(app, path)).json
        assert (model["state"], model["detail"]) == ("loading", "reading")
        assert model["progress"] == {"bytes": 25, "total_bytes": 100}
        assert (await post(app, f"{path}/unload")).status == 409
        gone.disconnect()
        await asyncio.gather(gone.task, return_exceptions=True)  # type: ignore[arg-type]
        opened.gate.set()
        assert (await asked.ended()).status == 200
        answer = await post(app, f"{path}/load")
        assert (answer.status, answer.json["state"], answer.json["memory_bytes"]) == (200, "ready", TAKEN)
        answer = await post(app, f"{path}/unload", b"{}")
        assert (answer.status, answer.json["state"], answer.json["memory_bytes"]) == (200, "unloaded", None)
        assert answer.json["system_fingerprint"] == "fp_fake", "what was learnt by loading is still known"
        assert (await post(app, f"{path}/unload")).status == 200

    run(main())
    assert opened.begun == ["org/fake"]


def test_a_model_that_replies_is_not_unloaded(made: Callable[..., Registry], opened: Opened) -> None:
    opened.script = SILENT
    registry = made(a="on_demand", b="on_demand")
    app = create_app(registry)

    async def main() -> None:
        asked = begin(app, chat(model="a", stream=True))
        await asked.until(lambda: registry.status("a").state == "ready" and bool(registry.get("a").open))  # type: ignore[attr-defined]
        answer = await post(app, "/v1/models/a/unload", b'{"wait_seconds": 0.1}')
        assert (answer.status, answer.error["code"], answer.error["users"]) == (409, "model_in_use", 1)
        answer = await begin(app, chat(model="b")).ended()
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "no_room", "5")
        assert "b needs 2.0 GiB of memory, 1.0 GiB are free; loaded: a" in answer.error["message"]
        assert (answer.error["needed"], answer.error["free"]) == (2 * 2**30, 2**30)
        assert answer.error["holders"] == [{"id": "a", "memory_bytes": TAKEN, "requests": 1}]
        asked.disconnect()
        await asyncio.gather(asked.task, return_exceptions=True)  # type: ignore[arg-type]
        assert registry.status("a").users == 0
        answer = await begin(app, {"prompt": "abc", "model": "b"}, path="/tokenize").ended()
        assert answer.status == 200
        assert [one.state for one in registry.list()] == ["unloaded", "ready"]

    run(main())


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("load", b'{"wait": 1}', "invalid_format", "wait"),
        ("load", b"[]", "invalid_format", None),
        ("unload", b'{"wait_seconds": -1}', "invalid_parameter", "wait_seconds"),
        ("unload", b'{"wait_seconds": 1e9}', "invalid_parameter", "wait_seconds"),
        ("unload", b'{"wait_seconds": "x"}', "invalid_format", "wait_seconds"),
    ],
)
def test_bad_bodies_are_refused_by_name(
    made: Callable[..., Registry], path: str, body: bytes, code: str, param: str | None
) -> None:
    answer = call(create_app(made(a="on_demand")), body, path=f"/v1/models/a/{path}", method="POST")
    assert (answer.error["code"], answer.error["param"]) == (code, param)
    assert answer.status in (400, 422)


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_only_who_may_manage(made: Callable[..., Registry], verb: str, file_ledger: Ledger, clock: Clock) -> None:
    registry = made(a="on_demand", hidden="on_demand")
    app, path = create_app(registry), f"/v1/models/a/{verb}"
    assert call(app, b"", path="/v1/models/x/" + verb, method="POST").error["code"] == "model_not_found"
    answer = call(app, b"{}", path=path, method="POST", headers=[ORIGIN, (b"content-type", b"application/json")])
    assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
    answer = call(
        create_app(registry, ServerSettings(hosts=["box.lan"])), b"", path=path, method="POST", hosts=[b"box.lan"]
    )
    assert (answer.status, answer.error["code"]) == (403, "management_not_allowed")
    meter = Meter(file_ledger, {}, clock)
    locked = create_app(registry, meter=meter)
    for admin, status in ((False, 403), (True, 200)):
        secret = file_ledger.create_key(f"key-{admin}", admin=admin).secret
        key = (b"authorization", f"Bearer {secret}".encode())
        assert call(locked, b"", path=path, method="POST", headers=[key]).status == status
    assert call(locked, b"", path=path, method="POST").status == 401
    meter.close()


def test_a_key_is_not_told_of_models_that_it_may_not_use(
    made: Callable[..., Registry], file_ledger: Ledger, clock: Clock
) -> None:
    registry = made(secret="on_demand", a="on_demand")
    meter = Meter(file_ledger, {}, clock)
    key = file_ledger.create_key("ada", models=("a",)).secret

    async def main() -> None:
        with await registry.acquire("secret"):
            headers = [(b"authorization", f"Bearer {key}".encode())]
            answer = await begin(create_app(registry, meter=meter), chat(model="a"), headers=headers).ended()
            assert answer.error["code"] == "no_room"
            assert "loaded: 1 other model." in answer.error["message"] + "."
            assert b"secret" not in answer.body

    run(main())
    meter.close()


def test_a_server_is_ready_whose_models_have_left(made: Callable[..., Registry], opened: Opened) -> None:
    opened.gate.clear()
    registry = made(a="at_start")
    app = create_app(registry)
    assert call(app, chat(model="a")).error["code"] == "model_loading"
    assert call(app, path="/health/ready").status == 503
    opened.gate.set()
    registry.wait()
    assert call(app, path="/health/ready").status == 200
    assert call(app, b"", path="/v1/models/a/unload", method="POST").json["state"] == "unloaded"
    answer = call(app, path="/health/ready")
    assert (answer.status, answer.json["models"]) == (200, {"a": "unloaded: unloaded by request"})
    assert call(app, chat(model="a")).status == 200, "the next request has it loaded again"
