"""A grammar costs its own request something, or is refused by name: it never costs the server or anybody else."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_grammar_paths import LINKS, chain

from engine import LLM, Constraint, GenerationRequest, InvalidParameter, Tool
from engine.confined.process import Confined, ConfinedFault
from engine.errors import Unavailable
from engine.grammar import trial as grammar_trial
from engine.grammar.answer_grammar import MAX_CHOICES
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.paths import MAX_PATH, schema_path
from engine.grammar.reply_grammar import GrammarSource
from engine.grammar.token_table import TokenTable
from engine.grammar.trial import GrammarTrial
from engine.replies.reasoning import ReasoningFormat
from engine.replies.tool_format import GENERIC


@pytest.fixture(scope="module")
def compiler(tiny: Callable[[str], Path]) -> GrammarCompiler:
    return LLM(tiny("qwen3"), cache_size="32MiB", context_length=512).engine.model.grammars


@pytest.fixture(scope="module")
def trial(compiler: GrammarCompiler) -> Iterator[GrammarTrial]:
    made = GrammarTrial(compiler)
    yield made
    made.close()


def properties(count: int, **also: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"property_{i}": {"type": "string"} for i in range(count)}, **also}


def json_form(schema: Any, *, strict: bool = True) -> GrammarSource:
    return GrammarSource(Constraint("json", schema, strict, "guided_json"))


def regex(pattern: str) -> GrammarSource:
    return GrammarSource(Constraint("regex", pattern, param="guided_regex"))


def lark(text: str) -> GrammarSource:
    return GrammarSource(Constraint("grammar", text, param="guided_grammar"))


def choice(count: int) -> GrammarSource:
    return GrammarSource(Constraint("choice", [f"choice {i}" for i in range(count)], param="guided_choice"))


def tools(schema: dict[str, Any], count: int = 1) -> GrammarSource:
    return GrammarSource(None, tuple(Tool(f"t{i}", None, schema, True) for i in range(count)), GENERIC)


def unseen_chain(links: int) -> dict[str, Any]:
    """References that only a resolver of relative names can follow, so that no bound is put on them beforehand."""
    definitions = {
        f"d{i}": {"$id": f"http://example.com/d{i}", "properties": {"a": {"$ref": f"d{i + 1}"}}} for i in range(links)
    }
    return {"$defs": {**definitions, f"d{links}": {"$id": f"http://example.com/d{links}"}}, "$ref": "d0",
            "$id": "http://example.com/root"}  # fmt: skip


ATTACKS = {
    # name: (form, code, field, what is said)
    "chain of references": (json_form(chain("reference", 4000)), "grammar_too_deep", "guided_json", "4,001 .* 250"),
    "chain of properties": (json_form(chain("property", 1000)), "grammar_too_deep", "guided_json", "2,001 .* 250"),
    "chain in a tool": (
        tools({"type": "object", "properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": chain("items", 999)["$defs"]}),
        "grammar_too_deep", "tools.0.function.parameters", "2,000 parts.* 250",
    ),
    "chain of rules": (
        lark("start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1} | r{i + 1}' for i in range(8000)) + '\nr8000: "b"'),
        "grammar_too_deep", "guided_grammar", "8,001 rules.* 250",
    ),
    "chain that nobody sees": (json_form(unseen_chain(1500)), "grammar_too_costly", "guided_json", "1.5 MiB of stack"),
    "expression that takes gigabytes": (
        regex("(a|b)?" * 40_000), "grammar_too_costly", "guided_regex", "than 512 MiB|longer than",
    ),
    "expression that is many": (regex("(a|b)?" * 500), "grammar_too_costly", "guided_regex", "max is 200,000"),
    "counts of counts": (
        regex("(((a{1,1000}){1,1000}){1,1000}){1,1000}"), "grammar_too_costly", "guided_regex", "max is 200,000",
    ),
    "intersection": (
        lark("start: T\nT: " + " & ".join(f"/((.|\\n){{{p}}})*/" for p in (7, 11, 13, 17, 19, 23))),
        "grammar_too_costly", "guided_grammar", "longer than|MiB",
    ),
    "overlapping terminals": (
        lark("start: (" + " | ".join(f"T{i}" for i in range(1500)) + ")*\n"
             + "\n".join(f"T{i}: /a[^{'bcdefg'[i % 6]}]*{i}/" for i in range(1500))),
        "grammar_too_costly", "guided_grammar", "max is 200,000",
    ),
    "many optional rules": (
        lark("start: " + "a? " * 2000 + '\na: "x" | "y"'), "grammar_too_costly", "guided_grammar", "max is 2000",
    ),
    "many properties": (json_form(properties(6000)), "grammar_too_costly", "guided_json", "longer than|to compile"),
    "too many properties": (json_form(properties(700)), "grammar_too_costly", "guided_json", "row .* max is 2000"),
    "many choices": (choice(MAX_CHOICES + 1), "invalid_parameter", "guided_choice", "1,901 choices; at most 1,900"),
    "tools of a megabyte": (tools(properties(3000), 12), "invalid_parameter", "tools", "at most 1,000,000"),
    "deep": (
        json_form(json.loads('{"items":' * 300 + "{}" + "}" * 300)), "invalid_parameter", "guided_json", "100 levels",
    ),
}  # fmt: skip

HONEST = {
    "300 optional properties": json_form(properties(300)),
    "300 properties and no others": json_form(properties(300, additionalProperties=False)),
    "400 required properties": json_form(
        properties(400, required=[f"property_{i}" for i in range(400)], additionalProperties=False)
    ),
    "groups of properties": json_form({"type": "object", "properties": {f"g{i}": properties(15) for i in range(20)}}),
    "an enum of a thousand": json_form({"enum": [f"value number {i}" for i in range(1000)]}),
    "a thousand choices": choice(1000),
    "forty tools": tools(properties(20, additionalProperties=False), 40),
    "a tree": json_form({"$defs": {"t": {"properties": {"l": {"$ref": "#/$defs/t"}, "r": {"$ref": "#/$defs/t"}}}},
                         "$ref": "#/$defs/t"}),
    "thirty kinds that hold each other": json_form(
        {"$defs": {f"n{i}": {"type": "object", "properties": {f"p{j}": {"$ref": f"#/$defs/n{j}"} for j in range(30)}}
                   for i in range(30)}, "$ref": "#/$defs/n0"}
    ),
    "a long text": json_form({"type": "string", "minLength": 1, "maxLength": 10_000}),
    "a long constant": json_form({"const": "word " * 40_000}),
    "formats": json_form({"properties": {f"p{i}": {"type": "string", "format": form} for i, form in enumerate(
        ["date-time", "email", "uuid", "ipv6", "uri", "hostname"])}}),
    "a counted class": regex(r"\w{1,500}( \w{1,50}){0,40}"),
    "a hundred thousand": regex("[a-z]{1,100000}"),
    "dots": regex(".*a.{200}"),
    "words in any order": lark("start: T\nT: " + " & ".join(f"/(.|\\n)*{w}(.|\\n)*/" for w in ("red", "blue"))),
    "arithmetic": lark('start: e\ne: t ("+" t)*\nt: f ("*" f)*\nf: /[0-9]+/ | "(" e ")"'),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_what_costs_too_much_is_refused_by_name_and_costs_nothing_again(
    trial: GrammarTrial, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, code, param, said = ATTACKS[name]
    with pytest.raises(InvalidParameter, match=said) as raised:
        trial.grammar(form)
    assert (raised.value.code, raised.value.param) == (code, param)
    assert len(raised.value.message) < 500
    monkeypatch.setattr(Confined, "call", _no_call)
    with pytest.raises(InvalidParameter) as again:
        trial.grammar(form)
    assert again.value.message == raised.value.message


@pytest.mark.parametrize("name", HONEST)
def test_what_is_large_and_honest_is_served(
    trial: GrammarTrial, compiler: GrammarCompiler, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trial.grammar(HONEST[name])
    assert not made.unenforced
    assert not compiler.start(made.text).stopped
    monkeypatch.setattr(Confined, "call", _no_call)
    assert trial.grammar(HONEST[name]) == made


@pytest.mark.parametrize("kind", LINKS)
def test_the_longest_path_that_is_allowed_fits_the_stack(trial: GrammarTrial, kind: str) -> None:
    """The child compiles on less stack than any thread of the server has; a crash there has a code of its own."""
    schema = chain(kind, (MAX_PATH - 1) // LINKS[kind][1])
    assert MAX_PATH - 4 < schema_path(schema) <= MAX_PATH
    code = ""
    try:
        trial.grammar(json_form(schema, strict=False))
    except InvalidParameter as error:
        code = error.code
    assert code in ("", "schema_not_enforceable")


def test_the_longest_chain_of_rules_that_is_allowed_fits_the_stack(trial: GrammarTrial) -> None:
    for name in ("r", "T"):
        rules = "\n".join(f'{name}{i}: "a" {name}{i + 1} | {name}{i + 1}' for i in range(MAX_PATH - 1))
        trial.grammar(lark(f'start: {name}0\n{rules}\n{name}{MAX_PATH - 1}: "b"'))


@pytest.fixture(scope="module")
def many_scripts() -> Any:
    """What a trial needs, for a vocabulary with the letters of all scripts: steps need more fuel, as with real ones."""
    letters = [chr(i).encode() for i in (*range(0x80, 0xD800), *range(0xE000, 0xFFFF))]
    words = [bytes(word) for word in itertools.product(b"abcdeilnorstuw ./:", repeat=3)]
    tokens = [*(bytes([i]) for i in range(256)), *letters, *words, b"\xff<|end|>"]
    end = len(tokens) - 1
    return grammar_trial.keep(TokenTable(tokens, [end], {"<|end|>": end}, [end]).as_json())


@pytest.mark.parametrize(
    "pattern", [r"https?://[\w.-]+(:\d{1,5})?(/[\w./?%&=#~-]*)?", r"[\p{Lu}][\p{L}'-]+( [\p{Lu}][\p{L}'-]+){0,3}"]
)
def test_expressions_with_unicode_classes_are_served(many_scripts: Any, pattern: str) -> None:
    assert "text" in grammar_trial.made(json.dumps(regex(pattern).as_json()), many_scripts)


def test_what_comes_after_a_long_constant_is_tried_too(many_scripts: Any) -> None:
    """Forced tokens are skipped, not counted: they neither end the walk nor make what follows look cheap."""
    bomb = f"start: {json.dumps('w ' * 2000)} T\nT: /((a{{1,1000}}){{1,1000}}){{1,1000}}/"
    outcome = grammar_trial.made(json.dumps(lark(bomb).as_json()), many_scripts)
    assert outcome["code"] == "grammar_too_costly"
    assert "goes beyond the limits of a step" in outcome["message"]


def test_an_outcome_is_kept_within_bounds(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointers of keywords that are not enforced may be a thousand times longer than their schema."""
    schema: Any = {"properties": {f"p{i}": {"type": "array", "uniqueItems": True} for i in range(800)}}
    for _ in range(10):
        schema = {"type": "object", "properties": {"k" * 1000: schema}}
    made = GrammarTrial(compiler)
    monkeypatch.setattr(grammar_trial, "_KEPT", 300_000)
    try:
        for i in range(5):
            found = made.grammar(json_form({**schema, "title": f"{i}"}, strict=False))
            assert found.unenforced
            assert len(json.dumps(found.unenforced)) < 10_000
        assert 0 < made._size <= 300_000
        assert made._size == sum(size for _, size in made._outcomes.values())
    finally:
        made.close()


