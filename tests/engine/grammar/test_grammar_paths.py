"""A chain that the compiler would follow to the end of its stack is measured before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, strategies as st

from engine.errors import InvalidParameter
from engine.grammar.paths import MAX_PATH, check_rules, check_schema_path, longest_path, rules_of, schema_path

LINKS: dict[str, tuple[Callable[[Any], Any], int]] = {
    # one link of a chain, and the steps that it takes
    "reference": (lambda next_: next_, 1),
    "property": (lambda next_: {"type": "object", "properties": {"a": next_}, "required": ["a"]}, 2),
    "items": (lambda next_: {"type": "array", "items": next_}, 2),
    "prefix": (lambda next_: {"type": "array", "prefixItems": [{}, next_]}, 2),
    "either": (lambda next_: {"anyOf": [{"type": "null"}, next_]}, 2),
    "one": (lambda next_: {"oneOf": [next_, {"type": "null"}]}, 2),
    "all": (lambda next_: {"allOf": [next_, {"type": "object"}]}, 2),
    "not": (lambda next_: {"not": next_}, 2),
    "additional": (lambda next_: {"type": "object", "additionalProperties": next_}, 2),
    "pattern": (lambda next_: {"patternProperties": {"^a": next_}}, 2),
    "names": (lambda next_: {"propertyNames": next_}, 2),
    "dependent": (lambda next_: {"dependentSchemas": {"a": next_}}, 2),
    "mixed": (lambda next_: {"properties": {"a": {"anyOf": [{}, {"type": "array", "items": next_}]}}}, 4),
}
REFERENCES: dict[str, Callable[[int], tuple[str, dict[str, Any]]]] = {
    # how link i is referred to, and what it says of itself
    "pointer": lambda i: (f"#/$defs/d{i}", {}),
    "escaped": lambda i: (f"#/%24defs/d{i}", {}),
    "anchor": lambda i: (f"#a{i}", {"$anchor": f"a{i}"}),
    "id": lambda i: (f"http://example.com/{i}", {"$id": f"http://example.com/{i}"}),
}


def chain(kind: str, links: int, reference: str = "pointer") -> dict[str, Any]:
    link, _ = LINKS[kind]
    name = REFERENCES[reference]
    definitions = {f"d{i}": {**link({"$ref": name(i + 1)[0]}), **name(i)[1]} for i in range(links)}
    definitions[f"d{links}"] = {"type": "string", **name(links)[1]}
    return {"$defs": definitions, "$ref": name(0)[0]}


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("kind", LINKS)
def test_a_chain_has_the_length_of_its_links(kind: str, reference: str) -> None:
    for links in (0, 1, 7, 3000):
        assert schema_path(chain(kind, links, reference)) == 1 + links * LINKS[kind][1]
    with pytest.raises(
        InvalidParameter, match=rf"leads through [\d,]+ parts.*at most {MAX_PATH} are allowed"
    ) as raised:
        check_schema_path(chain(kind, 3000, reference), "here")
    assert raised.value.details["limit"] == MAX_PATH
    assert raised.value.param == "here"


def test_what_is_not_referred_to_and_what_leads_back_is_no_path() -> None:
    loop = {"$defs": {"t": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/t"}}]}}}
    assert schema_path({**loop, "$ref": "#/$defs/t"}) == 3
    assert schema_path(loop) == 0
    assert schema_path({"$ref": "#"}) == 0
    assert schema_path(True) == 0
    wide = {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)}, "type": "string"}
    assert schema_path(wide) == 0


def test_honest_schemas_and_grammars_are_far_from_the_limit() -> None:
    node = {"type": "object", "properties": {f"p{i}": {"anyOf": [{"$ref": f"#/$defs/n{i}"}, {}]} for i in range(30)}}
    tree = {"$defs": {f"n{i}": node for i in range(30)}, "$ref": "#/$defs/n0"}
    assert schema_path(tree) <= 100
    check_schema_path(tree, "here")
    deep: dict[str, Any] = {}
    for _ in range(49):
        deep = {"type": "object", "properties": {"a": deep}}
    assert schema_path(deep) == 49


@pytest.mark.parametrize(
    ("lark", "rules"),
    [
        ('start: a B | "c: d" e\na: B // x: y\nB: /[/"]:e/', {"start": ["a", "B", "e"], "a": ["B"], "B": []}),
        ('start: "\\": x: " a\n  | b\n?b: c', {"start": ["a", "b"], "b": ["c"]}),
        ('start: a\na[suffix="x: y", capture]: /b:(c|\\/d: e)/ f\nf.5: g', {"start": ["a"], "a": ["f"], "f": ["g"]}),
        ('start: v\nv: %json {"a": {"type": [true]}}\nw: v', {"start": ["v"], "v": ["json", "true"], "w": ["v"]}),
        ("start: <[12-15]> a{2,3} (b | c)*\n%ignore W\n# d: e", {"start": ["a", "b", "c", "ignore", "W"]}),
    ],
)
def test_the_names_in_a_grammar(lark: str, rules: dict[str, list[str]]) -> None:
    assert rules_of(lark) == rules


@pytest.mark.parametrize("body", ['"a" {} | {}', "{}?", "({} | /x:/)", '"{{" {}  // {}: {}'])
def test_a_chain_of_rules_is_refused(body: str) -> None:
    def lark(links: int, name: str) -> str:
        rules = [f"{name}{i}: " + body.replace("{}", f"{name}{i + 1}") for i in range(links)]
        return "\n".join([f"start: {name}0", *rules, f'{name}{links}: "b"'])

    for name in ("r", "T"):
        check_rules(lark(MAX_PATH - 1, name), "here")
        with pytest.raises(InvalidParameter, match=rf"leads through 8,001 rules.*at most {MAX_PATH}"):
            check_rules(lark(8000, name), "here")


GRAPHS = st.integers(1, 8).flatmap(
    lambda n: st.fixed_dictionaries({i: st.lists(st.integers(0, n - 1), max_size=4) for i in range(n)})
)


@given(GRAPHS)
def test_the_longest_path_is_that_of_a_recursion(graph: dict[int, list[int]]) -> None:
    """Without a cycle it is exact; with one it is no longer than any path can be, nor shorter than a walk goes deep."""

    def longest(node: int, before: frozenset[int]) -> int:
        before |= {node}
        return max((1 + longest(other, before) for other in graph[node] if other not in before), default=0)

    def walk(node: int, seen: set[int]) -> int:
        seen.add(node)
        return max([1 + walk(other, seen) for other in graph[node] if other not in seen], default=0)

    found = longest_path(graph, 0)
    assert walk(0, set()) <= found <= longest(0, frozenset())
    acyclic = {node: [other for other in others if other > node] for node, others in graph.items()}
    graph = acyclic
    assert longest_path(acyclic, 0) == longest(0, frozenset())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["#", "#/$defs/a", "#/a/0", "%", "#x", "#/items/items"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["$ref", "$defs", "a", "items", "properties", "anyOf", "$anchor", "$id", "not"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_has_a_path(value: Any) -> None:
    assert schema_path(value) >= 0


@given(st.text(max_size=200) | st.text(alphabet='ab:"/\\[](){}%|\n #', max_size=200))
def test_any_text_has_rules(text: str) -> None:
    assert all(isinstance(name, str) for names in rules_of(text).values() for name in names)
    check_rules(text, "here")
