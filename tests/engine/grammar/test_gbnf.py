"""Grammars in GBNF, llama.cpp's language: translated, tried in the child process, enforced; what is none is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from test_tool_grammar import HELLO, accepts, walk

from engine import LLM, Constraint, InvalidParameter, Tool
from engine.grammar.answer_grammar import answer_grammar

JSON = r"""
# JSON, as people write it in GBNF
root   ::= object
value  ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}"
array  ::= "[" ws ( value ("," ws value)* )? "]"
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}) )* "\""
number ::= "-"? ([0-9] | [1-9] [0-9]{1,5}) ("." [0-9]{1,5})?
ws ::= | " "
"""
CASES = [
    # a grammar, texts of it, texts that are none
    ('root ::= "yes" | "no"', ["yes", "no"], ["", "y", "yesno", "maybe"]),
    ('root ::= "a" [b-d]+ "."', ["ab.", "abcdb."], ["a.", "ae.", "ab"]),
    ('root ::= item ("," item){0,2}\nitem ::= [0-9]', ["1", "1,2,3"], ["1,", "1,2,3,4"]),
    ("root ::= line line\nline ::= . [^x]", ["\nab\n"], ["axbx", "ab"]),
    (r'root ::= "\u00e4\u0022\x41" [\u4e00-\u9fff]', ['ä"A漢'], ['ä"Aa', "u00e4"]),
    (r'root ::= "[\[\]]" "\\u0041"', [r"[[]]\u0041"], ["[]A"]),
    ('root ::= snake_case-name\nsnake_case-name ::= "x" # the end', ["x"], ["y"]),
    ("root ::= \"(\" root? \")\"", ["()", "((()))"], ["(()", ")("]),
    ('root ::= fooBar foo-bar foo_bar FOO-BAR\nfooBar ::= "1"\nfoo-bar ::= "2"\nfoo_bar ::= "3"\nFOO-BAR ::= "4"',
     ["1234"], ["1111", "4444"]),
    ('root ::= start end\nstart ::= "a" | "b" start\nend ::= Root\nRoot ::= "."', ["a.", "bba."], ["a", "b."]),
    ('root ::= r0 1 naïve\nr0 ::= "a"\n1 ::= "b"\nnaïve ::= "c"', ["abc"], ["ab"]),
    ('root ::= "x" "a"{0} [b]{0,0} . {0} (("c") "d"){ 0 } e{0} "y"\ne ::= "e"', ["xy"], ["xay", "xby", "xcdy", "xey"]),
    ('root ::= "a ::= {0}" # b ::= {0}', ["a ::= {0}"], ["a ::= "]),
]  # fmt: skip


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Path]) -> LLM:
    return LLM(tiny("qwen3"), cache_size="32MiB", context_length=512)


def grammar_of(llm: LLM, text: str) -> str:
    return answer_grammar(llm.engine.model.grammars, Constraint("gbnf", text, param="grammar")).text


@pytest.mark.parametrize(("grammar", "inside", "outside"), CASES, ids=[case[0][:25] for case in CASES])
def test_a_text_is_of_the_grammar_or_is_not(llm: LLM, grammar: str, inside: list[str], outside: list[str]) -> None:
    written = grammar_of(llm, grammar)
    assert [text for text in inside if not accepts(llm, written, text)] == []
    assert [text for text in outside if accepts(llm, written, text)] == []


def test_json_by_gbnf_is_json(llm: LLM) -> None:
    written = grammar_of(llm, JSON)
    assert accepts(llm, written, '{"a": [1, -2.5, "x\\u00e4"],"b": null}')
    texts = [walk(llm, written, random.Random(seed)) for seed in range(12)]
    found = [json.loads(text, strict=False) for text in texts if text is not None]
    assert found
    assert all(isinstance(value, dict) for value in found)


def test_a_reply_follows_it(llm: LLM) -> None:
    form = Constraint("gbnf", CASES[0][0], param="grammar")
    assert {llm.generate(HELLO, constraint=form, seed=seed)[0].text for seed in range(6)} <= {"yes", "no"}


BAD = [
    ("root ::= [a&&b]", "cannot be translated"),
    ("root ::= [^a--b]", "cannot be translated"),
    ('root ::= "a', "Unexpected end"),
    ("root ::= x", "'x' not found"),
    ('root ::= "x" y{0}', "'y' not found"),
    ('root ::= "x"){0}', "not opened"),
    ("root ::= {0}", "not valid GBNF"),
    ("root ::= [ab", "Unexpected end"),
    ('rule ::= "a"', "No 'root' rule"),
    (r'root ::= "\ud800"', "not valid GBNF"),
    ("root ::= <[7]>", "not valid GBNF"),
    ('root ::= "a"{²}', "not valid GBNF"),
    ("root ::= " + "(" * 5000, "not valid GBNF"),
    ("::= ", "not valid GBNF"),
    ("root ::= a\na ::= a", "grammar"),
]


@pytest.mark.parametrize(("grammar", "words"), BAD, ids=[case[0][:25] for case in BAD])
def test_what_is_no_gbnf_is_refused_by_its_field(llm: LLM, grammar: str, words: str) -> None:
    with pytest.raises(InvalidParameter, match=words) as caught:
        llm.generate(HELLO, constraint=Constraint("gbnf", grammar, param="ebnf"), max_tokens=3)
    assert caught.value.param == "ebnf"


def test_it_is_a_whole_grammar_and_goes_with_no_tools(llm: LLM) -> None:
    with pytest.raises(InvalidParameter, match="cannot be combined with tools"):
        llm.generate(HELLO, constraint=Constraint("gbnf", CASES[0][0], param="grammar"), tools=[Tool("f")])
