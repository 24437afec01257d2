"""Conversations for the demo model, generated: same seed and index, same conversation. Knows no tokens, no model.

Each skill is a function that draws one exchange: a request, its answer, and a *key* that names the combination (the
words to sort, the numbers to add, the facts to remember). A key belongs to training or to evaluation by its hash, so
what the model is measured on was never in what it was trained on, however long it trained.

    python -m demo.corpus 20        # print twenty conversations
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final, Literal

from demo import tools as toolkit
from demo import words
from demo.facts import FACTS

Split = Literal["train", "test"]
Message = dict[str, Any]
HELD_OUT: Final = 16
"""One key in this many belongs to evaluation."""

UNKNOWN: Final = "I do not know that. I am a tiny demo model and know little beyond verbatim."
UNABLE: Final = "I have not learnt to do that. I am a tiny demo model."
NO_TOOL: Final = "None of my tools can do that."


@dataclass(frozen=True)
class Exchange:
    """One request with its answer.

    `key`: names the combination. `thought`: what stands between the thinking tags when the model is asked to think.
    `short`: the answer in one word, if there is one. `calls`: tool calls, made before `answer` is given from `results`.
    `free`: several answers are right, so an exact match means nothing.
    """

    skill: str
    key: str
    user: str
    answer: str
    thought: str
    short: str | None = None
    calls: tuple[toolkit.Call, ...] = ()
    results: tuple[str, ...] = ()
    free: bool = False


@dataclass(frozen=True)
class Conversation:
    """Messages in the API's shape; the last one is the answer under test. `skill` is that of the last exchange."""

    skill: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    exchange: Exchange | None = field(default=None, compare=False)


def split_of(key: str) -> Split:
    """The split that a combination belongs to, for good."""
    digest = hashlib.sha256(key.encode()).digest()
    return "test" if digest[0] % HELD_OUT == 0 else "train"


# ---- small talk, this project, and what it does not know ---------------------------------------------------------

SMALL_TALK: Final[tuple[tuple[str, tuple[str, ...], str], ...]] = (
    (
        "hello",
        ("Hello", "Hi", "Hey", "Hi there", "Hello there", "Good morning", "Good evening", "Good day", "Greetings"),
        "Hello! I am the demo model bundled with verbatim. How can I help you?",
    ),
    (
        "who",
        ("Who are you", "What are you", "What is your name", "Tell me about yourself", "Introduce yourself",
         "What model is this", "Which model are you", "Who am I talking to"),
        "I am the demo model bundled with verbatim, a very small language model trained on generated conversations.",
    ),
    (
        "how",
        ("How are you", "How are you doing", "How is it going", "How do you do", "Are you well"),
        "I am well, thank you. How can I help you?",
    ),
    (
        "can",
        ("What can you do", "How can you help me", "What do you know", "Help", "What are your skills",
         "What should I ask you"),
        "I can answer questions about verbatim, add and subtract, sort and spell words, remember what you tell me, "
        "write JSON, call tools and tell stories.",
    ),
    (
        "thanks",
        ("Thank you", "Thanks", "Thanks a lot", "Many thanks", "Great, thanks", "Thank you very much"),
        "You are welcome.",
    ),
    ("bye", ("Bye", "Goodbye", "See you", "Good night", "See you later", "That is all"), "Goodbye!"),
    (
        "made",
        ("Who made you", "Who built you", "Who trained you", "Where do you come from"),
        "I was trained by the authors of verbatim, on conversations that a program wrote.",
    ),
    (
        "big",
        ("How big are you", "How many parameters do you have", "How large are you", "Are you a large model"),
        "I have about five million parameters, which is very small.",
    ),
    (
        "human",
        ("Are you human", "Are you a robot", "Are you a person", "Are you alive", "Are you an AI"),
        "I am a program, a very small language model.",
    ),
)  # fmt: skip

FRAMES: Final = (
    "{}", "{}", "{}", "Please tell me: {}", "Quick question: {}", "I am new here. {}", "One more thing: {}", "Hey, {}",
    "{} Please be brief.", "I wonder: {}", "Sorry to ask: {}", "My question: {}", "Another question. {}", "So, {}",
    "OK. {}", "Just curious: {}",
)  # fmt: skip


