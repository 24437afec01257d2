"""A field that one endpoint has and another has not is refused there by name: it is never ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgi import call
from fakes import make_app

from engine import SAMPLING_FIELDS
from server.api.completions.fields import COMPLETION
from server.api.fields import CHAT, KNOWN, RECORDS, BodyFields
from server.api.messages.fields import COUNT, MESSAGE
from server.api.responses.fields import RESPONSES
from server.api.tokenizer.fields import DETOKENIZE, TOKENIZE

MESSAGES = {"messages": [{"role": "user", "content": "Hi"}]}
ENDPOINTS: dict[str, tuple[BodyFields, dict[str, Any]]] = {
    "/chat/completions": (CHAT, MESSAGES),
    "/completions": (COMPLETION, {"prompt": "Hi"}),
    "/responses": (RESPONSES, {"input": "Hi"}),
    "/messages": (MESSAGE, {"max_tokens": 5, **MESSAGES}),
    "/messages/count_tokens": (COUNT, MESSAGES),
}
TABLES = [*(fields for fields, _ in ENDPOINTS.values()), TOKENIZE, DETOKENIZE]


def test_what_one_endpoint_knows_all_know() -> None:
    known = {name for fields in TABLES for name in fields.known}
    assert known - RECORDS - {"model"} == set(KNOWN)
    assert not RECORDS & set(KNOWN)
    for fields, _ in list(ENDPOINTS.values())[:4]:
        assert fields.known >= set(KNOWN)
        assert not set(fields.honoured) & set(fields.refused)
    assert COUNT.known | set(MESSAGE.honoured) >= set(KNOWN), "a count may come with a message's whole body"


@pytest.mark.parametrize("path", ENDPOINTS)
def test_it_is_refused_unless_it_asks_for_nothing(path: str) -> None:
    fields, body = ENDPOINTS[path]
    app = make_app()
    for name, neutral in fields.refused.items():
        asks = {"model": "fake", **body, name: {"a": ["b"]}}
        answer = call(app, asks, path="/v1" + path)
        error = answer.json["error"]
        assert (answer.status, error["code"], error["param"]) == (422, "unsupported_parameter", name)
        assert name in error["message"]
        for value in (None, *neutral):
            answer = call(app, {**asks, name: value}, path="/v1" + path)
            assert (answer.status, answer.headers.get("x-ignored-fields")) == (200, None), (name, value, answer.body)


@pytest.mark.parametrize(("fields", "name"), [(RESPONSES, "n"), (MESSAGE, "n"), (CHAT, "best_of"), (CHAT, "typical_p")])
def test_a_number_is_what_it_says(fields: BodyFields, name: str) -> None:
    [path] = [path for path, (table, _) in ENDPOINTS.items() if table is fields]
    for value, status in ((1, 200), (1.0, 200), (True, 422), (1.5, 422), (2, 422), ("1", 422)):
        body = {"model": "fake", **ENDPOINTS[path][1], name: value}
        assert call(make_app(), body, path="/v1" + path).status == status, value


@pytest.mark.parametrize("path", ENDPOINTS)
def test_records_are_never_refused(path: str) -> None:
    """They have no effect anywhere, and clients send them everywhere."""
    body = {"model": "fake", **ENDPOINTS[path][1]}
    for name in RECORDS:
        value: Any = {} if name in ("metadata", "client_metadata", "prompt_cache_options", "cache_control") else "a"
        assert call(make_app(), {**body, name: value}, path="/v1" + path).status == 200, name


@pytest.mark.parametrize(("given", "told"), [(7.0, 7), (7, 7), (-1, None), (-1.0, None), (None, None)])
def test_a_response_repeats_numbers_as_they_were_read(given: Any, told: int | None) -> None:
    body = {"model": "fake", "input": "Hi", "max_output_tokens": given, "max_tool_calls": 3.0}
    answer = call(make_app(), body, path="/v1/responses")
    assert answer.status == 200, answer.body
    found = answer.json["max_output_tokens"], answer.json["max_tool_calls"]
    assert json.dumps(found) == json.dumps((told, 3))
    assert SAMPLING_FIELDS["max_tokens"].off == -1
