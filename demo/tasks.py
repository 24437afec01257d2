"""Sums, letters, words and JSON: requests whose answers are worked out. Knows no conversation."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any, Final

from demo import words
from demo.exchange import Exchange


def add_thought(a: int, b: int) -> str:
    """Column addition: `7 + 8 = 15, write 5, carry 1. 4 + 3 = 7, plus 1 is 8. So 85.`"""
    ones = a % 10 + b % 10
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}."
    carry = ones // 10
    first = f"{a % 10} + {b % 10} = {ones}, write {ones % 10}, carry {carry}."
    tens = a // 10 + b // 10
    second = f"{a // 10} + {b // 10} = {tens}" + (f", plus 1 is {tens + 1}." if carry else ".")
    return f"{first} {second} So {a + b}."


def subtract_thought(a: int, b: int) -> str:
    """Column subtraction with a borrow; the larger number first."""
    if a < b:
        return f"{b} is more than {a}. {subtract_thought(b, a)[:-1]}, minus: {a - b}."
    if a < 10:
        return f"{a} - {b} = {a - b}."
    borrow = int(a % 10 < b % 10)
    top = a % 10 + 10 * borrow
    first = f"{top} - {b % 10} = {top - b % 10}, borrow {borrow}."
    tens = a // 10 - b // 10
    second = f"{a // 10} - {b // 10} = {tens}" + (f", less 1 is {tens - 1}." if borrow else ".")
    return f"{first} {second} So {a - b}."


def multiply_thought(a: int, b: int) -> str:
    """One- or two-digit `a` times one-digit `b`."""
    if a < 10:
        return f"{a} * {b} = {a * b}."
    tens, ones = a // 10 * b * 10, a % 10 * b
    return f"{a // 10 * 10} * {b} = {tens}. {a % 10} * {b} = {ones}. {tens} + {ones} = {a * b}."


def _pair(rng: Random) -> tuple[int, int]:
    digits = rng.choice(((2, 2), (2, 2), (2, 1), (1, 2), (1, 1)))
    a, b = (rng.randrange(10, 100) if d == 2 else rng.randrange(10) for d in digits)
    return a, b


COUNTED: Final = """
apples books coins stones cards pencils stamps shells bottles cookies eggs plums cherries melons tickets buttons keys
lamps hats boats cats dogs horses rabbits goats ducks frogs owls
""".split()


def arithmetic(rng: Random) -> Exchange:
    a, b = _pair(rng)
    operation = rng.choice("+++--*")
    if operation == "+":
        result, thought = a + b, add_thought(a, b)
        forms = ("What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "{a} plus {b}?", "What is {a} plus {b}?", "Add {a} and {b}.",
                 "How much is {a} + {b}?", "What is the sum of {a} and {b}?", "Calculate {a} + {b}.", "{a} + {b} = ?",
                 "{a}+{b}=", "What's {a}+{b}?", "Compute {a} plus {b}.", "what is {a} + {b}")  # fmt: skip
    elif operation == "-":
        if a < b and rng.random() < 0.8:
            a, b = b, a
        result, thought = a - b, subtract_thought(a, b)
        forms = ("What is {a} - {b}?", "{a} - {b}", "{a}-{b}", "{a} minus {b}?", "What is {a} minus {b}?",
                 "Subtract {b} from {a}.", "How much is {a} - {b}?", "Calculate {a} - {b}.", "Take {b} from {a}.",
                 "{a} - {b} = ?", "What's {a}-{b}?", "what is {a} - {b}")  # fmt: skip
    else:
        a, b = (a, rng.randrange(2, 10)) if rng.random() < 0.4 else (rng.randrange(10), rng.randrange(10))
        result, thought = a * b, multiply_thought(a, b)
        forms = ("What is {a} * {b}?", "{a} * {b}", "{a}*{b}", "{a} times {b}?", "What is {a} times {b}?",
                 "Multiply {a} by {b}.", "How much is {a} * {b}?", "Calculate {a} * {b}.", "{a} x {b}")  # fmt: skip
    form = rng.choice(forms)
    answer = f"{a} {operation} {b} = {result}"
    if operation == "*" and a > 9:  # nobody does this in one step
        answer = f"{a} * {b} = {a // 10 * b * 10} + {a % 10 * b} = {result}"
    key = f"sum|{a}{operation}{b}"
    copied: tuple[str, ...] = ()
    if operation in "+-" and a > b + 1 > 1 and rng.random() < 0.15:
        who, things = words.name(rng), rng.choice(COUNTED)
        more = "gets {b} more" if operation == "+" else rng.choice(("gives away {b}", "loses {b}"))
        form = "{who} has {a} {things} and " + more + ". How many {things} does {who} have now?"
        answer = f"{answer}, so {who} has {result} {things}"
        text = form.format(a=a, b=b, who=who, things=things)
        copied = (who,)
    else:
        text = form.format(a=a, b=b)
    two_digits = operation == "+" and a > 9 and b > 9
    return Exchange(
        "addition" if two_digits else "arithmetic",
        key,
        text,
        f"{answer}.",
        thought,
        short=str(result) if min(a, b) < 10 and (operation != "*" or a < 10) else None,
        basic=max(a, b) < 10,
        copied=copied,
    )


def letters(rng: Random) -> Exchange:
    word = words.word(rng)
    quoted = rng.choice((word, word, f"'{word}'", f'"{word}"', f"the word {word}"))
    spelled = "-".join(word)
    kind = rng.choice(("spell", "spell", "backwards", "count", "occurrences", "first"))
    thought = f"The letters: {spelled}."
    short: str | None = None
    if kind == "spell":
        user = rng.choice(("Spell {}.", "How do you spell {}?", "How is {} spelled?", "Please spell {}.", "Spell {}"))
        answer = f"{spelled}."
    elif kind == "backwards":
        user = rng.choice(
            ("Spell {} backwards.", "Write {} backwards.", "Reverse the letters of {}.", "What is {} backwards?")
        )
        answer = f"{spelled} backwards is {'-'.join(word[::-1])}."
    elif kind == "count":
        user = rng.choice(("How many letters are in {}?", "How many letters does {} have?", "Count the letters of {}.",
                           "Count the letters in {}."))  # fmt: skip
        thought = " ".join(f"{letter}{i}" for i, letter in enumerate(word, 1)) + "."
        answer = f"{spelled} has {len(word)} letters."
    elif kind == "occurrences":
        letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("aeioustrn")
        count = word.count(letter)
        user = rng.choice(
            (
                f"How many times does {letter} occur in {{}}?",
                f"How many {letter}'s are in {{}}?",
                f"Count the letter {letter} in {{}}.",
            )
        )
        answer = f"In {spelled} the letter {letter} occurs {count} time{'s' * (count != 1)}."
    else:
        last = rng.random() < 0.5
        which, letter = ("last", word[-1]) if last else ("first", word[0])
        user = rng.choice((f"What is the {which} letter of {{}}?", f"Which letter is {which} in {{}}?"))
        answer, short = f"The {which} letter of {word} is {letter}.", letter
    return Exchange("letters", f"letters|{kind}|{word}", user.format(quoted), answer, thought, short=short)


def word_tasks(rng: Random) -> Exchange:
    kind = rng.choice(("repeat", "sort", "sort", "sort", "reverse", "reverse", "times", "first"))
    count = rng.choice((2, 3, 3, 3, 4, 4, 5))
    given: list[str] = []
    while len(given) < count:
        word = words.name(rng) if rng.random() < 0.08 else words.word(rng)
        if word.lower() not in (other.lower() for other in given):
            given.append(word)
    if kind == "sort":
        given = [word.lower() for word in given]
    separator = rng.choice((", ", ", ", " ", " and "))
    if separator == " and " and count > 2:
        listed = ", ".join(given[:-1]) + " and " + given[-1]
    else:
        listed = separator.join(given)
    key = f"words|{kind}|{' '.join(given)}"
    if kind == "times":
        word, number = given[0], rng.randrange(2, 7)
        user = rng.choice(("Say {w} {n} times.", "Repeat the word {w} {n} times.", "Write {w} {n} times."))
        text, answer = user.format(w=word, n=number), " ".join([word] * number)
        return Exchange("words", f"words|times|{word}|{number}", text, answer, f"{number} times {word}.")
    if kind == "repeat":
        user = rng.choice(
            ("Repeat: {}", "Repeat these words: {}", "Say {}", "Repeat after me: {}", "Write these words again: {}")
        )
        answer, thought = ", ".join(given), "I copy the words."
    elif kind == "reverse":
        user = rng.choice(("Reverse the order of these words: {}", "Say these words in reverse order: {}", "Reverse: {}",
                           "Reverse the words {}", "Write {} in reverse order", "Put these words in reverse order: {}"))  # fmt: skip
        answer, thought = ", ".join(reversed(given)), f"The last word is {given[-1]}."
    elif kind == "sort":
        user = rng.choice(("Sort these words: {}", "Sort alphabetically: {}", "Put these words in alphabetical order: {}",
                           "Sort {}", "Sort: {}", "Sort the words {} alphabetically", "Bring {} into alphabetical order"))  # fmt: skip
        ordered = sorted(given)
        answer, thought = ", ".join(ordered), f"The first letters: {' '.join(word[0] for word in given)}."
    else:
        last = rng.random() < 0.5
        which, word = ("last", given[-1]) if last else ("first", given[0])
        user = f"What is the {which} word of {{}}?" if rng.random() < 0.5 else f"Which word is {which}: {{}}"
        answer, thought = f"The {which} word is {word}.", f"The words: {', '.join(given)}."
        return Exchange("words", key, user.format(listed), answer, thought, short=word)
    text = user.format(listed)
    if not text.endswith("?") and rng.random() < 0.5:
        text += "."
    return Exchange("words", key, text, answer, thought)


FIELD_KINDS: Final[tuple[tuple[tuple[str, ...], Callable[[Random], Any]], ...]] = (
    (("name", "first_name", "author", "owner", "customer", "person", "friend"), words.name),
    (("city", "place", "home", "town", "destination"), words.city),
    (("age", "count", "year", "price", "size", "number", "score", "amount", "weight", "height"), lambda rng: rng.randrange(1, 2000)),
    (("colour", "color"), lambda rng: rng.choice(words.COLOURS)),
    (("job", "role"), lambda rng: rng.choice(words.JOBS)),
    (("food", "item", "thing", "title", "product", "word", "animal", "pet", "tag"), words.word),
    (("day", "weekday"), lambda rng: rng.choice(words.DAYS)),
    (("active", "done", "open", "new", "paid"), lambda rng: rng.random() < 0.5),
)  # fmt: skip


def json_object(rng: Random) -> Exchange:
    count = rng.choice((1, 2, 2, 3, 3, 4))
    values: dict[str, Any] = {}
    while len(values) < count:
        names, draw = rng.choice(FIELD_KINDS)
        name = words.made_up(rng) if rng.random() < 0.06 else rng.choice(names)
        values.setdefault(name, draw(rng))
    shown = {k: ("true" if v else "false") if isinstance(v, bool) else str(v) for k, v in values.items()}
    style = rng.randrange(4)
    if style == 0:
        parts = [f"{k} {v}" for k, v in shown.items()]
        listed = parts[0] if count == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
        form = rng.choice(
            (
                "Give me a JSON object with {}.",
                "Write JSON with {}.",
                "Make a JSON object with {}.",
                "I need JSON with {}.",
            )
        )
    elif style == 1:
        listed = ", ".join(f"{k}: {v}" for k, v in shown.items())
        form = rng.choice(
            (
                "Turn this into JSON: {}",
                "As JSON: {}",
                "Convert to JSON: {}",
                "JSON, please. {}",
                "Write this as a JSON object: {}",
            )
        )
    elif style == 2:
        listed = ", ".join(f"{k} = {v}" for k, v in shown.items())
        form = rng.choice(("Return a JSON object: {}", "Answer with JSON only: {}", "{} as JSON"))
    else:
        fields = ", ".join(shown)
        told = ". ".join(f"The {k} is {v}" for k, v in shown.items()) + "."
        form = rng.choice(
            ("{told} Give me JSON with the fields {fields}.", "{told} Answer with a JSON object with {fields}.")
        )
        listed = ""
        text = form.format(told=told, fields=fields)
    if style != 3:
        text = form.format(listed)
    answer = json.dumps(values)
    return Exchange("json", f"json|{answer}", text, answer, f"The fields are {', '.join(shown)}.")
