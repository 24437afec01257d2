"""Jinja's sandbox with an end to each rendering: whatever loops, grows or amplifies is counted. Knows no messages.

Three places, which together leave none out:

    the tree      each turn of a loop and each body of a macro counts its nodes; each text that is joined or compared
                  counts its length; each list that is written down has its weight noted
    operators     counted before they run, by the sizes of both sides (`+`, `*`, `**`, `%`, …)
    calls         filters, tests, methods and functions: what they take is counted before, what they return after; those
                  that make much of little (`center`, `replace`, `join`, `format`) are computed beforehand

Nothing here changes what a template writes.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import BuiltinMethodType, GeneratorType, MethodType
from typing import Any, Final, cast

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from markupsafe import soft_str

from engine.template_budget import MOST_BITS, MOST_WIDTH, Budget, OverBudget, current

__all__ = ["BoundedEnvironment"]

_FORMAT: Final = re.compile(r"\d+")
_CALL: Final = 20  # steps: it takes about as long as so many nodes
_PER_ENTRY: Final = 4  # steps
_SHORT: Final = 1 << 16  # characters
_MOST_INDENT: Final = 64
_ENCODINGS: Final = frozenset({"utf-8", "utf8", "ascii", "latin-1"})

_FREE: Final = frozenset({"length", "count", "first", "last", "default", "d", "items", "attr", "safe", "abs", "float"})
"""Filters that take as long for a long value as for a short one."""
_PLAIN: Final = frozenset({"string", "upper", "lower", "capitalize", "e", "escape", "forceescape"})
"""Those that make of a text another about as long."""
_LAZY: Final = frozenset({"map", "select", "selectattr", "reject", "rejectattr", "batch", "slice"})
"""Those that return a generator, which is counted as it is used."""
_SHALLOW: Final = _LAZY | {"list", "reverse", "join"}
"""Those that do not look inside the values of a list."""
_SORTING: Final = frozenset({"sort", "unique", "groupby", "dictsort", "min", "max"})
_SIZED: Final = frozenset({"center", "indent", "batch", "slice", "truncate", "round", "wordwrap", "urlize"})
"""Those whose numbers are sizes."""
_SLOW: Final = frozenset({"pprint", "striptags", "urlize", "wordwrap", "xmlattr", "wordcount", "urlencode", "title"})
"""Those for web pages. Some take a time that grows with the square of the text's length."""
_COMPARING: Final = frozenset(
    {
        *("in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=", "<", "lt", "lessthan", "<="),
        "le",
    }
    | {"lower", "upper"}
)
_QUICK: Final = frozenset({"get", "items", "keys", "values", "startswith", "endswith", "removeprefix", "removesuffix"})
"""Methods that look at a part of their text, or at none."""
_PLACES: Final = frozenset(
    {*("find", "rfind", "index", "rindex", "count", "startswith", "endswith", "split", "rsplit", "replace", "get")}
)
"""Methods whose numbers are places or bounds, and not sizes."""


_OF_THE_COMPILER: Final = ("_loop_vars", "_block_vars")
"""Arguments that Jinja's compiler adds to calls, for functions that ask for the context."""


