"""Conversations for the demo model, generated: same seed and index, same conversation. Knows no tokens, no model.

Each skill is a function that draws one exchange: a request, its answer, and a *key* that names the combination (the
words to sort, the numbers to add, the facts to remember). A key belongs to training or to evaluation by its hash, so
what the model is measured on was never in what it was trained on, however long it trained.

    python -m demo.corpus 20        # print twenty conversations
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final

from demo.exchange import Exchange, Split, split_of
from demo.memory import recall, tell
from demo.styles import NEUTRAL, STYLES
from demo.talk import docs, small_talk, story, unknown
from demo.tasks import arithmetic, json_object, letters, word_tasks
from demo.tools import no_tool, tool_call, toolbox

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages in the API's shape; the last one is the answer under test. `skill` is that of the last exchange."""

    skill: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    exchange: Exchange | None = field(default=None, compare=False)


SKILLS: Final[dict[str, tuple[Callable[[Random], Exchange], float]]] = {
    "small talk": (small_talk, 0.8),
    "docs": (docs, 1.1),
    "unknown": (unknown, 0.8),
    "arithmetic": (arithmetic, 3.2),
    "letters": (letters, 2.0),
    "words": (word_tasks, 3.4),
    "json": (json_object, 1.0),
    "story": (story, 0.3),
}

STYLED_SKILLS: Final = ("small talk", "docs", "addition", "arithmetic", "tell", "recall", "unknown")
"""Skills whose answers every style can say."""


def _plain(rng: Random, known: dict[str, str]) -> Exchange:
    """An exchange of any skill but tools; memory is drawn here because it needs the conversation."""
    if rng.random() < 0.25:
        return recall(rng, known) if known and rng.random() < 0.75 else tell(rng, known)
    if rng.random() < 0.02:
        return recall(rng, known)
    names = list(SKILLS)
    name = rng.choices(names, [SKILLS[name][1] for name in names])[0]
    return SKILLS[name][0](rng)


def _styled(rng: Random, known: dict[str, str], style: str) -> Exchange:
    """An exchange whose answer can be given in the style, with that answer."""
    while True:
        before = dict(known)
        exchange = _plain(rng, known)
        answer = STYLES[style][1](exchange)
        if exchange.skill in STYLED_SKILLS and answer is not None and not exchange.free:
            return replace(exchange, answer=answer)  # the key stays: in any style, it is the same combination
        known.clear()
        known.update(before)


def _allowed(exchange: Exchange, split: Split) -> bool:
    if exchange.basic:
        return split == "train"
    return exchange.free or split_of(exchange.key) == split


def _careless(rng: Random, exchange: Exchange) -> Exchange:
    """The request as people type it: in lower case where that loses nothing, without the last full stop."""
    text = exchange.user
    said = exchange.answer + json.dumps([call.arguments for call in exchange.calls])
    if exchange.skill in ("small talk", "docs", "unknown"):
        text = text.lower()
    elif text.split()[0].strip(".,!?'\"").lower() not in said.lower():
        text = text[0].lower() + text[1:]
    if rng.random() < 0.7 and text[-1] in ".!?" and not text.endswith("= ?"):
        text = text[:-1]
    return replace(exchange, user=text)