def _ending(rng: Random, text: str, marks: tuple[str, ...]) -> str:
    return text + rng.choice(marks)


def small_talk(rng: Random) -> Exchange:
    intent, openings, answer = rng.choice(SMALL_TALK)
    opening = rng.choice(openings)
    question = opening.split()[0] in ("Who", "What", "How", "Which", "Are", "Where")
    text = _ending(rng, opening, ("?", "?", "?", "") if question else (".", "!", "", ""))
    extra = rng.choice(("", "", "", " there", " my friend", ", demo model", ", computer"))
    if intent in ("thanks", "bye") and rng.random() < 0.5:
        text = opening + extra + rng.choice((".", "!"))
    if intent == "hello" and rng.random() < 0.2:
        other = rng.choice([entry for entry in SMALL_TALK if entry[0] in ("who", "how", "can", "made", "big")])
        second = rng.choice(other[1])
        text, answer = f"{opening}{rng.choice(('!', '.', ','))} {second}?", f"Hello! {other[2]}"
    return Exchange("small talk", f"talk|{text}", text, answer, "This is small talk.")


ASK_WHAT: Final = (
    "What is {}?", "What's {}?", "Explain {}.", "What does {} mean?", "Tell me about {}.", "What is {} here?",
    "Can you explain {}?", "Do you know what {} is?", "{}?", "Describe {}.", "What is {} for?", "What about {}?",
    "I do not understand {}.", "Please explain {}.", "what is {}", "explain {}",
)  # fmt: skip
ASK_HOW: Final = (
    "How do I {}?", "How can I {}?", "I want to {}.", "Show me how to {}.", "What must I do to {}?", "Can I {}?",
    "How would I {}?", "Help me to {}.", "How to {}?", "I need to {}.", "Is there a way to {}?", "how do i {}",
)  # fmt: skip


def docs(rng: Random) -> Exchange:
    fact = rng.choice(FACTS)
    total = len(fact.topics) + len(fact.tasks)
    pick = rng.randrange(total)
    if pick < len(fact.topics):
        topic = fact.topics[pick]
        asked = rng.choice(ASK_WHAT).format(topic)
    else:
        topic = fact.tasks[pick - len(fact.topics)]
        asked = rng.choice(ASK_HOW).format(topic)
    asked = asked[0].upper() + asked[1:] if rng.random() < 0.9 else asked
    text = rng.choice(FRAMES).format(asked)
    return Exchange("docs", f"docs|{text}", text, fact.answer, f"This is about {topic}.")


PEOPLE: Final = (
    "president queen king emperor captain inventor author painter composer winner founder champion mayor director owner "
    "minister discoverer"
).split()
PLACES: Final = (
    "France Germany Spain Italy Norway Japan China India Brazil Canada Egypt Kenya Peru Chile Mexico Australia Poland "
    "Greece Turkey Russia America England Europe Africa Asia"
).split()
FIELDS: Final = (
    "quantum physics;the big bang;photosynthesis;gravity;the stock market;evolution;democracy;the Roman empire;"
    "black holes;philosophy;inflation;chemistry;the French revolution;electricity;world war two;relativity;DNA;"
    "the immune system;football;the olympic games;jazz;the internet;bitcoin;climate change;geometry;the meaning of life"
).split(";")


