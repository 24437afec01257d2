"""What a scripted model says to a request, and what the log tells of a request."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import httpx
import pytest
from clients.request_log import RequestLog
from clients.run import judged
from clients.scripted_server import ScriptedModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine import ChatMessage, Constraint, GenerationRequest, Tool, ToolCall, ToolChoice

NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOLS = (Tool("one", parameters=NUMBER), Tool("two"))
HELLO = (ChatMessage("user", "Hello"),)
DONE = (*HELLO, ChatMessage("assistant", None, tool_calls=(ToolCall("c", "one", "{}"),)), ChatMessage("tool", "4"))
CALLS_ONE = '<tool_call>\n{"name": "one", "arguments": {"n": 4}}\n</tool_call>'
CALLS_TWO = '<tool_call>\n{"name": "two", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("script", "fields", "said"),
    [
        ({}, {}, "The answer is 4."),
        ({}, {"tools": TOOLS}, "The answer is 4."),
        ({"call": "one"}, {"tools": TOOLS}, CALLS_ONE),
        ({"call": "two", "arguments": {"x": 1}}, {"tools": TOOLS}, CALLS_TWO.replace("{}", '{"x": 1}')),
        ({"call": "one"}, {"tools": TOOLS, "messages": DONE}, "The answer is 4."),
        ({"call": "one", "text": "ok"}, {"tools": TOOLS, "messages": DONE}, "ok"),
        ({"call": "absent"}, {"tools": TOOLS}, "The answer is 4."),
        ({}, {"tools": TOOLS, "tool_choice": ToolChoice("required")}, CALLS_ONE),
        ({}, {"tools": TOOLS, "tool_choice": ToolChoice("required"), "messages": DONE}, CALLS_TWO),
        ({}, {"tools": TOOLS, "tool_choice": ToolChoice("function", "two")}, CALLS_TWO),
        ({}, {"constraint": Constraint("json", NUMBER)}, '{"n": 4}'),
        ({}, {"constraint": Constraint("choice", ["a", "b"])}, "a"),
        ({}, {"constraint": Constraint("regex", "a+")}, None),
        ({"free": True}, {"tools": TOOLS, "tool_choice": ToolChoice("required")}, None),
    ],
    ids=str,
)
def test_the_script_decides(script: dict[str, Any], fields: dict[str, Any], said: str | None) -> None:
    model = ScriptedModel()
    model.script = script
    found = model.answer(GenerationRequest(request_id="r", **{"messages": HELLO, **fields}))
    assert found == (None if said is None else Constraint("choice", [said]))


async def _endpoint(request: Request) -> Response:
    body = await request.json()
    if "bad" in body:
        return JSONResponse({"error": {"message": "no bad things.", "param": "bad"}}, 422)
    return JSONResponse({"ok": True, "error": None}, headers={"x-ignored-fields": "foo, bar"})


def test_the_log_tells_what_was_refused_and_what_was_ignored() -> None:
    log, scripts = io.StringIO(), []
    app = RequestLog(Starlette(routes=[Route("/v1/x", _endpoint, methods=["POST"])]), log, scripts.append)

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            for name, body in (("plain", {"foo": 1}), ("tools", {"bad": 1})):
                await client.post("/scripted", json={"endpoint": "x", "try": name})
                await client.post("/v1/x", json=body)

    asyncio.run(ask())
    assert [script["try"] for script in scripts] == ["plain", "tools"]
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(line["try"], line["status"], line["fields"]) for line in lines] == [
        ("plain", 200, ["foo"]),
        ("tools", 422, ["bad"]),
    ]
    plain = judged({"endpoint": "x", "try": "plain", "error": ""}, lines, "/scratch")
    assert (plain["ignored"], plain["refusals"]) == (["bar", "foo"], [])
    tools = judged({"endpoint": "x", "try": "tools", "error": "Boom at /scratch/f"}, lines, "/scratch")
    assert (tools["error"], tools["refusals"]) == ("refused", ["POST /v1/x: 422 no bad things. (`bad`)"])
    other = judged({"endpoint": "x", "try": "stream", "error": "Boom at /scratch/f"}, lines, "/scratch")
    assert (other["error"], other["refusals"]) == ("Boom at …/f", [])


@pytest.mark.parametrize(
    ("status", "fields", "said"), [(200, ["model"], True), (200, ["seed"], False), (404, [], False)]
)
def test_a_client_that_sends_no_seed_is_told_from_a_server_that_does_not_heed_it(
    status: int, fields: list[str], said: bool
) -> None:
    error = '{"error": {"message": "nothing here."}}' if status == 404 else ""
    line = {"endpoint": "x", "try": "seed", "method": "POST", "path": "/v1/x", "status": status}
    found = judged(
        {"endpoint": "x", "try": "seed", "error": "no"},
        [{**line, "error": error, "ignored": "", "fields": fields}],
        "/s",
    )
    assert ("the client does not send `seed`" in found["refusals"]) is said