_OF_DICTIONARIES: Final = frozenset(dir(dict))


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox that renders within `current`, a `Budget`; a template runs nowhere else."""

    intercepted_binops = frozenset({"*", "**", "%"})  # a sum is counted by `_add`; the others only get smaller

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals.pop("lipsum", None)
        for name, function in list(self.filters.items()):
            self.filters[name] = _bounded_filter(name, function)
        self.filters |= {"tojson": _tojson, "trim": _trim, "random": _no_chance}
        for name in _COMPARING:
            test: Any = self.tests[name]
            self.tests[name] = _bounded_test(test)
        for own in (_tick, _tested, _weigh, _add, _in, _made, _sliced):
            self.filters[own.__name__] = own

    def bounded(self, source: str) -> jinja2.Template:
        """Compile a template with the counting built in."""
        return self.from_string(_Counting().visit(self.parse(source)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current.get()
        if operator == "%":
            if isinstance(left, str):
                _check_format(budget, left, right, "%")
        elif operator == "*":
            self._check_product(budget, left, right)
        elif type(left) is int and type(right) is int and left.bit_length() * max(right, 0) > MOST_BITS:
            raise OverBudget(f"makes a number of more than {MOST_BITS} bits")
        return budget.made(self.binop_table[operator](left, right))

    def _check_product(self, budget: Budget, left: Any, right: Any) -> None:
        for one, other in ((left, right), (right, left)):
            if isinstance(one, str | bytes | list | tuple) and isinstance(other, int):
                size = len(one) * max(other, 0)
                budget.spend(size)
                if isinstance(one, list | tuple):
                    budget.step(size)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = current.get()
        budget.steps -= _CALL
        if budget.steps < 0:
            budget.end()
        kind = type(__obj)
        if kind is BuiltinMethodType:
            for name in _OF_THE_COMPILER:
                kwargs.pop(name, None)
            if __obj.__name__ in _QUICK:
                return __obj(*args, **kwargs)
            return budget.made(__obj(*_check_method(budget, __obj, args, kwargs), **kwargs))
        if kind is Macro:
            text = __context.call(__obj, *args, **kwargs)
            budget.characters -= len(text)
            if budget.characters < 0:
                budget.end()
            return text
        for value in (*args, *(kwargs[name] for name in kwargs if name not in _OF_THE_COMPILER)):
            budget.spend_on(value)
        return budget.made(super().call(__context, __obj, *args, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As in Jinja, with a short way to what templates ask for most, which makes up for the counting."""
        if type(obj) is dict and attribute in obj and attribute not in _OF_DICTIONARIES:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if not isinstance(value, BuiltinMethodType | MethodType):
            return None
        formatting = super().wrap_str_format(value)
        if formatting is None:
            return None

        @functools.wraps(formatting)
        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(current.get(), str(value.__self__), (*args, *kwargs.values()), "{")
            return formatting(*args, **kwargs)

        return bounded


# -- the tree --------------------------------------------------------------------------------------------------------


