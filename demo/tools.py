"""Function definitions, requests that fit them and requests that fit none. Knows no conversation.

Most tools are put together from a verb, a thing and a few parameters, so that a call has to be read off the
definition and the request: names, descriptions and arguments are far too many to be remembered.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from demo import words
from demo.exchange import Call, Exchange

NO_TOOL: Final = "None of my tools can do that."

VERBS: Final = """
create delete find open close send book cancel update start stop order check play show add remove buy move rename print
save share count read lock unlock copy pause clean
""".split()

OBJECTS: Final = """
file order ticket meeting alarm playlist song invoice report table room flight train hotel message email note task
reminder photo door light window contact account user event recipe map route parcel price stock forecast timer calendar
document folder package payment game movie book lamp robot server backup job sensor camera letter bill heater channel
invitation lesson poem shelf garage kitchen boat
""".split()

LABELS: Final = """
title id color size label level mode format width height topic subject author owner status tag code speed volume target
source length weight category genre brand priority group version style theme count
""".split()
"""Names of parameters that say nothing on their values; none is also the name of another kind of parameter."""


@dataclass(frozen=True)
class Parameter:
    """One parameter: its JSON schema and how a request states its value."""

    name: str
    type: str
    phrase: Callable[[Any], str]
    draw: Callable[[Random], Any]
    required: bool = True


@dataclass(frozen=True)
class Tool:
    """A function definition and the requests that call for it."""

    definition: dict[str, Any]
    verb: str
    thing: str
    parameters: tuple[Parameter, ...]
    requests: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The function's name."""
        return str(self.definition["function"]["name"])


def text(rng: Random) -> str:
    """A value as people write them: a code, two words, a name or a word."""
    kind = rng.randrange(6)
    if kind == 0:
        return f"{rng.choice('ABCDEFGHKLMNPRSTX')}{rng.randrange(1, 1000)}"
    if kind == 1:
        return f"{rng.choice(words.ADJECTIVES)} {words.word(rng)}"
    if kind == 2:
        return words.name(rng)
    return words.word(rng)


def _number(rng: Random) -> int:
    return rng.choice((rng.randrange(1, 10), rng.randrange(10, 100), rng.randrange(100, 2000)))


def _email(rng: Random) -> str:
    return f"{words.name(rng).lower()}@{rng.choice(('example', 'mail', 'post', words.made_up(rng)))}.{rng.choice(('com', 'org', 'net'))}"


def _clock(rng: Random) -> str:
    return f"{rng.randrange(24):02d}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}"


def _parameter(rng: Random, taken: set[str]) -> Parameter:
    """A parameter whose name is not in `taken`; both its name and its phrase come from the same word."""
    kinds: tuple[tuple[tuple[str, ...], str, str, Callable[[Random], Any]], ...] = (
        (("city", "location", "place", "town"), "string", "in {}", words.city),
        (("day", "date", "weekday"), "string", "on {}", lambda r: r.choice(words.DAYS)),
        (("time", "at", "start_time"), "string", "at {}", _clock),
        (("person", "name", "recipient", "contact"), "string", "for {}", words.name),
        (("email", "to", "address"), "string", "to {}", _email),
        (("amount", "price", "dollars"), "integer", "for {} dollars", _number),
        (("minutes", "duration"), "integer", "for {} minutes", _number),
        (("language", "lang"), "string", "in {}", lambda r: r.choice(words.LANGUAGES)),
    )
    while True:
        if rng.random() < 0.5:
            label = rng.choice(LABELS)
            numeric = rng.random() < 0.35
            name, kind = label, "integer" if numeric else "string"
            template = rng.choice(("with {label} {{}}", "with the {label} {{}}"))
            template = template.format(label=label)
            draw: Callable[[Random], Any] = _number if numeric else text
        else:
            names, kind, template, draw = rng.choice(kinds)
            name = rng.choice(names)
        if name not in taken:
            taken.add(name)
            return Parameter(name, kind, template.format, draw, rng.random() < 0.8)


def _name(rng: Random, verb: str, thing: str) -> str:
    return rng.choice((f"{verb}_{thing}",) * 5 + (f"{verb}{thing.capitalize()}", f"{thing}_{verb}"))


def _definition(
    rng: Random, name: str, description: str, parameters: tuple[Parameter, ...], about: str
) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    described = rng.random() < 0.3
    for parameter in parameters:
        properties[parameter.name] = {"type": parameter.type}
        if described:
            properties[parameter.name]["description"] = f"The {parameter.name.replace('_', ' ')} of the {about}."
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    required = [parameter.name for parameter in parameters if parameter.required]
    if required or rng.random() < 0.5:
        schema["required"] = required
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.85:
        function["description"] = description
    function["parameters"] = schema
    return {"type": "function", "function": function}


