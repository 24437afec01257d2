"""Reads the stream of a response as a client does, piece by piece, and checks each piece against the SDK's models."""

from __future__ import annotations

import json
from typing import Any, get_args

from openai.types.responses import Response, ResponseStreamEvent

MODELS: dict[str, Any] = {}
for _model in get_args(get_args(ResponseStreamEvent)[0]):
    for _name in get_args(_model.model_fields["type"].annotation):
        MODELS[_name] = _model


def read(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each under its own name, numbered from 0, and valid."""
    events = []
    for block in body.decode().strip().split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        if not lines:
            continue
        name, data = lines
        found = json.loads(data.removeprefix("data: "))
        assert name == f"event: {found['type']}"
        MODELS[found["type"]].model_validate(found)
        assert found["sequence_number"] == len(events)
        events.append(found)
    return events


def collected(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response that the events tell of, put together from the pieces alone; the last event must hold the same."""
    created, begun, *rest, last = events
    assert (created["type"], begun["type"]) == ("response.created", "response.in_progress")
    assert created["response"] == begun["response"]
    assert created["response"]["status"] == "in_progress"
    assert last["type"] == f"response.{last['response']['status']}"
    Response.model_validate(last["response"])
    items: list[dict[str, Any]] = []
    done = 0
    for told in rest:
        index = told["output_index"]
        kind = told["type"]
        if kind == "response.output_item.added":
            assert index == len(items) == done  # one after the other
            assert told["item"]["status"] == "in_progress"
            items.append(told["item"])
        elif kind == "response.output_item.done":
            assert {**told["item"], "status": ""} == {**items[index], "status": ""} | _late(told["item"])
            items[index] = told["item"]
            done += 1
        else:
            assert index == done, "after its end"
            assert told["item_id"] == items[index]["id"]
            _piece(items[index], told)
    assert done == len(items)
    assert items == last["response"]["output"]
    return last["response"]


def _late(item: dict[str, Any]) -> dict[str, Any]:
    """What is known at an item's end only."""
    return {name: item[name] for name in ("encrypted_content",) if name in item}


def _piece(item: dict[str, Any], told: dict[str, Any]) -> None:
    kind = told["type"]
    if kind == "response.function_call_arguments.delta":
        item["arguments"] += told["delta"]
    elif kind == "response.function_call_arguments.done":
        assert told["arguments"] == item["arguments"]
    elif kind == "response.content_part.added":
        assert told["content_index"] == len(item["content"])
        item["content"].append(told["part"])
    elif kind == "response.content_part.done":
        assert told["part"] == item["content"][told["content_index"]]
    elif kind.endswith("_text.delta"):
        part = item["content"][told["content_index"]]
        part["text"] += told["delta"]
        if "logprobs" in told:
            part["logprobs"] += told["logprobs"]
    else:
        assert kind.endswith("_text.done")
        part = item["content"][told["content_index"]]
        assert (part["text"], part.get("logprobs")) == (told["text"], told.get("logprobs"))