class _Counting(NodeTransformer):
    """Build the counting into a template's tree.

    What is written outside of macros and the like goes straight into the prompt, where it is counted.
    """

    def __init__(self) -> None:
        self._kept = 0  # how many macros and the like are around: their text is kept, and may be written many times

    def visit_Template(self, node: nodes.Template) -> nodes.Node:
        return self._body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._body(node, kept=True)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._body(node, kept=True)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._body(node, kept=True)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        return self._body(node, kept=True)

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> nodes.Node:
        return self._body(node, kept=True)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        test = node.test
        self._body(node)
        if test is not None:  # it runs for the turns that it leaves out, too
            node.test = _filter(cast(nodes.Expr, node.test), "_tested", nodes.Const(_cost([test])[0]))
        return node

    def _body(self, node: Any, *, kept: bool = False) -> nodes.Node:
        steps, characters = _cost(node.body)
        self._kept += kept
        self.generic_visit(node)
        self._kept -= kept
        tick = _filter(nodes.Const(steps), "_tick", nodes.Const(characters))
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return cast(nodes.Node, node)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        if self._kept:
            self.generic_visit(node)
            node.nodes = [part if isinstance(part, nodes.TemplateData) else _weighed(part) for part in node.nodes]
        else:
            node.nodes = [self._written(part) for part in node.nodes]
        return node

    def _written(self, node: nodes.Expr) -> nodes.Expr:
        """What goes straight into the prompt: a few texts in a row need not be counted twice."""
        if isinstance(node, nodes.Concat) and len(node.nodes) <= _FEW:
            node.nodes = [self.visit(part) for part in node.nodes]
            return node
        parts = _summands(node)
        if not 1 < len(parts) <= _FEW:
            return self.visit(node)  # type: ignore[no-any-return]
        first, *rest = (self.visit(part) for part in parts)
        total: nodes.Expr = first
        for part in rest:
            total = nodes.Add(total, part, lineno=node.lineno)
        return total

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_weighed(part) for part in node.nodes]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        parts = [self.visit(part) for part in _summands(node)]
        if len(parts) == 2 and any(isinstance(p, nodes.Const) and isinstance(p.value, int) for p in parts):
            return nodes.Add(*parts, lineno=node.lineno)  # a number
        return _filter(parts[0], "_add", *parts[1:])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        [first, *rest] = node.ops
        if first.op in ("in", "notin") and not rest:
            if _is_constant(first.expr):
                return node  # as short as what is written down
            found = _filter(node.expr, "_in", first.expr)
            return found if first.op == "in" else nodes.Not(found, lineno=node.lineno)
        sides = [node.expr, *(part.expr for part in node.ops)]
        if not rest and any(_is_constant(side) for side in sides):
            return node
        node.expr = _weighed(node.expr)
        for part in node.ops:
            part.expr = _weighed(part.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _filter(node.node, "_sliced", *(bound or nodes.Const(None) for bound in bounds))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._container(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._container(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._container(node) if node.ctx == "load" else node

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        """What a macro was given beside its parameters: a tuple and a dictionary that nobody has counted."""
        return _filter(node, "_made") if node.ctx == "load" and node.name in ("varargs", "kwargs") else node

    def _container(self, node: Any) -> nodes.Node:
        if _is_constant(node):
            return node  # type: ignore[no-any-return]
        self.generic_visit(node)
        return _filter(node, "_made")


def _filter(node: nodes.Expr | None, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno if node is not None else 1)


def _weighed(node: nodes.Expr) -> nodes.Expr:
    return node if _is_constant(node) else _filter(node, "_weigh")


def _is_constant(node: nodes.Node) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(_is_constant(item) for item in node.items)
    if isinstance(node, nodes.Dict):
        return all(_is_constant(pair.key) and _is_constant(pair.value) for pair in node.items)
    return isinstance(node, nodes.Const)


_FEW: Final = 4


def _summands(node: nodes.Expr) -> list[nodes.Expr]:
    parts = []
    while isinstance(node, nodes.Add):
        parts.append(node.right)
        node = node.left
    return [node, *reversed(parts)]


_COUNTED: Final = (nodes.For, nodes.Macro, nodes.Block, nodes.CallBlock, nodes.AssignBlock, nodes.FilterBlock)


def _cost(body: Sequence[nodes.Node]) -> tuple[int, int]:
    """Nodes and characters of a body, without the bodies inside it that are counted by themselves."""
    steps = characters = 0
    left: list[nodes.Node] = list(body)
    while left:
        node = left.pop()
        steps += 1
        if isinstance(node, nodes.TemplateData):
            characters += len(node.data)
        elif isinstance(node, nodes.Const) and isinstance(node.value, str):
            characters += len(node.value)
        own = isinstance(node, _COUNTED)
        left += node.iter_child_nodes(exclude=("body",) if own else None)
    return 1 + steps, characters


# -- what the tree calls: filters, because nothing else is called as quickly ------------------------------------------


def _tick(steps: int, characters: int) -> None:
    budget = current.get()
    budget.steps -= steps
    budget.characters -= characters
    if budget.steps < 0 or budget.characters < 0:
        budget.end()


def _tested(value: Any, steps: int) -> Any:
    current.get().step(1 + steps)
    return value


def _weigh(value: Any) -> Any:
    budget = current.get()
    budget.characters -= len(value) if type(value) is str else budget.weight(value)
    if budget.characters < 0:
        budget.end()
    return value


_ONLY_TEXT: Final = {str}


def _add(*values: Any) -> Any:
    budget = current.get()
    if {*map(type, values)} == _ONLY_TEXT:
        text = "".join(values)
        budget.characters -= len(text)
        if budget.characters < 0:
            budget.end()
        return text
    total = values[0]
    for value in values[1:]:
        for side in (total, value):
            if isinstance(side, list | tuple):
                budget.step(len(side))
        total = budget.made(total + value)
    return total


def _in(value: Any, where: Any) -> bool:
    budget = current.get()
    if type(where) is str:
        budget.characters -= len(where)
        if budget.characters < 0:
            budget.end()
    elif type(where) is not dict and type(where) is not range:  # those are not gone through
        budget.spend_on(where)
        if isinstance(where, list | tuple):
            budget.step(len(where))
    return value in where


def _made(value: Any) -> Any:
    return current.get().made(value)


def _sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    budget = current.get()
    part = value[start:stop:step]
    if isinstance(part, str):
        budget.spend(len(part))
    elif isinstance(part, list | tuple):
        budget.step(len(part))
        if budget.noted(value):
            budget.made(part)
    return part


# -- filters and tests -----------------------------------------------------------------------------------------------


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts what it takes and what it makes."""
    if name in _FREE:
        return function
    first = 0 if getattr(function, "jinja_pass_arg", None) is None else 1  # where its value stands
    if name in _PLAIN:
        return _bounded_text(function, first)
    before = _BEFORE.get(name)
    shallow, sized = name in _SHALLOW, name in _SIZED
    per_entry = 10 if name in _SORTING else 4
    lazy = name in _LAZY

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = current.get()
        budget.step(_CALL)
        given = (*args[first:], *kwargs.values())
        for value in given:
            if isinstance(value, str):
                budget.spend(len(value))
            elif isinstance(value, list | tuple | dict | range):
                budget.step(0 if lazy else per_entry * len(value))
                if not shallow:
                    budget.spend(per_entry * budget.weight(value))
        if sized:
            _check_sizes(name, given[1:])
        if name in _SLOW and budget.weight(given[0]) > _SHORT:
            raise OverBudget(f"uses {name} on a text of more than {_SHORT} characters")
        if lazy and given[0]:  # what is left out was looked at, too
            args = (*args[:first], _counted(budget, given[0]), *args[first + 1 :])
        elif before is not None:
            args = (*args[:first], *before(budget, *args[first:], **kwargs))
        result = function(*args, **kwargs)
        if isinstance(result, GeneratorType):
            return _counted(budget, result)
        return budget.made(result)

    return bounded


def _bounded_text(function: Callable[..., Any], first: int) -> Callable[..., Any]:
    """A filter that makes of a text another about as long."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = current.get()
        value = args[first]
        budget.characters -= 2 * (len(value) if type(value) is str else budget.weight(value))
        budget.steps -= 1
        if budget.steps < 0 or budget.characters < 0:
            budget.end()
        return function(*args, **kwargs)

    return bounded


def _trim(value: Any, chars: str | None = None) -> Any:
    """Jinja's `trim`, which nearly every template calls."""
    budget = current.get()
    budget.characters -= len(value) if type(value) is str else budget.weight(value)
    if budget.characters < 0:
        budget.end()
    return soft_str(value).strip(chars)


def _bounded_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def bounded(*args: Any) -> Any:
        budget = current.get()
        budget.step(1)
        if not any(type(value) is str and len(value) < 64 for value in args[1:]) or len(args) < 2:
            for value in args:
                if not isinstance(value, dict) or function is not _TEST_IN:
                    budget.spend_on(value)
        return function(*args)

    return bounded


def _counted(budget: Budget, values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        budget.step(_PER_ENTRY)
        yield value


def _check_sizes(what: str, values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, int | float) and not -MOST_WIDTH <= value <= MOST_WIDTH:
            raise OverBudget(f"asks {what} for {str(value)[:20]}; beyond {MOST_WIDTH} nothing is made")


def _check_format(budget: Budget, text: str, values: Any, mark: str) -> None:
    """Refuse wide fields; count a text as often as it may be written."""
    for width in _FORMAT.findall(text):
        if len(width) > 6 or int(width) > MOST_WIDTH:
            raise OverBudget(f"asks for a field of {width[:20]} characters; beyond {MOST_WIDTH} nothing is made")
    values = values if isinstance(values, tuple) else (values,)
    fields = text.count(mark)
    widths = ("*" in text) if mark == "%" else ("{" in text.partition("{")[2].partition("}")[0])
    for value in values:
        budget.spend((1 + fields) * budget.weight(value))
        if widths:
            _check_sizes("a format", (value, *(value.values() if isinstance(value, dict) else ())))
    budget.spend(len(text) + fields * sum(min(int(width), MOST_WIDTH) for width in _FORMAT.findall(text)))


def _before_replace(budget: Budget, value: Any, old: str, new: str, *rest: Any) -> tuple[Any, ...]:
    text = str(value) if not isinstance(value, str) else value
    _check_replacement(budget, text, str(old), str(new))
    return (value, old, new, *rest)


def _check_replacement(budget: Budget, text: str, old: str, new: str) -> None:
    if len(new) > len(old):
        budget.spend(text.count(old) * len(new))


def _before_indent(budget: Budget, value: Any, width: Any = 4, *rest: Any, **kwargs: Any) -> tuple[Any, ...]:
    width = kwargs.get("width", width)
    by = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
    budget.spend((str(value).count("\n") + 1) * max(by, 0))
    return (value, *([] if "width" in kwargs else [width]), *rest)


def _before_join(budget: Budget, value: Any, d: Any = "", *rest: Any, **kwargs: Any) -> tuple[Any, ...]:
    values = value if isinstance(value, str | list | tuple | dict | range) else list(value)
    budget.step(len(values))
    budget.spend(len(values) * (budget.weight(kwargs.get("d", d)) + 1))
    if not isinstance(values, str | range):
        for part in values:
            budget.spend_on(part)
    return (values, *([] if "d" in kwargs else [d]), *rest)


def _before_sum(budget: Budget, value: Any, *rest: Any, **kwargs: Any) -> tuple[Any, ...]:
    values = list(value)
    budget.step(len(values))
    if any(isinstance(part, list | tuple) for part in values):  # each sum is a new list
        budget.step(len(values) * sum(len(part) for part in values if isinstance(part, list | tuple)))
    return (values, *rest)


def _before_format(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    _check_format(budget, str(value), (*args, *kwargs.values()), "%")
    return (value, *args)


_BEFORE: Final[dict[str, Callable[..., tuple[Any, ...]]]] = {
    "replace": _before_replace,
    "indent": _before_indent,
    "join": _before_join,
    "sum": _before_sum,
    "format": _before_format,
}
"""Filters that make much of little: what they will make is counted before they run."""


def _no_chance(*_: Any, **__: Any) -> None:
    raise OverBudget("asks for chance, and a reply could not be reproduced")


_TEST_IN: Final = jinja2.tests.TESTS["in"]


# -- methods ---------------------------------------------------------------------------------------------------------


def _check_method(
    budget: Budget, method: BuiltinMethodType, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Count what a method of a text, a list or a number takes and may make. Returns its arguments."""
    owner, name = method.__self__, method.__name__
    if name in _QUICK:
        return args
    given = (*args, *kwargs.values())
    for value in (owner, *given):
        if isinstance(value, str | bytes):
            budget.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            budget.step(len(value))
            budget.spend_on(value)
    if name not in _PLACES:
        _check_sizes(name, given)
    if not isinstance(owner, str):
        if isinstance(owner, bytes) and (name != "decode" or not set(given) <= _ENCODINGS):
            raise OverBudget(f"uses {name} on bytes")
        return args
    if name == "replace" and len(given) > 1:
        _check_replacement(budget, owner, str(given[0]), str(given[1]))
    elif name in ("split", "rsplit", "splitlines"):
        apart = given[0] if given and isinstance(given[0], str) and given[0] else None
        pieces = owner.count(apart) if apart else len(owner) // 2
        bound = next((value for value in given if type(value) is int and value >= 0), pieces)
        budget.spend(64 * min(pieces, bound))
    elif name == "join" and args:
        return _before_join(budget, args[0], owner)[:1]
    elif name == "expandtabs":
        budget.spend(owner.count("\t") * (given[0] if given and isinstance(given[0], int) else 8))
    elif name == "translate":
        budget.spend(len(owner) * sum(budget.weight(value) for value in given))
    elif name == "encode" and not set(given) <= _ENCODINGS:
        raise OverBudget(f"encodes a text as {str(given[0])[:20]!r}")
    elif name in ("format", "format_map"):
        _check_format(budget, owner, given, "{")
    return args


# -- JSON ------------------------------------------------------------------------------------------------------------


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' `tojson`: Jinja's own escapes HTML, which no model was trained on."""
    budget = current.get()
    budget.spend(budget.noted(value))
    if indent is not None or separators is not None:
        given = (indent, *(separators or ()))
        if any((len(part) if isinstance(part, str) else part or 0) > _MOST_INDENT for part in given):
            raise OverBudget(f"asks tojson for more than {_MOST_INDENT} characters between two values")
    if indent is None:
        text = json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
        budget.spend(len(text))
        return text
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    written, pieces = encoder.iterencode(value), [""]
    while some := list(itertools.islice(written, 1024)):  # each line begins with as many spaces as it is deep
        pieces.append("".join(some))
        budget.spend(len(pieces[-1]))
    return "".join(pieces)