def test_what_the_machine_may_be_to_blame_for_is_not_kept(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = [ConfinedFault("took longer than 20 seconds", passing=True), ConfinedFault("ended by SIGSEGV")]

    def call(*_: Any) -> None:
        raise answers[0]

    monkeypatch.setattr(Confined, "call", call)
    made = GrammarTrial(compiler)
    for said in ("20 seconds", "too deeply", "too deeply"):
        with pytest.raises(InvalidParameter, match=said):
            made.grammar(regex("a"))
        if len(answers) > 1:
            answers.pop(0)


def test_nobody_waits_for_another_ones_grammar(trial: GrammarTrial) -> None:
    bomb = lark("start: T\nT: " + " & ".join(f"/((.|\\n){{{p}}})*/" for p in (29, 31, 37, 41, 43)))
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(trial.grammar, bomb)
        trial.grammar(regex("honest[a-z]+"))
        assert not slow.done(), "the bomb is still tried while the other is answered"
        with pytest.raises(InvalidParameter):
            slow.result()


def test_any_json_object_needs_no_child(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Confined, "call", _no_call)
    assert GrammarTrial(compiler).grammar(json_form(True)).text


def test_a_fault_of_ours_is_no_fault_of_the_request(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that does not start, or is closed under a request, is told as such, and is not kept as an outcome."""
    made = GrammarTrial(compiler)
    made.close()
    for _ in range(2):
        with pytest.raises(Unavailable, match="closed"):
            made.grammar(regex("a"))


def test_a_request_is_refused_before_it_is_queued(tiny: Callable[[str], Path]) -> None:
    """The preparer, with all that a request brings, tries its grammar."""
    llm = LLM(tiny("qwen3"), cache_size="32MiB", context_length=512)
    with pytest.raises(InvalidParameter, match="leads through"):
        llm.generate("say", constraint=Constraint("json", chain("reference", 4000)))
    request = GenerationRequest(request_id="1", prompt="say", constraint=Constraint("regex", "(a|b)?" * 40_000))
    with pytest.raises(InvalidParameter) as raised:
        llm.engine.prepare(request)
    assert raised.value.code == "grammar_too_costly"
    [answer] = llm.generate("say", constraint=Constraint("choice", ["yes"]))
    assert answer.text == "yes"
    llm.close()


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("_COMPILE_SECONDS", r"takes [\d.]+ seconds to compile; at most 0"),
        ("_STEP_SECONDS", r"takes [\d.]+ seconds for one token; at most 0"),
        ("_WALK_SECONDS", r"takes [\d.]+ seconds for \d+ tokens; at most 0 for 16"),
    ],
)
def test_each_bound_on_time_is_named(
    compiler: GrammarCompiler, limit: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_trial, limit, -1.0 if limit == "_COMPILE_SECONDS" else 0.0)
    kept = grammar_trial.keep(compiler.table().as_json())
    slow = "start: " + "a? " * 300 + '\na: "x" | "y"'
    outcome = grammar_trial.made(json.dumps(lark(slow).as_json()), kept)
    assert re.search(said.replace("at most 0", "at most -1") if "compile" in said else said, outcome["message"])
    assert outcome["code"] == "grammar_too_costly"


def test_a_form_and_a_vocabulary_cross_whole(compiler: GrammarCompiler) -> None:
    thoughts = ReasoningFormat("<a>", "</a>", "</a>\n", asides=("<b>",))
    form = dataclasses.replace(
        tools(properties(2)), constraint=Constraint("choice", ["a"], False, "x"), reasoning=thoughts, thinking=True
    )
    for one in (form, json_form({"é": ["\ud800", 1.5, None]}), regex("a")):
        assert GrammarSource.from_json(json.loads(json.dumps(one.as_json()))) == one
    table = compiler.table()
    assert TokenTable.from_json(json.loads(json.dumps(table.as_json()))) == table


def test_threads_and_processes_stay_as_many(trial: GrammarTrial) -> None:
    trial.grammar(regex("before"))
    threads, files = threading.active_count(), len(os.listdir("/dev/fd"))
    for i in range(30):
        trial.grammar(regex(f"[a-c]{{{i + 1}}}"))
    assert threading.active_count() == threads
    assert len(os.listdir("/dev/fd")) == files


def _no_call(*_: Any) -> None:
    raise AssertionError("the child is asked again")