def _append(messages: list[Message], exchange: Exchange, thinking: bool, call_ids: Callable[[], str]) -> None:
    """The messages of an exchange; thoughts only where they are asked for."""
    reasoning = {"reasoning_content": exchange.thought} if thinking else {}
    messages.append({"role": "user", "content": exchange.user})
    if exchange.calls:
        ids = [call_ids() for _ in exchange.calls]
        calls = [
            {"id": i, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for i, call in zip(ids, exchange.calls, strict=True)
        ]
        messages.append({"role": "assistant", "content": "", **reasoning, "tool_calls": calls})
        for i, text in zip(ids, exchange.results, strict=True):
            messages.append({"role": "tool", "tool_call_id": i, "content": text})
        reasoning = {"reasoning_content": "The tool has answered."} if thinking else {}
    messages.append({"role": "assistant", "content": exchange.answer, **reasoning})


def conversation(
    seed: int | str, index: int, split: Split = "train", last: str | None = None, *, refusals: bool = True
) -> Conversation:
    """Conversation `index` of a corpus.

    Args:
        seed: names the corpus.
        index: counts conversations.
        split: for `train`, every exchange is of the training split; for `test`, the last one is held out.
        last: what the last exchange must be: a skill, a style, or one of `tool`, `no tool`, `beside tools`, `recall`,
            `addition`.
        refusals: whether tools are also asked for what none of them does; else every other request beside tools is one
            that needs none.
    """
    attempt = 0
    while True:
        rng = Random(f"{seed}/{split}/{last}/{index}/{attempt}")
        drawn = _draw(rng, split, last, refusals)
        if drawn is not None:
            return drawn
        attempt += 1


def _draw(rng: Random, split: Split, last: str | None, refusals: bool) -> Conversation | None:
    """One try; None if a combination fell into the other split."""
    style = last if last in STYLES else None
    if last is None and rng.random() < 0.24:
        style = rng.choice(list(STYLES))
    with_tools = last in ("tool", "no tool", "beside tools") or (last is None and style is None and rng.random() < 0.27)
    known: dict[str, str] = {}
    turns = rng.choice((1, 1, 2, 2, 3, 4)) if rng.random() < 0.97 else rng.randrange(8, 20)
    if last in ("recall", "tell"):
        turns = max(turns, 2)
    if with_tools and last is None:  # definitions are long: several requests for each box
        turns = rng.choice((1, 2, 3, 4, 5))
    box = toolbox(rng, rng.choice((1, 2, 2, 3, 4))) if with_tools else []
    exchanges: list[Exchange] = []
    careless = rng.choice((0.0, 0.0, 0.1, 1.0))
    for turn in range(turns):
        final = turn == turns - 1
        wanted = last if final else None
        if with_tools:
            chance = {"tool": 0.0, "no tool": 0.8, "beside tools": 1.0}.get(wanted or "", rng.random())
            if chance < 0.55:
                exchange = tool_call(rng, box)
            elif chance < 0.9 and (refusals or wanted == "no tool"):
                exchange = no_tool(rng, box)
            else:
                exchange = _plain(rng, known)
                if exchange.skill == "unknown":  # might be what a tool is for
                    return None
        elif style:
            exchange = _styled(rng, known, style)
        elif wanted == "recall":
            exchange = recall(rng, known)
        elif wanted == "addition":
            exchange = arithmetic(rng)
            if exchange.skill != "addition":
                return None
        elif wanted in SKILLS:
            exchange = SKILLS[wanted][0](rng)
        elif last == "recall" and turn == 0:
            exchange = tell(rng, known)
        else:
            exchange = _plain(rng, known)
        if not _allowed(exchange, split if final else "train"):
            return None
        exchanges.append(_careless(rng, exchange) if rng.random() < careless else exchange)
    system = ""
    if style:
        system = rng.choice(STYLES[style][0])
        if rng.random() < 0.3:
            system = f"{rng.choice(NEUTRAL)} {system}"
    elif rng.random() < 0.3:
        system = rng.choice(NEUTRAL)
    worked = exchanges[-1].skill in ("addition", "arithmetic", "letters")
    thinking = rng.random() < (0.6 if worked else 0.12)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    counter = iter(range(1 << 30))
    for exchange in exchanges:
        final = exchange is exchanges[-1]
        _append(messages, exchange, thinking and final, lambda: f"call_{next(counter)}")
    definitions = [tool.definition for tool in box] or None
    return Conversation(last or exchanges[-1].skill, messages, definitions, thinking, exchanges[-1])


def main() -> None:
    """Print some conversations."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    for index in range(count):
        drawn = conversation(0, index)
        print(f"---- {drawn.skill}{', thinking' if drawn.thinking else ''}")
        for tool in drawn.tools or []:
            print("tool:", json.dumps(tool["function"]))
        for message in drawn.messages:
            thought = message.get("reasoning_content")
            calls = [call["function"] for call in message.get("tool_calls", [])]
            print(f"{message['role']}: {f'({thought}) ' if thought else ''}{message['content']}{calls or ''}")


if __name__ == "__main__":
    main()
