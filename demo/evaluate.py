"""Measure the demo model on combinations that training never saw: greedy, through the engine, one row per skill.

    python -m demo.evaluate                    # demo/model, 200 conversations per skill
    python -m demo.evaluate --count 50 --wrong # fewer, and print what went wrong

An answer counts only if it is exactly the expected text; a tool call, if name and arguments are.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.progress import track
from transformers import PreTrainedTokenizerFast

from demo.corpus import Conversation, Message, conversation
from engine import LLM

HERE: Final = Path(__file__).parent
SEED: Final = "evaluation"


@dataclass(frozen=True)
class Case:
    """A row of the table. `last`: see `corpus.conversation`.

    `after_tool`: judge the answer that follows the tool's result. `no_call`: any answer is right that calls nothing.
    """

    title: str
    last: str
    goal: int | None = None
    thinking: bool = False
    after_tool: bool = False
    no_call: bool = False


CASES: Final = (
    Case("tool choice and exact arguments", "tool", 90),
    Case("answer from the tool's result", "tool", after_tool=True),
    Case("no call where none is needed", "beside tools", 90, no_call=True),
    Case("refusal where no tool fits", "no tool", 90),
    Case("memory", "recall", 95),
    Case("words: repeat, sort, reverse", "words", 90),
    Case("two-digit addition, thinking", "addition", 90, thinking=True),
    Case("two-digit addition, at once", "addition"),
    Case("all arithmetic, thinking", "arithmetic", thinking=True),
    Case("letters: spell, reverse, count", "letters"),
    Case("JSON with the requested fields", "json", 95),
    Case("system prompt: upper case", "upper", 95),
    Case("system prompt: one word", "one word", 95),
    Case("system prompt: pirate", "pirate", 95),
    Case("this project's documents", "docs", 95),
    Case("small talk", "small talk"),
    Case("says that it does not know", "unknown"),
)


def calls_in(text: str) -> list[Any] | None:
    """The calls of a reply, or None if one is malformed."""
    try:
        found = [json.loads(body) for body in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL)]
    except json.JSONDecodeError:
        return None
    return found if text.count("<tool_call>") == len(found) else None


def question(drawn: Conversation, after_tool: bool) -> tuple[list[Message], Message]:
    """The messages up to the assistant's turn under test, and that turn."""
    turns = [i for i, m in enumerate(drawn.messages) if m["role"] == "assistant"]
    exchange = drawn.exchange
    assert exchange is not None
    turn = turns[-2] if exchange.calls and not after_tool else turns[-1]
    return drawn.messages[:turn], drawn.messages[turn]


def right(reply: str, expected: Message, case: Case) -> bool:
    """Whether a reply, its thoughts cut off, is what was expected."""
    answer = reply.split("</think>")[-1].strip()
    if case.no_call:
        return "<tool_call>" not in answer
    if "tool_calls" not in expected:
        return answer == expected["content"]
    wanted = [{"name": c["function"]["name"], "arguments": c["function"]["arguments"]} for c in expected["tool_calls"]]
    return calls_in(answer) == wanted


def evaluate(
    llm: LLM, tokenizer: PreTrainedTokenizerFast, case: Case, count: int
) -> tuple[int, list[tuple[str, str, Any]]]:
    """Returns (right answers, the wrong ones as (last message, reply, expected))."""
    prompts: list[str] = []
    expected: list[Message] = []
    index = 0
    while len(prompts) < count:
        drawn = conversation(SEED, index, "test", case.last, refusals=not case.no_call)
        index += 1
        messages, answer = question(drawn, case.after_tool)
        prompts.append(
            tokenizer.apply_chat_template(
                messages,
                tools=drawn.tools,
                add_generation_prompt=True,
                enable_thinking=case.thinking,
                tokenize=False,
            )
        )
        expected.append({**answer, "asked": messages[-1]["content"]})
    replies = llm.generate_many(prompts, temperature=0, max_tokens=200)
    wrong = [
        (wanted["asked"], reply.text, wanted.get("tool_calls") or wanted["content"])
        for [reply], wanted in zip(replies, expected, strict=True)
        if not right(reply.text, wanted, case)
    ]
    return count - len(wrong), wrong


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Accuracy of the demo model per skill.")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--count", type=int, default=200, help="conversations per skill")
    parser.add_argument("--write", action="store_true", help="put the table into demo/README.md")
    parser.add_argument("--wrong", action="store_true", help="print the wrong answers")
    options = parser.parse_args()
    llm = LLM(options.model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    rows, mistakes = [], []
    for case in track(CASES, description="skills"):
        good, wrong = evaluate(llm, tokenizer, case, options.count)
        goal = "" if case.goal is None else f"{case.goal} %"
        rows.append(f"| {case.title} | {100 * good / options.count:.1f} % | {goal} |")
        mistakes += [(case.title, *item) for item in wrong]
    table = "\n".join(["| held-out combinations, greedy | right | goal |", "|---|--:|--:|", *rows])
    print(table)
    if options.write:
        readme = HERE / "README.md"
        text = readme.read_text(encoding="utf-8")
        table = f"<!-- table -->\n{options.count} conversations per row:\n\n{table}\n<!-- /table -->"
        readme.write_text(
            re.sub(r"<!-- table -->.*<!-- /table -->", lambda _: table, text, flags=re.S), encoding="utf-8"
        )
    if options.wrong:
        for title, asked, reply, wanted in mistakes:
            print(f"\n{title}\n  asked    {asked!r}\n  reply    {reply!r}\n  expected {wanted!r}")


if __name__ == "__main__":
    main()
