"""What a user tells about themself, and questions about it. Knows only what has been told so far."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from demo import words
from demo.exchange import Exchange


@dataclass(frozen=True)
class Attribute:
    """Something that a user tells about themself: how it is said, asked for and answered."""

    name: str
    draw: Callable[[Random], str]
    said: tuple[str, ...]
    clause: str
    asked: tuple[str, ...]
    told: str


def _favourite(name: str, draw: Callable[[Random], str]) -> Attribute:
    return Attribute(
        name,
        draw,
        (f"My favourite {name} is {{}}.", f"My favorite {name} is {{}}.", f"The {name} I like best is {{}}.", f"I like the {name} {{}} best."),
        f"my favourite {name} is {{}}",
        (f"What is my favourite {name}?", f"Which {name} do I like best?", f"What's my favorite {name}?", f"Do you remember my favourite {name}?"),
        f"Your favourite {name} is {{}}.",
    )  # fmt: skip


ATTRIBUTES: Final = (
    Attribute(
        "name",
        words.name,
        (
            "My name is {}.",
            "I am {}.",
            "I'm {}.",
            "Call me {}.",
            "Hello, my name is {}.",
            "Hi, I am {}.",
            "People call me {}.",
        ),
        "my name is {}",
        (
            "What is my name?",
            "What's my name?",
            "Who am I?",
            "Do you remember my name?",
            "Tell me my name.",
            "what is my name",
        ),
        "Your name is {}.",
    ),
    Attribute(
        "city",
        words.city,
        ("I live in {}.", "I am from {}.", "My home is in {}.", "My city is {}."),
        "I live in {}",
        ("Where do I live?", "Which city do I live in?", "Where am I from?", "Where is my home?", "What is my city?"),
        "You live in {}.",
    ),
    Attribute(
        "job",
        lambda rng: rng.choice(words.JOBS),
        ("I work as a {}.", "My job is {}.", "I am a {}."),
        "I work as a {}",
        ("What is my job?", "What do I do for a living?", "What do I work as?"),
        "You work as a {}.",
    ),
    Attribute(
        "number",
        lambda rng: str(rng.randrange(1, 1000)),
        ("My lucky number is {}.", "My number is {}.", "Remember the number {}.", "The number to remember is {}."),
        "my number is {}",
        (
            "What is my number?",
            "Which number did I tell you?",
            "What is my lucky number?",
            "What number should you remember?",
        ),
        "Your number is {}.",
    ),
    Attribute(
        "pet",
        words.name,
        ("My pet is called {}.", "I have a pet named {}.", "The name of my pet is {}."),
        "my pet is called {}",
        ("What is my pet called?", "What is the name of my pet?", "How is my pet called?"),
        "Your pet is called {}.",
    ),
    Attribute(
        "code",
        lambda rng: words.made_up(rng) if rng.random() < 0.5 else words.word(rng),
        ("The secret word is {}.", "The password is {}.", "Remember the word {}.", "Keep this word in mind: {}."),
        "the secret word is {}",
        (
            "What is the secret word?",
            "What is the password?",
            "Which word did I tell you?",
            "What word should you remember?",
        ),
        "The secret word is {}.",
    ),
    _favourite("colour", lambda rng: rng.choice(words.COLOURS)),
    _favourite("animal", lambda rng: rng.choice(words.ANIMALS)),
    _favourite("food", lambda rng: rng.choice(words.FOODS)),
    _favourite("hobby", lambda rng: rng.choice(words.HOBBIES)),
    _favourite("day", lambda rng: rng.choice(words.DAYS)),
)
FORGETS: Final = "You have not told me that."


def tell(rng: Random, known: dict[str, str]) -> Exchange:
    """The user tells one or two things; `known` is what they have told, and grows."""
    count = rng.choice((1, 1, 1, 2))
    chosen = rng.sample(ATTRIBUTES, count)
    values = [attribute.draw(rng) for attribute in chosen]
    if count == 1:
        said = rng.choice(chosen[0].said).format(values[0])
        if chosen[0].name in known:
            said = rng.choice(("Actually, {}.", "I was wrong: {}.", "No, {}.", "Now {}.")).format(
                chosen[0].clause.format(values[0])
            )
    else:
        said = " and ".join(a.clause.format(v) for a, v in zip(chosen, values, strict=True)) + "."
        said = said[0].upper() + said[1:]
    for attribute, value in zip(chosen, values, strict=True):
        known[attribute.name] = value
    first, rest = chosen[0], chosen[1:]
    if first.name == "name" and not rest:
        answer = f"Nice to meet you, {values[0]}."
    else:
        parts = [a.told.format(v) for a, v in zip(chosen, values, strict=True)]
        answer = "I will remember: " + " and ".join(part[0].lower() + part[1:-1] for part in parts) + "."
    key = "tell|" + "|".join(f"{a.name}={v}" for a, v in zip(chosen, values, strict=True))
    return Exchange("tell", key, said, answer, "The user tells me something.", short="Noted", copied=tuple(values))


def recall(rng: Random, known: dict[str, str]) -> Exchange:
    """A question about what was told, or sometimes about what was not."""
    untold = [attribute for attribute in ATTRIBUTES if attribute.name not in known]
    if rng.random() < 0.15:  # told and asked in one message
        attribute = rng.choice(ATTRIBUTES)
        value = attribute.draw(rng)
        known[attribute.name] = value
        asked = f"{rng.choice(attribute.said).format(value)} {rng.choice(attribute.asked)}"
        key = f"recall|{attribute.name}|{json.dumps(known, sort_keys=True)}"
        return Exchange(
            "recall",
            key,
            asked,
            attribute.told.format(value),
            f"The user told me: {value}.",
            short=value,
            copied=(value,),
        )
    if not known or (untold and rng.random() < 0.3):
        attribute = rng.choice(untold)
        asked = rng.choice(attribute.asked)
        key = f"recall|{attribute.name}|{asked}|not|{json.dumps(known, sort_keys=True)}"
        return Exchange("recall", key, asked, FORGETS, "The user has not told me.", short="Unknown")
    attribute = rng.choice([attribute for attribute in ATTRIBUTES if attribute.name in known])
    value = known[attribute.name]
    asked = rng.choice(attribute.asked)
    key = f"recall|{attribute.name}|{json.dumps(known, sort_keys=True)}"
    return Exchange(
        "recall", key, asked, attribute.told.format(value), f"The user told me: {value}.", short=value, copied=(value,)
    )
