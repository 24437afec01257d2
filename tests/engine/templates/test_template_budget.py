"""Templates that never end, grow without end or make much of little are refused by count; all others are not."""

# ruff: noqa: E501 (a template is one line)

from __future__ import annotations

import json

import pytest
from test_chat_template import ALL_TEMPLATES, SPECIAL, clock, source_of

from engine.errors import LoadError, TemplateRefused
from engine.loading.trials import template_trial
from engine.templates import chat_template
from engine.templates.chat_template import ChatTemplate
from engine.types.messages import ChatMessage, ToolCall
from engine.types.tools import Tool

STEPS = r"takes more than \d+ steps"
TEXT = r"reads and makes more than \d+ characters|makes a value of more than 67108864 characters"
WIDE = r"beyond 100000 nothing is made"
BITS = "makes a number of more than 65536 bits"


def grow(step: str, start: str = "[1]", then: str = "{{ ns.x }}") -> str:
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}{then}"
    )


def forever(body: str, first: str = "") -> str:
    return f"{first}{{% for i in range(100000) %}}{{% for j in range(100000) %}}{body}{{% endfor %}}{{% endfor %}}"


LONG = "{% set a = 'a' * 10000000 %}"
MANY = "{% set y = range(100000) | list %}"
ATTACKS = {
    # loops
    "nested loops": (forever(""), STEPS),
    "loops that leave all out": ("{% for i in range(100000) %}" + "{% for j in range(100000) if false %}{% endfor %}" * 2 + "{% endfor %}", STEPS),
    "macros that call twice": ("{% macro m(n) %}{% if n < 60 %}{{ m(n + 1) }}{{ m(n + 1) }}{% endif %}{% endmacro %}{{ m(0) }}", STEPS),
    "a loop inside itself": ("{% for x in range(10) recursive %}{% if loop.depth < 40 %}{{ loop(range(10)) }}{% endif %}{% endfor %}", STEPS),
    "calls": (forever("{{ c.next() }}", "{% set c = cycler('a', 'b') %}"), STEPS),
    "filters": (forever("{% set x = 'a' | upper | lower %}"), STEPS),
    "what is left out": ("{% for i in range(100000) %}{% set x = range(100000) | select('==', -1) | list %}{% endfor %}", STEPS),
    "lists": ("{% for i in range(100000) %}{% set x = range(100000) | list %}{% endfor %}", STEPS),
    "sorting": ("{% for i in range(100000) %}{% set x = range(100000) | sort %}{% endfor %}", STEPS),
    "slices": (MANY + "{% for i in range(100000) %}{% set x = y[::-1] %}{% endfor %}", STEPS),
    "searching lists": (MANY + "{% for i in range(100000) %}{% set x = -1 in y %}{% endfor %}", STEPS),
    "searching ranges": ("{% for i in range(100000) %}{% set x = 'a' in range(100000) %}{% endfor %}", STEPS),
    "testing ranges": ("{% for i in range(100000) %}{% set x = 'a' is in range(100000) %}{% endfor %}", STEPS),
    "counting in ranges": ("{% for i in range(100000) %}{% set x = range(100000).count(1.5) %}{% endfor %}", STEPS),
    "keys without keys": ("{% set d = dict.fromkeys(range(90000)) %}{% for i in range(100000) %}{% set x = d.keys() - d.keys() %}{% endfor %}", STEPS),
    "keys beside keys": ("{% set d = dict.fromkeys(range(90000)) %}{% for i in range(100000) %}{% set x = d.keys().isdisjoint(d.keys()) %}{% endfor %}", STEPS),
    "sums of lists": ("{{ range(100000) | batch(1) | list | sum(start=[]) | length }}", STEPS),
    # texts
    "a product": ("{{ 'a' * 1500000000 }}", TEXT),
    "a list's product": ("{{ (range(100000) | list * 40000) | length }}", TEXT),
    "doubling by ~": (grow("ns.x ~ ns.x", "'a'"), TEXT),
    "doubling by +": (grow("ns.x + ns.x", "'a'"), TEXT),
    "doubling by join": (grow("[ns.x, ns.x] | join", "'a'"), TEXT),
    "doubling through a macro": ("{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + grow("m(ns.x)", "'a'"), TEXT),
    "a macro's loop": ("{% macro m() %}{% for i in range(100000) %}{{ 'a' * 10000 }}{% endfor %}{% endmacro %}{{ m() | length }}", TEXT),
    "a block that is set": ("{% set y %}{% for i in range(100000) %}{{ 'a' * 10000 }}{% endfor %}{% endset %}{{ y | length }}", TEXT),
    "searching": (LONG + "{% for i in range(100000) %}{% set x = 'b' in a %}{% endfor %}", TEXT),
    "methods": (LONG + "{% for i in range(100000) %}{% set x = a.strip() %}{% endfor %}", TEXT),
    "how a text begins": (LONG + "{% for i in range(100000) %}{% set x = a.startswith(a) %}{% endfor %}", TEXT),
    "how a text ends": (LONG + "{% for i in range(100000) %}{% set x = a.endswith(('b', a)) %}{% endfor %}", TEXT),
    "what is left of a text": (LONG + "{% for i in range(100000) %}{% set x = a.removeprefix('a') %}{% endfor %}", TEXT),
    "trimming": (LONG + "{% for i in range(100000) %}{% set x = a | trim %}{% endfor %}", TEXT),
    "replacing": ("{{ ('a' * 100000) | replace('a', 'b' * 100000) }}", TEXT),
    "replacing nothing": ("{{ ('a' * 100000).replace('', 'b' * 100000) }}", TEXT),
    "joining": ("{{ ('x' * 100000).join(['a'] * 100000) }}", TEXT),
    "joining lazily": ("{{ range(100000) | join('x' * 100000) }}", TEXT),
    "indenting": ("{{ ('\\n' * 100000) | indent('x' * 100000) }}", TEXT),
    "tabulators": ("{{ ('\\t' * 10000).expandtabs(90000) }}", TEXT),
    "a field many times": ("{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}", TEXT),
    "a field many times, otherwise": ("{{ ('{0}' * 100000).format('x' * 100000) }}", TEXT),
    "deep JSON": (grow("[ns.x]", then="{% set z = [ns.x] * 100000 %}{{ z | tojson(indent=60) | length }}"), TEXT),
    # lists that hold themselves twice
    **{
        f"twice, {name}": (grow(step, start), TEXT)
        for name, step, start in [
            ("in a list", "[ns.x, ns.x]", "[1]"),
            ("in a tuple", "(ns.x, ns.x)", "(1,)"),
            ("in a dictionary", "{'a': ns.x, 'b': ns.x}", "[1]"),
            ("by dict()", "dict(a=ns.x, b=ns.x)", "[1]"),
            ("by items()", "dict(a=ns.x, b=ns.x).items()", "[1]"),
            ("by batch", "[ns.x, ns.x] | batch(2) | list", "[1]"),
            ("by slices", "[ns.x, ns.x, 1][:2]", "[1]"),
            ("by groupby", "[{'a': 1, 'b': ns.x}, {'a': 1, 'b': ns.x}] | groupby('a')", "[1]"),
            ("by map", "[ns.x, ns.x] | map('list') | list", "[1]"),
        ]
    },
    "twice, by +": (grow("ns.x + ns.x"), STEPS),
    "twice, in arguments": ("{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}{% endmacro %}{{ m(60, 1) }}", TEXT),
    # numbers that are sizes
    "a wide field": ("{{ '%1500000000d' % 1 }}", WIDE),
    "a wide field, by a filter": ("{{ '%1500000000d' | format(1) }}", WIDE),
    "a wide field, by an argument": ("{{ '%*d' % (1500000000, 1) }}", WIDE),
    "a wide field, by format": ("{{ '{:>1500000000}'.format(1) }}", WIDE),
    "a wide field, in a field": ("{{ '{:>{w}}'.format(1, w=1500000000) }}", WIDE),
    "a wide field, by attr": ("{{ ('{:>1500000000}' | attr('format'))(1) }}", WIDE),
    "center": ("{{ 'a' | center(1500000000) }}", WIDE),
    "ljust": ("{{ 'a'.ljust(1500000000) }}", WIDE),
    "zfill": ("{{ '1'.zfill(width=1500000000) }}", WIDE + "|keyword"),
    "indent": ("{{ 'a' | indent(1500000000, true) }}", WIDE),
    "batch": ("{{ 'abc' | batch(1500000000, 'x') | list | length }}", WIDE),
    "slice": ("{{ 'abc' | slice(1500000000) | list | length }}", WIDE),
    "round": ("{{ 7 | round(-1000000000) }}", WIDE),
    "bytes": ("{{ (1).to_bytes(1500000000, 'big') | length }}", WIDE),
    "tojson": ("{{ {'a': 1} | tojson(indent=1000000000) }}", "asks tojson for more than 64"),
    "powers": ("{{ 10 ** (10 ** 10) }}", BITS),
    "squares": (grow("ns.x * ns.x", "3"), BITS),
    "numbers from text": ("{{ ('f' * 1000000) | int(base=16) % 7 }}", BITS),
    # others
    "tags": ("{{ ('<!---->' * 100000) | striptags }}", "uses striptags on a text of more than 65536"),
    "punycode": ("{{ ('ä' * 100000).encode('punycode') }}", "encodes a text as 'punycode'"),
    "dates": ("{{ strftime_now('%Y' * 100000) }}", "asks for a date of more than 1000"),
    "chance": ("{{ ['a', 'b'] | random }}", "asks for chance"),
    "more chance": ("{{ lipsum(n=100000) }}", "'lipsum' is undefined"),
    "a namespace's text": (grow("namespace(p=ns.x, q=ns.x)"), "A namespace has no text"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_would_not_end_is_refused_by_its_limit(attack: str) -> None:
    """At load if it comes with every prompt, else with the message that brings it on."""
    source, words = ATTACKS[attack]
    template = ChatTemplate("{% if messages[0].content == 'boom' %}" + source + "{% endif %}")
    assert template.render([ChatMessage("user", "Hi")]) == ""
    with pytest.raises(TemplateRefused, match=words) as refused:
        template.render([ChatMessage("user", "boom")])
    assert len(refused.value.message) < 300


def test_a_template_that_never_ends_is_refused_at_load() -> None:
    with pytest.raises(LoadError, match=STEPS):
        ChatTemplate(forever(""))
    with pytest.raises(LoadError, match="has 2000000 characters; more than 1048576 are not read"):
        ChatTemplate("a" * 2_000_000)
    for source in ("{% for i in x %}" * 30 + "{% endfor %}" * 30, "{{ " + "(" * 5000 + ")" * 5000 + " }}"):
        with pytest.raises(LoadError, match="cannot be compiled"):
            ChatTemplate(source)


def test_the_first_renderings_happen_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has counted takes the child's time and memory, and not ours."""
    template_trial.check("{{ messages[0].content }}", None, SPECIAL)
    template_trial.check(None, None, {})
    with pytest.raises(LoadError, match=STEPS):
        template_trial.check("Hi", forever(""), {})
    monkeypatch.setattr(template_trial, "SECONDS", 0.1)
    with pytest.raises(LoadError, match="a process of its own, which took longer than 0"):
        template_trial.check(forever(""), None, {})


def test_a_budget_is_each_renderings_own() -> None:
    template = ChatTemplate("{% for i in range(60000) %}{{ i }}{% endfor %}")
    assert len({template.render([ChatMessage("user", "Hi")]) for _ in range(40)}) == 1


def test_a_templates_own_words_are_cut() -> None:
    template = ChatTemplate("{{ raise_exception('x' * 1000000) }}")
    with pytest.raises(TemplateRefused, match=r"refused: x{2000} …$"):
        template.render([ChatMessage("user", "Hi")])


def _conversations() -> dict[str, tuple[list[ChatMessage], list[Tool]]]:
    users = [ChatMessage("user" if i % 2 == 0 else "assistant", f"{i} " + "Wort " * 100) for i in range(2000)]
    properties = {f"p{i}": {"type": "object", "description": "-" * 60, "properties": {"q": {"type": "string"}}} for i in range(40)}  # fmt: skip
    tools = [
        Tool(f"t{i}", "-" * 300, {"type": "object", "properties": properties})
        for i in range(128)
    ]  # fmt: skip
    calls: list[ChatMessage] = []
    for i in range(500):
        call = ToolCall(f"{i:09d}", "t3", json.dumps({"p1": "x" * 100}))
        calls += [ChatMessage("user", "?"), ChatMessage("assistant", "", tool_calls=(call,))]
        calls += [ChatMessage("tool", "!" * 200, tool_call_id=f"{i:09d}"), ChatMessage("assistant", "So.")]
    return {
        "two thousand messages": ([*users, users[0]], []),
        "a long one": ([ChatMessage("user", "Wort\n" * 210_000)], []),
        "many tools": ([users[0]], tools),
        "many calls": ([*calls, users[0]], tools[:8]),
    }


CONVERSATIONS = _conversations()


@pytest.mark.slow
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ALL_TEMPLATES)
def test_long_conversations_have_room(name: str, conversation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth of the budget left over nine times: no published template comes near its end."""
    messages, tools = CONVERSATIONS[conversation]
    template = ChatTemplate(source_of(name), SPECIAL, clock)
    budgets: list[chat_template.Budget] = []

    def kept(*given: int) -> chat_template.Budget:
        budgets.append(chat_template_budget(*given))
        return budgets[-1]

    chat_template_budget = chat_template.Budget
    monkeypatch.setattr(chat_template, "Budget", kept)
    try:
        template.render(messages, tools=tools)
    except TemplateRefused as refused:
        own_words = "more than" not in refused.message  # it takes no tools, or no such turns
    else:
        own_words = True
    assert own_words
    for budget in budgets:
        assert budget.steps > 0.3 * budget._most_steps
        assert budget.characters > 0.3 * budget._most_characters
