"""Small talk, questions about this project, questions beyond the model, and stories. Knows no conversation."""

from __future__ import annotations

from random import Random
from typing import Final

from demo import words
from demo.exchange import Exchange
from demo.facts import FACTS

UNKNOWN: Final = "I do not know that. I am a tiny demo model and know little beyond verbatim."
UNABLE: Final = "I have not learnt to do that. I am a tiny demo model."

SMALL_TALK: Final[tuple[tuple[str, tuple[str, ...], str, str], ...]] = (
    (
        "hello",
        ("Hello", "Hi", "Hey", "Hi there", "Hello there", "Good morning", "Good evening", "Good day", "Greetings"),
        "Hello! I am the demo model bundled with verbatim. How can I help you?",
        "Hello",
    ),
    (
        "who",
        ("Who are you", "What are you", "What is your name", "Tell me about yourself", "Introduce yourself",
         "What model is this", "Which model are you", "Who am I talking to"),
        "I am the demo model bundled with verbatim, a very small language model trained on generated conversations.",
        "Demo",
    ),
    (
        "how",
        ("How are you", "How are you doing", "How is it going", "How do you do", "Are you well"),
        "I am well, thank you. How can I help you?",
        "Well",
    ),
    (
        "can",
        ("What can you do", "How can you help me", "What do you know", "Help", "What are your skills",
         "What should I ask you"),
        "I can answer questions about verbatim, add and subtract, sort and spell words, remember what you tell me, "
        "write JSON, call tools and tell stories.",
        "Little",
    ),
    (
        "thanks",
        ("Thank you", "Thanks", "Thanks a lot", "Many thanks", "Great, thanks", "Thank you very much"),
        "You are welcome.",
        "Welcome",
    ),
    ("bye", ("Bye", "Goodbye", "See you", "Good night", "See you later", "That is all"), "Goodbye!", "Goodbye"),
    (
        "made",
        ("Who made you", "Who built you", "Who trained you", "Where do you come from"),
        "I was trained by the authors of verbatim, on conversations that a program wrote.",
        "Authors",
    ),
    (
        "big",
        ("How big are you", "How many parameters do you have", "How large are you", "Are you a large model"),
        "I have about five million parameters, which is very small.",
        "Small",
    ),
    (
        "human",
        ("Are you human", "Are you a robot", "Are you a person", "Are you alive", "Are you an AI"),
        "I am a program, a very small language model.",
        "Program",
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
    intent, openings, answer, short = rng.choice(SMALL_TALK)
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
        short = other[3]
    return Exchange("small talk", f"talk|{text}", text, answer, "This is small talk.", short=short)


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
    return Exchange("docs", f"docs|{text}", text, fact.answer, f"This is about {topic}.", short=fact.short)


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
        f"What is the weather in {place}?", f"What time is it in {place}?", "What day is it?", "What time is it?",
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
    return Exchange("unknown", f"unknown|{text}", text, answer, thought, short="Unknown")


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