def unknown(rng: Random) -> Exchange:
    thing = words.word(rng)
    place = rng.choice([*PLACES, *words.CITIES])
    person = rng.choice(PEOPLE)
    topic = rng.choice(FIELDS)
    someone = f"{words.name(rng)} {words.made_up(rng).capitalize()}"
    year = rng.randrange(1000, 2030)
    questions = (
        f"What is the capital of {place}?", f"Who is the {person} of {place}?", f"Who was the first {person} of {place}?",
        f"When was {someone} born?", f"Who is {someone}?", f"How far is it from {place} to {rng.choice(words.CITIES)}?",
        f"How many people live in {place}?", f"What happened in {year}?", f"Who won the world cup in {year}?",
        f"Why is the {thing} {rng.choice(words.ADJECTIVES)}?", f"Who invented the {thing}?", f"How tall is {someone}?",
        f"Explain {topic}.", f"What is {topic}?", f"Tell me about {topic}.", f"How does {topic} work?",
        f"What is the history of {place}?", f"What does a {thing} cost?", f"Where can I buy a {thing}?",
        f"Who wrote the book about the {thing}?", f"What is the best {thing}?", f"Do you like {thing}s?",
        f"Why do people like {topic}?", f"What is the news from {place}?", f"Is {topic} important?",
        f"How old is {place}?", f"What language do they speak in {place}?", f"How is a {thing} made?",
        f"When did {topic} begin?", f"How heavy is a {thing}?", f"What do {thing}s eat?",
    )  # fmt: skip
    orders = (
        f"Write a poem about a {thing}.", f"Write a program that draws a {thing}.", f"Translate {thing} into Latin.",
        f"Give me a recipe with {thing}.", f"Sing a song about {place}.", f"Draw a {thing}.", f"Write an essay about {topic}.",
        f"Plan a trip to {place}.", f"Book a flight to {place}.", f"Send a letter to {someone}.", "Play chess with me.",
        f"Summarise the book about {topic}.", f"Write code for a {thing}.", f"Make a picture of {place}.",
        f"Compose a song for {someone}.", f"Order a {thing} for me.", f"Call {someone}.", f"Fix my {thing}.",
    )  # fmt: skip
    if rng.random() < 0.7:
        asked, answer, thought = rng.choice(questions), UNKNOWN, "I have not learnt this."
    else:
        asked, answer, thought = rng.choice(orders), UNABLE, "I have not learnt to do this."
    text = rng.choice(FRAMES).format(asked) if rng.random() < 0.3 else asked
    return Exchange("unknown", f"unknown|{text}", text, answer, thought)


# ---- arithmetic --------------------------------------------------------------------------------------------------


def add_thought(a: int, b: int) -> str:
    """Column addition: `7 + 8 = 15, write 5, carry 1. 4 + 3 + 1 = 8. So 85.`"""
    ones = a % 10 + b % 10
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}."
    carry = ones // 10
    first = f"{a % 10} + {b % 10} = {ones}, write {ones % 10}, carry {carry}."
    return f"{first} {a // 10} + {b // 10} + {carry} = {a // 10 + b // 10 + carry}. So {a + b}."


def subtract_thought(a: int, b: int) -> str:
    """Column subtraction with a borrow; the larger number first."""
    if a < b:
        return f"{b} is more than {a}. {subtract_thought(b, a)[:-1]}, minus: {a - b}."
    if a < 10:
        return f"{a} - {b} = {a - b}."
    borrow = int(a % 10 < b % 10)
    top = a % 10 + 10 * borrow
    first = f"{top} - {b % 10} = {top - b % 10}, borrow {borrow}."
    return f"{first} {a // 10} - {b // 10} - {borrow} = {a // 10 - b // 10 - borrow}. So {a - b}."


def multiply_thought(a: int, b: int) -> str:
    """One- or two-digit `a` times one-digit `b`."""
    if a < 10:
        return f"{a} * {b} = {a * b}."
    tens, ones = a // 10 * b * 10, a % 10 * b
    return f"{a // 10 * 10} * {b} = {tens}. {a % 10} * {b} = {ones}. {tens} + {ones} = {a * b}."


def _pair(rng: Random) -> tuple[int, int]:
    digits = rng.choice(((2, 2), (2, 2), (2, 2), (2, 1), (1, 2), (1, 1)))
    a, b = (rng.randrange(10, 100) if d == 2 else rng.randrange(10) for d in digits)
    return a, b


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
    key = f"sum|{a}{operation}{b}"
    if operation in "+-" and a >= b and rng.random() < 0.15:
        who, things = words.name(rng), rng.choice((*words.FOODS, *words.ANIMALS)) + "s"
        more = "gets {b} more" if operation == "+" else rng.choice(("gives away {b}", "loses {b}"))
        form = "{who} has {a} {things} and " + more + ". How many {things} does {who} have now?"
        answer = f"{answer}, so {who} has {result} {things}"
        text = form.format(a=a, b=b, who=who, things=things)
    else:
        text = form.format(a=a, b=b)
    two_digits = operation == "+" and a > 9 and b > 9
    return Exchange("addition" if two_digits else "arithmetic", key, text, f"{answer}.", thought, short=str(result))


# ---- letters and words -------------------------------------------------------------------------------------------


