"""Asks for messages, and reads replies as Anthropic's client does: each object checked by the client's types."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from asgi import Answer, call
from pydantic import TypeAdapter

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
_GROWS = {"text_delta": "text", "thinking_delta": "thinking"}


def body_of(path: str = MESSAGES, **fields: Any) -> dict[str, Any]:
    """A good body, with these fields on top."""
    length = {} if path.endswith("/count_tokens") else {"max_tokens": 30}
    return {"model": "fake", **length, "messages": [{"role": "user", "content": "Hi"}], **fields}


def ask(app: Any, path: str = MESSAGES, *, how: Mapping[str, Any] | None = None, **fields: Any) -> Answer:
    """One whole exchange. `how`: arguments of `call`."""
    return call(app, body_of(path, **fields), path=path, **(how or {}))


def message_of(answer: Answer) -> dict[str, Any]:
    """The message of an answer, whole or streamed."""
    assert answer.status == 200, answer.body
    if answer.headers["content-type"].startswith("text/event-stream"):
        return accumulated(events_of(answer))
    Message.model_validate(answer.json, strict=True)
    return dict(answer.json)


def count_of(answer: Answer) -> int:
    assert answer.status == 200, answer.body
    return MessageTokensCount.model_validate(answer.json, strict=True).input_tokens


def error_of(answer: Answer) -> dict[str, Any]:
    """The error of an answer, after checking its shape."""
    assert answer.status >= 400, answer.body
    return checked_error(answer.json)


def checked_error(body: dict[str, Any]) -> dict[str, Any]:
    assert body["type"] == "error"
    assert set(body) <= {"type", "error", "request_id"}
    error = dict(body["error"])
    assert error["message"]
    assert error["type"].endswith("_error") or error["type"] == "request_too_large"
    assert error["code"]
    return error


def events_of(answer: Answer) -> list[dict[str, Any]]:
    """The events of a stream. Each is named as its type says."""
    text = answer.body.decode("utf-8")
    assert text.endswith("\n\n")
    found = []
    for block in text[:-2].split("\n\n"):
        if block.startswith(":"):
            continue
        first, second = block.split("\n")
        data = json.loads(second.removeprefix("data: "))
        assert first == f"event: {data['type']}"
        if data["type"] == "error":
            checked_error(data)
        else:
            _EVENT.validate_python(data, strict=True)
        found.append(data)
    return found


def accumulated(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Put a stream together as the client does, and check that blocks open and close in order."""
    start, *middle, end = events
    assert (start["type"], end) == ("message_start", {"type": "message_stop"})
    message = copy.deepcopy(start["message"])
    open_block: int | None = None
    written = ""
    for event in middle:
        if event["type"] == "content_block_start":
            assert (open_block, event["index"]) == (None, len(message["content"]))
            open_block, written = event["index"], ""
            message["content"].append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_block
            block, delta = message["content"][-1], event["delta"]
            if delta["type"] == "input_json_delta":
                written += delta["partial_json"]
            elif delta["type"] == "signature_delta":
                block["signature"] = delta["signature"]
            else:
                assert delta[_GROWS[delta["type"]]]
                block[_GROWS[delta["type"]]] += delta[_GROWS[delta["type"]]]
        elif event["type"] == "content_block_stop":
            assert event["index"] == open_block
            open_block = None
            if message["content"][-1]["type"] == "tool_use":
                message["content"][-1]["input"] = json.loads(written)
        else:
            assert event["type"] == "message_delta"
            assert open_block is None
            message.update(event["delta"], usage={**message["usage"], **event["usage"]})
            message.update({name: event[name] for name in event if name not in ("type", "delta", "usage")})
    Message.model_validate(message, strict=True)
    return message
