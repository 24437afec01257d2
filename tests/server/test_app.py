"""Models, health, ids, the document: what stands around the one endpoint that matters."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
from importlib import metadata
from typing import Any

import pytest
from asgi import CHAT, begin, call, run
from fakes import INFO, STATS, FakeEngine, FakeRegistry, chat, make_app

from engine import EngineDead, GpuReport, ModelStatus, ReproducibilityReport
from server.api import fields, openapi
from server.app import create_app

LOADING = ModelStatus("slow", "loading", "reading shard 2 of 5")
FAILED = ModelStatus("org/broken", "failed", "config.json is missing")


# -- the two prefixes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/api" + CHAT])
def test_both_prefixes_answer(path: str) -> None:
    answer = call(make_app(), chat(seed=5), path=path)
    assert answer.status == 200
    body = answer.json
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", body.pop("id"))
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "fake",
        "system_fingerprint": "fp_fake",
        "seed": 5,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello wörld!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 4,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
    }


def test_a_seed_that_the_engine_drew_is_told() -> None:
    assert call(make_app(), chat()).json["seed"] == 77


def test_the_reply_names_the_model_not_the_clients_spelling() -> None:
    assert call(make_app(), chat()).json["model"] == INFO.id


def test_two_models_side_by_side() -> None:
    other = FakeEngine(info=dataclasses.replace(INFO, id="other", system_fingerprint="fp_other"))
    app = make_app(FakeEngine(), other)
    assert call(app, chat(model="other")).json["system_fingerprint"] == "fp_other"
    assert call(app, chat()).json["system_fingerprint"] == "fp_fake"
    assert len(other.requests) == 1


# -- unknown fields --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_ignored_fields_are_named_in_a_header(stream: bool) -> None:
    answer = call(make_app(), chat(stream=stream, foo=1, mirostat=2))
    assert answer.status == 200
    assert answer.headers["x-ignored-fields"] == "foo, mirostat"


def test_without_ignored_fields_there_is_no_header() -> None:
    assert "x-ignored-fields" not in call(make_app(), chat(user="me")).headers


def test_strict_params_refuses_them() -> None:
    app = make_app(strict_params=True)
    answer = call(app, chat(foo=1))
    assert (answer.status, answer.error["param"], answer.error["code"]) == (422, "foo", "unknown_field")
    assert call(app, chat(user="me", top_k=3)).status == 200


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
def test_models_are_listed_with_what_is_known_of_them(prefix: str) -> None:
    answer = call(make_app(FakeEngine(), LOADING, FAILED), path=f"{prefix}/models")
    assert answer.status == 200
    assert answer.json["object"] == "list"
    ready, loading, failed = answer.json["data"]
    for entry in (ready, loading, failed):
        assert (entry["object"], entry["owned_by"]) == ("model", "local")
        assert isinstance(entry["created"], int)
    assert (ready["id"], ready["state"], ready["context_length"]) == ("fake", "ready", 64)
    assert ready["system_fingerprint"] == "fp_fake"
    assert ready["default_sampling"] == {"temperature": 0.7}
    assert (loading["id"], loading["state"], loading["detail"]) == ("slow", "loading", "reading shard 2 of 5")
    assert (failed["state"], failed["detail"]) == ("failed", "config.json is missing")


def test_a_model_tells_whether_the_law_holds_and_why_not() -> None:
    law = ReproducibilityReport(False, "experts are not row-invariant.", (("packed", True), ("chunked", False)))
    app = make_app(FakeEngine(info=dataclasses.replace(INFO, law=law)))
    assert call(app, path="/v1/models/fake").json["reproducible"] == {
        "holds": False,
        "reason": "experts are not row-invariant.",
        "checks": {"packed": True, "chunked": False},
    }


def test_a_model_tells_what_a_gpus_memory_is_for() -> None:
    told = "24.0 GiB: weights 15.3, cache 6.1 (50,000 tokens), activations 0.5, free 2.1"
    app = make_app(FakeEngine(info=dataclasses.replace(INFO, memory=told)))
    assert call(app, path="/v1/models/fake").json["memory"] == told
    assert call(make_app(FakeEngine()), path="/v1/models/fake").json["memory"] is None


def test_a_model_tells_how_a_gpu_computes_it() -> None:
    report = GpuReport("kernels", (("graphs", "CUDA graph: other bits"),))
    app = make_app(FakeEngine(info=dataclasses.replace(INFO, gpu=report)))
    assert call(app, path="/v1/models/fake").json["gpu"] == {
        "rung": "kernels",
        "reasons": {"graphs": "CUDA graph: other bits"},
    }
    assert call(make_app(FakeEngine()), path="/v1/models/fake").json["gpu"] is None


def test_a_model_id_may_hold_a_slash() -> None:
    assert call(make_app(FAILED), path="/v1/models/org/broken").json["id"] == "org/broken"


def test_the_list_and_the_single_model_agree() -> None:
    app = make_app(FakeEngine(), LOADING)
    for entry in call(app, path="/v1/models").json["data"]:
        single = call(app, path=f"/v1/models/{entry['id']}").json
        parts = {name: single.pop(name) for name in ("fingerprint_parts", "default_parts") if name in single}
        assert single == entry
        assert bool(parts) == (entry["state"] == "ready"), "the list does not carry the parts"


# -- health ----------------------------------------------------------------------------------------------------------


class DeadOnes(FakeRegistry):
    """A registry that refuses to hand out an engine that has died."""

    def get(self, model_id: str) -> FakeEngine:
        raise EngineDead("the engine of fake has stopped: disk full")


@pytest.mark.parametrize(
    ("entries", "status", "word"),
    [
        ([FakeEngine()], 200, "ready"),
        ([FakeEngine(), LOADING], 503, "reading shard 2 of 5"),
        ([FakeEngine(), FAILED], 503, "config.json is missing"),
        ([FakeEngine(stats=dataclasses.replace(STATS, alive=False))], 503, "dead"),
        ([FakeEngine(stats=dataclasses.replace(STATS, stalled=True))], 503, "stalled"),
    ],
    ids=["ready", "loading", "failed", "dead", "stalled"],
)
def test_ready_means_every_engine_is(entries: list[Any], status: int, word: str) -> None:
    app = make_app(*entries)
    answer = call(app, path="/health/ready")
    assert answer.status == status
    assert word in answer.body.decode()
    assert set(answer.json["models"]) == {e.info.id if isinstance(e, FakeEngine) else e.id for e in entries}
    assert call(app, path="/health/live").status == 200
    assert call(app, path="/health").json == answer.json
    assert call(app, path="/health").status == status


def test_a_registry_that_hands_out_no_dead_engine_is_not_ready_either() -> None:
    registry: Any = DeadOnes(FakeEngine())
    answer = call(create_app(registry), path="/health/ready")
    assert answer.status == 503
    assert "disk full" in answer.json["models"]["fake"]


def test_the_version_is_that_of_the_distribution() -> None:
    assert call(make_app(), path="/version").json == {"version": metadata.version("verbatim-server")}


# -- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/nope", "/health/live"])
def test_a_harmless_request_id_comes_back(path: str) -> None:
    answer = call(make_app(), chat(), path=path, headers=[(b"x-request-id", b"my-id_1.2")])
    assert answer.headers["x-request-id"] == "my-id_1.2"


@pytest.mark.parametrize("given", [b"", b"a b", b"a\r\nb: c", b"x" * 129, b"\xff", b"<script>"])
def test_any_other_is_replaced(given: bytes) -> None:
    answer = call(make_app(), chat(), headers=[(b"x-request-id", given)])
    assert re.fullmatch(r"req-[0-9a-f]{24}", answer.headers["x-request-id"])


def test_ids_are_unique_even_if_the_clients_are_not() -> None:
    """The engine refuses an id that is in use, so a client's own must never become it."""
    app = make_app()

    async def twins() -> list[str]:
        pair = [begin(app, chat(), headers=[(b"x-request-id", b"same")]) for _ in range(2)]
        return [(await exchange.ended()).json["id"] for exchange in pair]

    assert len(set(run(twins()))) == 2


