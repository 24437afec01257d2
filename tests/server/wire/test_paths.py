"""Paths and methods that are not served: the refusal says what would be right. `HEAD` is `GET`, a slash is nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from asgi import CHAT, Answer, call
from fakes import FakeEngine, chat, make_app
from hypothesis import given, strategies as st

from engine import ModelStatus
from server.app import PREFIXES
from server.wire.one_form import plain_path


def routes(app: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every (method, path) that an application answers."""
    for route in app.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from routes(inner, prefix + route.include_context.prefix)
        else:
            path = prefix + route.path.replace("{model_id:path}", "fake").replace("{receipt_id}", "none")
            yield from ((method, path) for method in sorted(route.methods))


APP = make_app()
ROUTES = sorted(set(routes(APP)))
LOADING = make_app(FakeEngine(), ModelStatus("slow", "loading", ""))
READ = sorted({path for method, path in ROUTES if method == "GET"})


def taken(path: str) -> set[str]:
    """The methods of a path. `verify` may be a receipt's id, too."""
    return {method for method, one in ROUTES if one in (path, path.replace("/verify", "/none"))}


def test_there_are_routes_to_try() -> None:
    assert {"/health", "/version", "/openapi.json", "/v1/models", "/api/v1/models/fake", "/v1/usage"} <= set(READ)
    assert {path for _, path in ROUTES} > {f"{prefix}/chat/completions" for prefix in PREFIXES}


def told(answer: Answer, path: str = "") -> Any:
    """What stays the same; of a path that tells the moment's numbers, its length does not."""
    other = {"x-request-id", "request-id"} | ({"content-length"} if path.endswith(("/metrics", "/machine")) else set())
    return answer.status, {name: value for name, value in answer.headers.items() if name not in other}


# -- HEAD and OPTIONS --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*READ, "/nope", CHAT, "/v1/models/nope", "/health/ready/"])
def test_head_is_get_without_its_body(path: str) -> None:
    """Health checks, browsers and `curl -I` ask so; also where the answer is a refusal."""
    get, head = call(LOADING, path=path), call(LOADING, path=path, method="HEAD")
    assert told(head, path) == told(get, path)
    assert head.body == b""
    for answer in (head, get):
        assert int(answer.headers["content-length"]) > 0
    assert int(get.headers["content-length"]) == len(get.body)


@pytest.mark.parametrize("path", sorted({path for _, path in ROUTES}))
def test_options_names_the_methods_and_they_are_the_ones(path: str) -> None:
    answer = call(APP, path=path, method="OPTIONS")
    assert (answer.status, answer.body) == (204, b"")
    named = answer.headers["allow"].split(", ")
    own = taken(path)
    assert set(named) == own | {"OPTIONS"} | ({"HEAD"} if "GET" in own else set())


def test_options_of_the_server_and_of_nothing() -> None:
    assert call(APP, path="*", method="OPTIONS").status == 204
    assert call(APP, path="/nope", method="OPTIONS").error["code"] == "not_found"


@pytest.mark.parametrize("path", sorted({path for _, path in ROUTES}))
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "TRACE"])
def test_a_method_that_a_path_does_not_take_is_refused_with_those_it_takes(method: str, path: str) -> None:
    own = taken(path)
    if method in own:
        return
    answer = call(APP, b"{}", path=path, method=method)
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert own <= set(answer.headers["allow"].split(", ")) == set(answer.error["methods"])
    assert f"{path} takes" in answer.error["message"]
    assert f"not {method}" in answer.error["message"]


# -- one form of a path ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", READ)
def test_a_slash_at_the_end_or_twice_changes_nothing(path: str) -> None:
    """Never a redirection: clients follow it without the body of a POST, or without the key."""
    app = APP
    plain = told(call(app, path=path), path)
    for other in (path + "/", path + "//", "/" + path, path.replace("/", "//")):
        assert told(call(app, path=other), path) == plain


def test_a_post_with_a_slash_is_the_post() -> None:
    for path in (CHAT + "/", "/v1//chat/completions"):
        assert call(APP, chat(), path=path).status == 200


@given(st.text("/ab*", max_size=8))
def test_the_one_form_is_one(path: str) -> None:
    found = plain_path("/" + path)
    assert found == plain_path(found)
    assert "//" not in found
    assert found == "/" or not found.endswith("/")
    assert found.replace("/", "") == path.replace("/", "")


# -- paths that are not there ------------------------------------------------------------------------------------------

BASES = [
    # path, what was meant, words
    ("/chat/completions", CHAT, "let the client's base URL end in /v1. This one had no path."),
    ("/completions", "/v1/completions", "end in /v1"),
    ("/models", "/v1/models", "end in /v1"),
    ("/models/qwen", "/v1/models/qwen", "end in /v1"),
    ("/api/chat/completions", CHAT, "This one ended in /api."),
    ("/v2/chat/completions", CHAT, "This one ended in /v2."),
    ("/openai/v1/chat/completions", CHAT, "This one ended in /openai/v1."),
    ("/openai/deployments/x/chat/completions", CHAT, "end in /v1"),
    ("/v1/v1/chat/completions", CHAT, "leave /v1 out of the client's base URL, it is there twice"),
    ("/v1/v1/models", "/v1/models", "twice"),
    ("/api/v1/v1/chat/completions", CHAT, "twice"),
    ("/v1/api/v1/models", "/v1/models", "twice"),
    (CHAT + "/chat/completions", CHAT, f"This one ended in {CHAT}."),
    (CHAT + "/models", "/v1/models", f"This one ended in {CHAT}."),
]


