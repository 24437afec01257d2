"""`Counting`: inserts the counting into a template's syntax tree, in loops, macros, joins, comparisons and lists.

The tree counts by calling filters (`CALLED`), because Jinja calls nothing else as quickly. Knows no filters of Jinja's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from engine.templates.budget import current

__all__ = ["CALLED", "Counting"]


class Counting(NodeTransformer):
    """Inserts the counting into a template's tree.

    Output outside of macros, blocks and the like goes straight into the prompt, where it is counted.
    """

    def __init__(self) -> None:
        self._kept = 0  # how many macros, blocks and the like enclose this node: their text may be written many times

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
        if test is not None:  # it runs for the items that it leaves out, too
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
        """Count an output into the prompt: a few texts in a row need not be counted twice."""
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
                return node  # as short as the literal
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
        """Count the further arguments of a macro, a tuple and a dictionary that Jinja makes."""
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
    """Count the nodes and characters of a body, without inner bodies, which count themselves."""
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


# -- what the tree calls -----------------------------------------------------------------------------------------------


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
    elif type(where) is range:
        budget.step(1 if type(value) is int else len(where))
    elif type(where) is not dict:  # it is not gone through
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


CALLED: Final[Mapping[str, Callable[..., Any]]] = {
    function.__name__: function for function in (_tick, _tested, _weigh, _add, _in, _made, _sliced)
}
"""The functions that count, by the names that the tree uses."""