# -- what must not leak ----------------------------------------------------------------------------------------------


def test_prompts_and_answers_stay_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    app = make_app()
    call(app, chat(messages=[{"role": "user", "content": "my secret"}]))
    call(app, chat(messages=[{"role": "user", "content": "my secret"}], n=0))
    call(app, chat(messages=[{"role": "user", "content": "my secret"}], stream=True))
    assert "my secret" not in caplog.text
    assert "wörld" not in caplog.text


def test_nothing_is_reported_to_anybody_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """FastAPI can send traces, with the words of exceptions, to an address from the environment."""
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    app = make_app()
    telemetry = getattr(app, "_telemetry", None)
    if telemetry is None:
        pytest.skip("this FastAPI has no telemetry of its own")
    assert not any(telemetry[key] for key in ("tracing", "metrics", "logs", "auto_configure"))


def test_the_application_closes_the_registry_at_its_end() -> None:
    registry: Any = FakeRegistry(FakeEngine())
    app = create_app(registry)

    async def life() -> list[str]:
        inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        sent: list[str] = []

        async def send(message: Any) -> None:
            sent.append(message["type"])

        for kind in ("lifespan.startup", "lifespan.shutdown"):
            inbox.put_nowait({"type": kind})
        await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, inbox.get, send)
        return sent

    assert run(life()) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert registry.closed