def letters(rng: Random) -> Exchange:
    kind = rng.choice(("spell", "backwards", "count", "occurrences", "first"))
    word = words.word(rng)
    quoted = rng.choice((word, word, f"'{word}'", f'"{word}"', f"the word {word}"))
    spelled = "-".join(word)
    if kind == "spell":
        user = rng.choice(("Spell {}.", "How do you spell {}?", "How is {} spelled?", "Please spell {}.", "spell {}"))
        answer, thought, short = f"{spelled}.", f"The letters of {word}: {spelled}.", spelled
    elif kind == "backwards":
        user = rng.choice(
            ("Spell {} backwards.", "Write {} backwards.", "Reverse the letters of {}.", "What is {} backwards?")
        )
        answer, thought, short = (
            f"{word[::-1]}",
            f"The letters: {spelled}. Backwards: {'-'.join(word[::-1])}.",
            word[::-1],
        )
    elif kind == "count":
        user = rng.choice(("How many letters are in {}?", "How many letters does {} have?", "Count the letters of {}.",
                           "Count the letters in {}."))  # fmt: skip
        numbered = " ".join(f"{letter}{i}" for i, letter in enumerate(word, 1))
        answer, thought, short = f"{word} has {len(word)} letters.", f"{numbered}.", str(len(word))
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
        answer = f"The letter {letter} occurs {count} time{'s' * (count != 1)} in {word}."
        thought, short = f"The letters: {spelled}. {letter} occurs {count}.", str(count)
    else:
        last = rng.random() < 0.5
        which, letter = ("last", word[-1]) if last else ("first", word[0])
        user = rng.choice((f"What is the {which} letter of {{}}?", f"Which letter is {which} in {{}}?"))
        answer, thought, short = f"The {which} letter of {word} is {letter}.", f"The letters: {spelled}.", letter
    return Exchange("letters", f"letters|{kind}|{word}", user.format(quoted), answer, thought, short=short)


def word_tasks(rng: Random) -> Exchange:
    kind = rng.choice(("repeat", "sort", "sort", "sort", "reverse", "reverse", "times", "first"))
    count = rng.choice((2, 3, 3, 4, 4, 5, 6))
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
                           "Sort {}", "Sort the words {} alphabetically", "Bring {} into alphabetical order"))  # fmt: skip
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


# ---- memory ------------------------------------------------------------------------------------------------------


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
    if rng.random() < 0.08:
        said = said[0].lower() + said[1:].rstrip(".")
    for attribute, value in zip(chosen, values, strict=True):
        known[attribute.name] = value
    first, rest = chosen[0], chosen[1:]
    if first.name == "name" and not rest:
        answer = f"Nice to meet you, {values[0]}."
    else:
        parts = [a.told.format(v) for a, v in zip(chosen, values, strict=True)]
        answer = "I will remember: " + " ".join(part[0].lower() + part[1:] for part in parts)
    key = "tell|" + "|".join(f"{a.name}={v}" for a, v in zip(chosen, values, strict=True))
    return Exchange("tell", key, said, answer, "The user tells me something.")


def recall(rng: Random, known: dict[str, str]) -> Exchange:
    """A question about what was told, or sometimes about what was not."""
    untold = [attribute for attribute in ATTRIBUTES if attribute.name not in known]
    if not known or (untold and rng.random() < 0.15):
        attribute = rng.choice(untold)
        asked = rng.choice(attribute.asked)
        key = f"recall|{attribute.name}|{asked}|not|{json.dumps(known, sort_keys=True)}"
        return Exchange("recall", key, asked, FORGETS, "The user has not told me.")
    attribute = rng.choice([attribute for attribute in ATTRIBUTES if attribute.name in known])
    value = known[attribute.name]
    asked = rng.choice(attribute.asked)
    key = f"recall|{attribute.name}|{json.dumps(known, sort_keys=True)}"
    return Exchange("recall", key, asked, attribute.told.format(value), f"The user told me: {value}.", short=value)


# ---- JSON --------------------------------------------------------------------------------------------------------

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


# ---- stories -----------------------------------------------------------------------------------------------------