NATURAL: Final[tuple[tuple[tuple[str, ...], str, tuple[Parameter, ...], tuple[str, ...]], ...]] = (
    (
        ("get_weather", "get_current_weather", "weather", "weather_in"),
        "Get the current weather in a city.",
        (Parameter("city", "string", str, words.city),),
        (
            "What is the weather in {}?",
            "How is the weather in {}?",
            "What is the weather like in {} today?",
            "Is it raining in {}?",
            "Tell me the weather in {}.",
            "weather in {}",
            "How warm is it in {}?",
        ),
    ),
    (
        ("get_time", "current_time", "get_local_time"),
        "Get the local time in a city.",
        (Parameter("city", "string", str, words.city),),
        ("What time is it in {}?", "Tell me the time in {}.", "What is the local time in {}?"),
    ),
    (
        ("translate", "translate_text", "translate_to"),
        "Translate a text into a language.",
        (
            Parameter("text", "string", str, text),
            Parameter("language", "string", str, lambda r: r.choice(words.LANGUAGES)),
        ),
        ("Translate {} into {}.", "Translate '{}' to {}.", "How do you say {} in {}?"),
    ),
    (
        ("search_web", "web_search", "search"),
        "Search the web.",
        (Parameter("query", "string", str, text),),
        ("Search the web for {}.", "Look up {}.", "Search for {}.", "Find out about {} on the web."),
    ),
    (
        ("convert_currency", "exchange", "convert_money"),
        "Convert an amount of money from one currency to another.",
        (
            Parameter("amount", "number", str, _number),
            Parameter("from_currency", "string", str, lambda r: r.choice(("USD", "EUR", "GBP", "JPY", "NOK"))),
            Parameter("to_currency", "string", str, lambda r: r.choice(("CHF", "SEK", "CAD", "AUD", "INR"))),
        ),
        ("Convert {} {} to {}.", "How much is {} {} in {}?"),
    ),
    (
        ("set_alarm", "create_alarm", "wake_me"),
        "Set an alarm.",
        (Parameter("time", "string", str, _clock),),
        ("Wake me at {}.", "Set an alarm for {}.", "Please wake me up at {}."),
    ),
    (
        ("get_stock_price", "stock_price", "get_price"),
        "Get the price of a stock.",
        (
            Parameter(
                "symbol",
                "string",
                str,
                lambda r: "".join(r.choice("ABCDEFGHIKLMNOPRSTUVX") for _ in range(r.choice((3, 4)))),
            ),
        ),
        ("What is the price of {} stock?", "How much is one share of {}?", "Get the stock price of {}."),
    ),
    (
        ("turn_on_light", "light_on", "switch_light_on"),
        "Turn on the light in a room.",
        (Parameter("room", "string", str, lambda r: r.choice("kitchen bathroom bedroom hall garage office".split())),),
        ("Turn on the light in the {}.", "It is dark in the {}, please turn on the light.", "Light on in the {}."),
    ),
)


def natural(rng: Random) -> Tool:
    """A tool that people ask for in many ways: the weather, the time, a translation."""
    names, description, parameters, requests = rng.choice(NATURAL)
    if len(parameters) == 1 and parameters[0].name == "city":
        parameter = rng.choice(("city", "city", "location", "place"))
        parameters = (Parameter(parameter, "string", str, words.city),)
    definition = _definition(rng, rng.choice(names), description, parameters, "request")
    definition["function"]["description"] = description
    return Tool(definition, names[0], names[0], parameters, requests)


def composed(rng: Random, verb: str | None = None, thing: str | None = None) -> Tool:
    """A tool made of a verb, a thing and up to three parameters."""
    verb, thing = verb or rng.choice(VERBS), thing or rng.choice(OBJECTS)
    taken: set[str] = set()
    parameters = tuple(_parameter(rng, taken) for _ in range(rng.choice((0, 1, 1, 2, 2, 3))))
    article = "an" if thing[0] in "aeiou" else "a"
    description = rng.choice((f"{verb.capitalize()} {article} {thing}.", f"{verb.capitalize()} the {thing}."))
    return Tool(_definition(rng, _name(rng, verb, thing), description, parameters, thing), verb, thing, parameters)