@pytest.mark.parametrize(("path", "meant", "words"), BASES, ids=[case[0] for case in BASES])
def test_a_wrong_base_url_is_told_the_right_one(path: str, meant: str, words: str) -> None:
    answer = call(APP, b"{}", path=path)
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert f"nothing at {path}; {meant} was meant" in answer.error["message"]
    assert words in answer.error["message"]


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/v1/chat/completion", CHAT),
        ("/v1/chat/completionss", CHAT),
        ("/v1/completion", "/v1/completions"),
        ("/v1/model", "/v1/models"),
        ("/api/v1/chat/completion", "/api" + CHAT),
        ("/tokenise", "/tokenize"),
        ("/health/red", "/health/ready"),
    ],
)
def test_a_misspelled_path_is_told_the_nearest(path: str, near: str) -> None:
    assert f"did you mean {near}?" in call(APP, b"{}", path=path).error["message"]


def test_any_other_is_told_every_path_there_is() -> None:
    message = call(APP, path="/nope").error["message"]
    told = message.partition("There are: ")[2].split(", ")
    own = {path.replace("fake", "{model_id}").replace("none", "{receipt_id}") for _, path in ROUTES}
    assert set(told[:-2]) == {path for path in own if not path.startswith("/api/v1/")}
    assert "under /api/v1, too" in message
    assert len(call(APP, path="/" + "x" * 8000).body) < 2000


OTHERS = [
    ("/v1/embeddings", "computes no embeddings", ""),
    ("/embeddings", "computes no embeddings", ""),
    ("/api/v1/embeddings", "computes no embeddings", ""),
    ("/v1/audio/transcriptions", "text only", ""),
    ("/v1/images/generations", "text only", ""),
    ("/v1/rerank", "ranks no documents", ""),
    ("/rerank", "ranks no documents", ""),
    ("/v1/moderations", "moderation", ""),
    ("/v1/files/file-1/content", "stores no files", "verbatim batch"),
    ("/v1/threads/t/runs", "conversations", CHAT),
    ("/v1/threads/t/messages", "conversations", CHAT),
    ("/api/v1/threads/t/messages", "conversations", CHAT),
    ("/threads/t/messages", "conversations", CHAT),
    ("/v1/files/completions", "stores no files", "verbatim batch"),
    ("/v1/complete", "older path", CHAT),
    ("/api/chat", "Ollama", CHAT),
    ("/api/generate", "Ollama", "/v1/completions"),
    ("/api/tags", "Ollama", "/v1/models"),
    ("/api/embed", "computes no embeddings", ""),
    ("/completion", "llama.cpp", "/v1/completions"),
    ("/props", "llama.cpp", "/v1/models"),
    ("/generate", "another server", CHAT),
]


@pytest.mark.parametrize(("path", "why", "instead"), OTHERS, ids=[case[0] for case in OTHERS])
def test_what_other_servers_have_is_refused_by_name(path: str, why: str, instead: str) -> None:
    """404 and not 501, which the official client would send again and again."""
    answer = call(APP, b"{}", path=path)
    assert (answer.status, answer.error["code"]) == (404, "not_supported")
    assert why in answer.error["message"]
    assert instead in answer.error["message"].partition("Instead: ")[2]


def test_what_is_named_instead_is_there() -> None:
    there = {path.replace("fake", "{model_id}") for _, path in ROUTES}
    for _, _, instead in OTHERS:
        assert not instead.startswith("/") or instead in there


@pytest.mark.parametrize(
    ("path", "anthropics"),
    [
        ("/v1/messages", True),
        ("/api/v1/messages", True),
        ("/v1/messages/count_tokens", True),
        ("/v1/messages/batches", True),
        ("/v1/messages/batches/b/results", True),
        ("/messages", True),
        ("/api/messages", True),
        ("/v1/v1/messages", True),
        ("/api/v1/v1/messages/count_tokens", True),
        ("/v1/messages/v1/messages", True),
        ("/anthropic/v1/messages", True),
        ("/v1/threads/t/messages", False),
        ("/threads/t/messages", False),
        ("/v1/conversations/messages", False),
        ("/v1/models/my/messages", False),
        ("/v1/models/v1/messages", False),
        ("/v1/messages_of_mine", False),
        ("/v1/chat/completions", False),
    ],
)
def test_an_error_has_the_shape_that_the_clients_of_its_path_read(path: str, anthropics: bool) -> None:
    answer = call(APP, path=path, method="DELETE" if "models" not in path else "GET")
    assert answer.status in (404, 405)
    body = json.loads(answer.body)
    assert (body.get("type") == "error") is anthropics
    assert ("request_id" in body) is anthropics
    assert "param" in body["error"]