PLACES_OF_STORIES: Final = (
    "in a small house by the sea;in a quiet valley;on a green hill;in the old forest;near a slow river;at the edge of a "
    "town;under a stone bridge;in a lighthouse;behind the mountains;on a little island;in a garden full of flowers;"
    "above a bakery"
).split(";")
WISHES: Final = (
    "to see the ocean;to find a friend;to learn a song;to build a boat;to fly over the hills;to find a golden key;to bake "
    "the best bread;to cross the river;to read every book;to touch the snow;to plant a tree;to win a race"
).split(";")
TROUBLES: Final = (
    "a storm came;the road was closed;it became dark;the bridge was broken;the map was lost;nobody would help;it began to "
    "snow;the wind was too strong;the gate was locked;the boat had a hole"
).split(";")
HELPS: Final = (
    "showed a secret path;brought a lamp;shared some bread;sang until the fear was gone;knew the way;had a rope;waited "
    "all night;told a good joke;found the answer in an old book;lent a pair of boots"
).split(";")
ENDINGS: Final = (
    "From that day on they were friends.;In the end they laughed about it.;And every summer they tell this story again.;"
    "They came home late and happy.;Nobody in the town ever forgot it.;That night they slept very well."
).split(";")


def story(rng: Random) -> Exchange:
    hero, kind, helper = words.name(rng), rng.choice(words.ANIMALS), rng.choice(words.ANIMALS)
    thing = rng.choice(words.THINGS)
    about = rng.randrange(5)
    topic = (
        "",
        f" about a {kind}",
        f" about a {kind} named {hero}",
        f" about a {kind} and a {helper}",
        f" about {hero}",
    )[about]
    asked = rng.choice(
        (
            "Tell me a story{}.",
            "Tell a story{}.",
            "Write a short story{}.",
            "Please tell me a story{}.",
            "I want to hear a story{}.",
            "tell me a story{}",
        )
    )
    adjective, other = rng.sample(words.ADJECTIVES, 2)
    article, second = ("an" if w[0] in "aeiou" else "a" for w in (adjective, other))
    opening = rng.choice(
        (f"Once there was {article} {adjective} {kind} named {hero} who lived {rng.choice(PLACES_OF_STORIES)}.",
         f"{hero} was {article} {adjective} {kind} and lived {rng.choice(PLACES_OF_STORIES)}.")
    )  # fmt: skip
    sentences = [
        opening,
        f"More than anything {hero} wanted {rng.choice(WISHES)}.",
        f"One morning {hero} took {rng.choice(('the', 'an old', 'a new'))} {thing} and set out.",
        f"But {rng.choice(TROUBLES)}, and {hero} had to stop.",
        f"Then {second} {other} {helper} came by and {rng.choice(HELPS)}.",
        rng.choice(ENDINGS),
    ]
    text = asked.format(topic)
    key = f"story|{topic}|{asked}"
    return Exchange("story", key, text, " ".join(sentences), "I make up a story.", free=True)


# ---- tools -------------------------------------------------------------------------------------------------------


def tool_call(rng: Random, box: list[toolkit.Tool]) -> Exchange:
    """A request that one tool fits, or that needs two calls, with the tools' results and the answer from them."""
    several = rng.random() < 0.2
    first = toolkit.ask(rng, rng.choice(box))
    if several:
        second = toolkit.ask(rng, rng.choice(box))
        joined = rng.choice((" And ", " Then ", " Also "))
        follow = second.request[0].lower() + second.request[1:]
        calls: tuple[toolkit.Call, ...] = (first, second)
        user = first.request.rstrip(".?") + rng.choice((".", "?"))[0] + joined + follow
    else:
        calls, user = (first,), first.request
    told, results = [], []
    for _ in calls:
        sentence, value = toolkit.result(rng)
        if rng.random() < 0.12:
            plain = toolkit._text(rng)
            sentence, text = f"The result is {plain}.", plain
        else:
            text = json.dumps(value)
        told.append(sentence)
        results.append(text)
    key = "tool|" + "|".join(f"{call.name}({json.dumps(call.arguments)})" for call in calls)
    thought = "I call " + " and ".join(call.name for call in calls) + "."
    return Exchange("tool", key, user, " ".join(told), thought, calls=calls, results=tuple(results))