def toolbox(rng: Random, count: int) -> list[Tool]:
    """`count` tools with different names; some share a verb or a thing, so that both must be read."""
    tools: list[Tool] = []
    pairs: set[tuple[str, str]] = set()
    while len(tools) < count:
        if rng.random() < 0.2:
            tool = natural(rng)
        else:
            near = rng.choice(tools) if tools and rng.random() < 0.3 else None
            if near is None or near.requests:
                tool = composed(rng)
            elif rng.random() < 0.5:
                tool = composed(rng, verb=near.verb)
            else:
                tool = composed(rng, thing=near.thing)
        if (tool.verb, tool.thing) not in pairs and all(tool.name != other.name for other in tools):
            pairs.add((tool.verb, tool.thing))
            tools.append(tool)
    rng.shuffle(tools)
    return tools


def ask(rng: Random, tool: Tool) -> Call:
    """A request for the tool and its call. Parameters that are not required are left out half of the time."""
    if tool.requests:
        values = [parameter.draw(rng) for parameter in tool.parameters]
        arguments = {p.name: value for p, value in zip(tool.parameters, values, strict=True)}
        return Call(rng.choice(tool.requests).format(*values), tool.name, arguments)
    given = [p for p in tool.parameters if p.required or rng.random() < 0.5]
    arguments = {p.name: p.draw(rng) for p in given}
    spoken = list(given)
    if rng.random() < 0.3:
        rng.shuffle(spoken)
    article = rng.choice(("the", "a", "the", "my"))
    if article == "a" and tool.thing[0] in "aeiou":
        article = "an"
    request = " ".join([tool.verb, article, tool.thing, *(p.phrase(arguments[p.name]) for p in spoken)])
    request = rng.choice(("{}.", "Please {}.", "Can you {}?", "I want you to {}.", "{}")).format(request)
    return Call(request[0].upper() + request[1:], tool.name, arguments)


def result(rng: Random) -> tuple[str, dict[str, Any]]:
    """What a tool might answer, as (the sentence that tells it, the object)."""
    if rng.random() < 0.15:
        reason = rng.choice(("not found", "no permission", "timeout", "not available", "bad request"))
        return f"The tool reported an error: {reason}.", {"error": reason}
    count = rng.choice((1, 1, 2))
    keys = rng.sample([*LABELS, "temperature", "result", "state", "answer", "sky", "wind", "total"], count)
    values: list[Any] = [_number(rng) if rng.random() < 0.5 else text(rng) for _ in keys]
    told = " and ".join(f"the {key} is {value}" for key, value in zip(keys, values, strict=True))
    return told[0].upper() + told[1:] + ".", dict(zip(keys, values, strict=True))


def tool_call(rng: Random, box: list[Tool]) -> Exchange:
    """A request that one tool fits, or that needs two calls, with the tools' results and the answer from them."""
    several = rng.random() < 0.2
    first = ask(rng, rng.choice(box))
    if several:
        second = ask(rng, rng.choice(box))
        joined = rng.choice((" And ", " Then ", " Also "))
        follow = second.request if second.request[:2] == "I " else second.request[0].lower() + second.request[1:]
        calls: tuple[Call, ...] = (first, second)
        user = first.request.rstrip(".?") + rng.choice((".", "?"))[0] + joined + follow
    else:
        calls, user = (first,), first.request
    told, results = [], []
    for _ in calls:
        sentence, value = result(rng)
        if rng.random() < 0.12:
            plain = text(rng)
            sentence, shown = f"The result is {plain}.", plain
        else:
            shown = json.dumps(value)
        told.append(sentence)
        results.append(shown)
    key = "tool|" + "|".join(f"{call.name}({json.dumps(call.arguments)})" for call in calls)
    thought = "I call " + " and ".join(call.name for call in calls) + "."
    return Exchange("tool", key, user, " ".join(told), thought, calls=calls, results=tuple(results))


def no_tool(rng: Random, box: list[Tool]) -> Exchange:
    """A request that none of the tools fits; two times in five one has the same verb or thing."""
    have = {(tool.verb, tool.thing) for tool in box}
    while True:
        near = rng.choice(box)
        if near.requests or rng.random() < 0.5:
            other = natural(rng) if rng.random() < 0.25 else composed(rng)
        elif rng.random() < 0.5:
            other = composed(rng, verb=near.verb)
        else:
            other = composed(rng, thing=near.thing)
        if (other.verb, other.thing) not in have:
            break
    call = ask(rng, other)
    names = " ".join(sorted(tool.name for tool in box))
    return Exchange("no tool", f"none|{names}|{call.request}", call.request, NO_TOOL, "No tool fits.")
