"""A long conversation costs what its length costs, wherever its turns are joined.

Each body has one long turn and as many short ones after it as are allowed. Where joined texts were copied with every
turn, reading one took 5 to 60 seconds, during which no stream of the server went on.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.prompts.system_turns import with_late_turns_as_users
from engine.types.messages import ChatMessage
from server.api.messages.request import parse as parse_message
from server.api.responses.request import parse as parse_response

LONG = "ü" * (1 << 21) + "🤷" + "a" * (3 << 20)
MANY = 9990
USER = {"role": "user", "content": "b"}
THOUGHT = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "b"}]}
LONG_THOUGHT = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": LONG}]}
REPEATS = 8
"""Of each body: linear reading stays far below the time limit, and none that copies does."""


def texts(turn: ChatMessage) -> str:
    return (turn.content or "") + (turn.reasoning_content or "")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("first", "other"),
    [
        ({"role": "user", "content": LONG}, USER),
        ({"role": "assistant", "content": LONG}, {"role": "assistant", "content": "b"}),
        (LONG_THOUGHT, THOUGHT),
    ],
    ids=["user", "assistant", "thoughts"],
)
def test_items(first: dict[str, Any], other: dict[str, Any]) -> None:
    raw = json.dumps({"model": "m", "input": [first, *[other] * MANY]}, ensure_ascii=False).encode()
    for _ in range(REPEATS):
        [turn] = parse_response(raw, "x").generations[0].messages or ()
        assert texts(turn).replace("\n", "") == LONG + "b" * MANY


@pytest.mark.timeout(20)
def test_messages() -> None:
    raw = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": LONG}, *[USER] * MANY]}, ensure_ascii=False
    ).encode()
    for _ in range(REPEATS):
        [turn] = parse_message(raw, "x").generations[0].messages or ()
        assert texts(turn).replace("\n", "") == LONG + "b" * MANY


@pytest.mark.timeout(20)
def test_late_system_turns() -> None:
    turns = [ChatMessage("user", LONG), *[ChatMessage("system", "b"), ChatMessage("user", "c")] * (MANY // 2)]
    for _ in range(REPEATS):
        [turn] = with_late_turns_as_users(turns, {"system"})
        assert texts(turn).replace("\n", "") == LONG + "bc" * (MANY // 2)