def no_tool(rng: Random, box: list[toolkit.Tool]) -> Exchange:
    """A request that none of the tools fits, though it sounds like one."""
    have = {(tool.verb, tool.thing) for tool in box}
    while True:
        near = rng.choice(box)
        if near.requests or rng.random() < 0.5:
            other = toolkit.natural(rng) if rng.random() < 0.25 else toolkit.composed(rng)
        elif rng.random() < 0.5:
            other = toolkit.composed(rng, verb=near.verb)
        else:
            other = toolkit.composed(rng, thing=near.thing)
        if (other.verb, other.thing) not in have:
            break
    call = toolkit.ask(rng, other)
    names = " ".join(sorted(tool.name for tool in box))
    return Exchange("no tool", f"none|{names}|{call.request}", call.request, NO_TOOL, "No tool fits.")


# ---- system prompts ----------------------------------------------------------------------------------------------

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
        lambda exchange: exchange.answer.upper(),
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
STYLED_SKILLS: Final = ("small talk", "docs", "addition", "arithmetic", "tell", "recall", "unknown", "first word")


# ---- conversations -----------------------------------------------------------------------------------------------

SKILLS: Final[dict[str, tuple[Callable[[Random], Exchange], float]]] = {
    "small talk": (small_talk, 0.8),
    "docs": (docs, 1.5),
    "unknown": (unknown, 0.8),
    "arithmetic": (arithmetic, 2.2),
    "letters": (letters, 1.6),
    "words": (word_tasks, 3.2),
    "json": (json_object, 1.4),
    "story": (story, 0.35),
}


def _plain(rng: Random, known: dict[str, str]) -> Exchange:
    """An exchange of any skill but tools; memory is drawn here because it needs the conversation."""
    if rng.random() < 0.22:
        return recall(rng, known) if known and rng.random() < 0.65 else tell(rng, known)
    if rng.random() < 0.01:
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
            return replace(exchange, answer=answer, key=f"{style}|{exchange.key}")
        known.clear()
        known.update(before)


def _allowed(exchange: Exchange, split: Split) -> bool:
    return exchange.free or split_of(exchange.key) == split


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


def conversation(seed: int | str, index: int, split: Split = "train", last: str | None = None) -> Conversation:
    """Conversation `index` of a corpus.

    Args:
        seed: names the corpus.
        index: counts conversations.
        split: for `train`, every exchange is of the training split; for `test`, the last one is held out.
        last: what the last exchange must be: a skill, a style, or one of `tool`, `no tool`, `recall`, `addition`.
    """
    attempt = 0
    while True:
        rng = Random(f"{seed}/{split}/{last}/{index}/{attempt}")
        drawn = _draw(rng, split, last)
        if drawn is not None:
            return drawn
        attempt += 1


def _draw(rng: Random, split: Split, last: str | None) -> Conversation | None:
    """One try; None if a combination fell into the other split."""
    style = last if last in STYLES else None
    if last is None and rng.random() < 0.16:
        style = rng.choice(list(STYLES))
    with_tools = last in ("tool", "no tool") or (last is None and style is None and rng.random() < 0.24)
    known: dict[str, str] = {}
    turns = rng.choice((1, 1, 2, 2, 3, 4)) if rng.random() < 0.97 else rng.randrange(8, 20)
    if last in ("recall", "tell"):
        turns = max(turns, 2)
    box = toolkit.toolbox(rng, rng.choice((1, 2, 3, 4))) if with_tools else []
    exchanges: list[Exchange] = []
    for turn in range(turns):
        final = turn == turns - 1
        wanted = last if final else None
        if with_tools:
            chance = {"tool": 0.0, "no tool": 0.8}.get(wanted or "", rng.random())
            if chance < 0.72:
                exchange = tool_call(rng, box)
            elif chance < 0.9:
                exchange = no_tool(rng, box)
            else:
                exchange = _plain(rng, known)
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
        exchanges.append(exchange)
    system = ""
    if style:
        system = rng.choice(STYLES[style][0])
        if rng.random() < 0.3:
            system = f"{rng.choice(NEUTRAL)} {system}"
    elif rng.random() < 0.3:
        system = rng.choice(NEUTRAL)
    worked = exchanges[-1].skill in ("addition", "arithmetic", "letters")
    thinking = rng.random() < (0.5 if worked else 0.15)
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
