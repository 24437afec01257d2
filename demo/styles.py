"""System prompts: neutral ones, and those that ask for a way of answering. Knows no skill."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from demo import words
from demo.exchange import Exchange

NEUTRAL: Final = (
    "You are a helpful assistant.", "You are a friendly assistant.", "Be helpful.", "Answer the user's questions.",
    "You are an assistant.", "Help the user.", "You are a helpful assistant that is polite and honest.",
)  # fmt: skip
PIRATE_WORDS: Final = {
    "you": "ye", "your": "yer", "is": "be", "are": "be", "am": "be", "my": "me", "hello": "ahoy",
}  # fmt: skip


def pirate(text: str) -> str:
    """The text as a pirate says it: some words replaced, one cry before and one after."""

    def swap(match: re.Match[str]) -> str:
        found = PIRATE_WORDS.get(match[0].lower())
        if found is None:
            return match[0]
        return found.capitalize() if match[0][0].isupper() else found

    return f"Arr! {re.sub(r'[A-Za-z]+', swap, text)} Matey!"


STYLES: Final[dict[str, tuple[tuple[str, ...], Callable[[Exchange], str | None]]]] = {
    "upper": (
        ("Always answer in upper case.", "Answer in upper case.", "Write in capital letters only.", "Use only capital letters.",
         "ANSWER IN UPPER CASE.", "Always use upper case letters.", "Reply in all caps.", "Every answer must be in upper case.",
         "Shout: answer in capitals."),
        lambda exchange: exchange.answer.upper() if all(map(words.listed, exchange.copied)) else None,
    ),
    "one word": (
        ("Answer in one word.", "Always answer with one word.", "Reply with a single word.", "Use one word only.",
         "One word answers only.", "Your answers must be one word long.", "Answer with a single word, nothing else."),
        lambda exchange: exchange.short,
    ),
    "pirate": (
        ("Be a pirate.", "You are a pirate.", "Talk like a pirate.", "Answer like a pirate.", "Speak as a pirate would.",
         "Always talk like a pirate.", "Pretend to be a pirate.", "You are a pirate captain."),
        lambda exchange: pirate(exchange.answer),
    ),
}  # fmt: skip
