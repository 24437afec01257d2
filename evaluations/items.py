"""Writes the items of the two tasks, `facts.jsonl` and `answers.jsonl`, from the tables below.

    python -m evaluations.items

The items are this project's own and have its licence. They are meant to show whether a harness gets the same numbers
twice, not how good a model is. Both files alternate between the tables, so that the first few items are of all kinds.
"""

from __future__ import annotations

import json
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

TASKS = Path(__file__).resolve().parent / "tasks"
CHOICES = 4

Item = dict[str, Any]

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Germany": "Berlin",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Denmark": "Copenhagen",
    "Finland": "Helsinki",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Ireland": "Dublin",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Peru": "Lima",
    "Canada": "Ottawa",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "old": "young",
    "early": "late",
    "light": "dark",
    "wet": "dry",
    "full": "empty",
    "open": "closed",
    "high": "low",
    "strong": "weak",
    "rich": "poor",
    "right": "wrong",
    "easy": "difficult",
    "loud": "quiet",
    "clean": "dirty",
    "near": "far",
    "thick": "thin",
    "happy": "sad",
    "true": "false",
}
PAST = {
    "go": "went",
    "see": "saw",
    "eat": "ate",
    "drink": "drank",
    "write": "wrote",
    "speak": "spoke",
    "take": "took",
    "give": "gave",
    "buy": "bought",
    "bring": "brought",
    "think": "thought",
    "sing": "sang",
    "swim": "swam",
    "find": "found",
    "know": "knew",
    "sleep": "slept",
    "drive": "drove",
    "break": "broke",
    "teach": "taught",
    "fall": "fell",
}
KINDS = {
    "rose": "flower",
    "oak": "tree",
    "salmon": "fish",
    "eagle": "bird",
    "apple": "fruit",
    "iron": "metal",
    "violin": "instrument",
    "hammer": "tool",
    "chair": "piece of furniture",
    "ant": "insect",
    "tulip": "flower",
    "pine": "tree",
    "trout": "fish",
    "sparrow": "bird",
    "pear": "fruit",
    "copper": "metal",
    "piano": "instrument",
    "saw": "tool",
    "table": "piece of furniture",
    "bee": "insect",
}
YOUNG = {
    "dog": "puppy",
    "cat": "kitten",
    "cow": "calf",
    "horse": "foal",
    "sheep": "lamb",
    "goat": "kid",
    "pig": "piglet",
    "hen": "chick",
    "duck": "duckling",
    "goose": "gosling",
    "bear": "cub",
    "deer": "fawn",
    "kangaroo": "joey",
    "swan": "cygnet",
    "frog": "tadpole",
    "butterfly": "caterpillar",
    "eagle": "eaglet",
    "owl": "owlet",
    "eel": "elver",
    "hare": "leveret",
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def facts() -> list[Item]:
    """The items of the multiple choice: `text`, which is to be continued, `choices`, and the `answer`'s place."""
    past = [
        (f"Today I {now}. Yesterday I", then, [now, _regular(now), f"{now.removesuffix('e')}ing"])
        for now, then in PAST.items()
    ]
    return [
        _fact(number, *row)
        for number, row in enumerate(
            _alternating(
                _pairs("The capital of {} is", CAPITALS),
                _pairs("The opposite of {} is", OPPOSITES),
                past,
                _pairs("The {} is a kind of", KINDS),
                _pairs("The young of the {} is called a", YOUNG),
                [(f"{a} plus {b} is", str(a + b), [str(a + b + d) for d in (1, -1, 10)]) for a, b in _sums(20)],
            )
        )
    ]


def answers() -> list[Item]:
    """The items that want an answer in words: `question` and `answer`."""
    days = [(f"What day comes after {a}?", b) for a, b in zip(DAYS, DAYS[1:] + DAYS[:1], strict=True)]
    months = [(f"What month comes after {a}?", b) for a, b in zip(MONTHS, MONTHS[1:] + MONTHS[:1], strict=True)]
    words = [(f"Which number is {word}, in digits?", str(number)) for number, word in enumerate(NUMBERS)]
    sums = [(f"What is {a} + {b}?", str(a + b)) for a, b in _sums(20)]
    return [{"question": question, "answer": answer} for question, answer in _alternating(sums, months, words, days)]


def examples() -> list[Item]:
    """Answered questions that are put before each question of `answers`."""
    shown = [("What is 1 + 1?", "2"), ("What letter comes after A?", "B"), ("Which number is twelve, in digits?", "12")]
    return [{"question": question, "answer": answer} for question, answer in shown]


def _regular(verb: str) -> str:
    return f"{verb.removesuffix('e')}ed"


def _sums(count: int) -> list[tuple[int, int]]:
    return [(2 + i * 7 % 17, 3 + i * 5 % 13) for i in range(count)]


def _pairs(text: str, pairs: dict[str, str]) -> list[tuple[str, str, list[str]]]:
    """Make one row per pair; the wrong choices are the next other answers of the table."""
    rows = []
    for number, (subject, answer) in enumerate(pairs.items()):
        following = [*pairs.values()][number + 1 :] + [*pairs.values()][:number]
        wrong = [other for other in dict.fromkeys(following) if other != answer]
        rows.append((text.format(subject), answer, wrong[: CHOICES - 1]))
    return rows


def _alternating(*tables: list[Any]) -> list[Any]:
    """Join tables, one row of each at a time."""
    return [row for row in chain.from_iterable(zip_longest(*tables)) if row is not None]


def _fact(number: int, text: str, answer: str, wrong: list[str]) -> Item:
    place = number % CHOICES
    return {"text": text, "choices": [*wrong[:place], answer, *wrong[place:]], "answer": place}


def files() -> dict[str, str]:
    """The files' contents, by name."""
    tables = {"facts.jsonl": facts(), "answers.jsonl": answers(), "examples.jsonl": examples()}
    return {name: "".join(json.dumps(item) + "\n" for item in items) for name, items in tables.items()}


def main() -> None:
    for name, content in files().items():
        (TASKS / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
