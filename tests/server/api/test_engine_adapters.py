"""Adapters over HTTP: models of their own, found by their ids, with fingerprints and receipts; keys name each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapters_for_tests as adapters
import pytest
from asgi import Answer, begin

from engine import ModelConfig, ModelNotFound, PreparedRequest, Registry, SamplingParams, fingerprint_of
from engine.serving.adapter_view import AdapterView
from server.app import create_app

HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def registry(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    place, base = tmp_path_factory.mktemp("adapters"), tiny("llama")
    common: dict[str, Any] = {"path": base, "cache_size": "8MiB", "context_length": 256, "threads": 1}
    one = adapters.write(place / "one", base)
    two = adapters.write(place / "two", base, targets=("q_proj",), seed=2)
    registry = Registry(
        [
            ModelConfig(id="org/base:8k", adapters={"one": one, "two": {"path": two}}, **common),
            ModelConfig(id="merged", adapters=[{"name": "one", "path": one, "merge": True}], **common),
        ]
    )
    registry.start()
    registry.wait()
    yield registry
    registry.close()


@pytest.fixture(scope="module")
def app(registry: Registry) -> Any:
    return create_app(registry)


def chat(app: Any, model: str, **fields: Any) -> Answer:
    body = {"model": model, "messages": HELLO, "seed": 3, "max_tokens": 8, "ignore_eos": True, **fields}
    return exchange(app, body)


def get(app: Any, path: str) -> Answer:
    return exchange(app, path=path)


def exchange(app: Any, body: Any = None, **how: Any) -> Answer:
    async def main() -> Answer:
        return await begin(app, body, **how).ended(60)

    return asyncio.run(main())


def test_adapters_are_listed_as_models_whose_root_is_their_base(app: Any) -> None:
    listed = {model["id"]: model for model in get(app, "/v1/models").json["data"]}
    assert list(listed) == ["org/base:8k", "org/base:8k:one", "org/base:8k:two", "merged"]
    told = {name: (model["root"], model["parent"], model["merged_adapter"]) for name, model in listed.items()}
    assert told == {
        "org/base:8k": ("org/base:8k", None, None),
        "org/base:8k:one": ("org/base:8k", "org/base:8k", None),
        "org/base:8k:two": ("org/base:8k", "org/base:8k", None),
        "merged": ("merged", None, "one"),
    }
    assert len({model["system_fingerprint"] for model in listed.values()}) == 4
    assert all(model["reproducible"]["holds"] for model in listed.values())
    one = get(app, "/v1/models/org/base:8k:one").json
    assert fingerprint_of(one["fingerprint_parts"], "vb-") == one["system_fingerprint"]
    assert one["fingerprint_parts"]["adapter_mode"] == "beside"
    assert get(app, "/health/ready").json["models"] == dict.fromkeys(listed, "ready")


def test_every_adapter_answers_under_its_own_name(app: Any) -> None:
    replies = {}
    for model in ("org/base:8k", "org/base:8k:one", "org/base:8k:two"):
        answer = chat(app, model)
        assert answer.status == 200
        assert answer.json["model"] == model
        assert answer.json["system_fingerprint"] == get(app, f"/v1/models/{model}").json["system_fingerprint"]
        replies[model] = answer.json["choices"][0]["message"]["content"]
        streamed = chat(app, model, stream=True).events
        assert (
            "".join(e["choices"][0]["delta"].get("content") or "" for e in streamed if e != "[DONE]") == replies[model]
        )
    assert len(set(replies.values())) == 3


@pytest.mark.parametrize("model", ["org/base:8k:three", "org/base:8k:", "org/base", "one", "merged:one", ":one"])
def test_what_is_no_adapter_is_no_model(app: Any, model: str) -> None:
    answer = chat(app, model)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert "org/base:8k:one" in answer.error["message"]


def test_a_receipt_is_checked_by_its_adapter(app: Any) -> None:
    for model in ("org/base:8k:two", "org/base:8k"):
        receipt = chat(app, model, receipt=True).json["receipt"]
        report = exchange(app, receipt, path="/v1/receipts/verify").json
        assert (report["verdict"], report["model"]) == ("identical", model)


def test_a_view_takes_only_its_own_requests(registry: Registry) -> None:
    view = registry.get("org/base:8k:one")
    assert isinstance(view, AdapterView)
    other = PreparedRequest(request_id="x", prompt_token_ids=(3,), params=SamplingParams(max_tokens=1, seed=1))
    with pytest.raises(ValueError, match="prepared for no adapter, not one"):
        view.submit(other)


def test_before_it_is_loaded_an_adapter_has_its_models_state(tmp_path: Path) -> None:
    registry = Registry([ModelConfig(id="m", path=tmp_path, adapters={"a": tmp_path / "a"})])
    assert [(s.id, s.state, s.parent) for s in registry.list()] == [("m", "waiting", None), ("m:a", "waiting", "m")]
    with pytest.raises(ModelNotFound, match="there is: m, m:a"):
        registry.get("m:b")