# -- the document ----------------------------------------------------------------------------------------------------


def test_the_document_describes_the_body_and_every_status() -> None:
    document = call(make_app(), path="/openapi.json").json
    for prefix in ("/v1", "/api/v1"):
        operation = document["paths"][f"{prefix}/chat/completions"]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert schema["required"] == ["model", "messages"]
        assert set(schema["properties"]) == fields.CHAT.honoured.keys()
        assert {"200", "400", "404", "413", "422", "500", "503"} <= set(operation["responses"])
    operations = [op for path in document["paths"].values() for op in path.values()]
    assert len({op["operationId"] for op in operations}) == len(operations)


def test_the_documents_example_works() -> None:
    example = openapi.CHAT_BODY["content"]["application/json"]["example"]
    assert call(make_app(), {**example, "model": "fake"}).status == 200


def test_the_document_is_openapi_and_refers_to_nothing_that_is_not_in_it() -> None:
    document = call(make_app(), path="/openapi.json").json
    assert document["openapi"].startswith("3.1")
    assert {"title", "version"} <= document["info"].keys()
    references: list[str] = []

    def look(node: Any) -> None:
        if isinstance(node, dict):
            references.extend(value for key, value in node.items() if key == "$ref")
            for value in node.values():
                look(value)
        elif isinstance(node, list):
            for value in node:
                look(value)

    look(document)
    for reference in references:
        target = document
        assert reference.startswith("#/")
        for part in reference[2:].split("/"):
            target = target[part]
    for path, operations in document["paths"].items():
        assert path.startswith("/")
        for operation in operations.values():
            assert operation["summary"]
            assert all(answer["description"] for answer in operation["responses"].values())


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
def test_no_web_page_is_let_in(method: str) -> None:
    """A page in the user's browser can reach 127.0.0.1. It is told nothing, and nothing runs for it."""
    origin = [(b"origin", b"https://elsewhere.example"), (b"access-control-request-method", b"POST")]
    engine = FakeEngine()
    answer = call(make_app(engine), chat(), method=method, headers=origin)
    assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
    assert not engine.requests
    assert not any(name.startswith("access-control-") for name in answer.headers)
