"""`BoundedEnvironment`: Jinja's sandbox, in which everything that loops, grows or amplifies is counted.

Counts are taken in three places, which together cover all that a template can do:

    the tree      each iteration of a loop and each body of a macro counts its nodes; each text that is joined or
                  compared counts its length; each list literal has its weight noted (`engine/templates/tree.py`)
    operators     count the sizes of both sides before they run (`+`, `*`, `**`, `%`, …)
    calls         filters, tests, methods and functions count their input before they run and their result after
                  (`engine/templates/filters.py`)

Nothing here changes what a template writes. Knows no messages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sized
from types import BuiltinMethodType, MethodType
from typing import Any, Final

import jinja2
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.templates import filters as template_filters
from engine.templates.budget import MOST_BITS, Budget, OverBudget, current
from engine.templates.filters import CALL, QUICK, check_format, check_method
from engine.templates.tree import CALLED, Counting

__all__ = ["BoundedEnvironment"]

_OF_THE_COMPILER: Final = ("_loop_vars", "_block_vars")
"""Arguments that Jinja's compiler adds to calls, for functions that take the context."""


_OF_DICTIONARIES: Final = frozenset(dir(dict))


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The only environment in which a template runs. It counts against the `Budget` in `current`."""

    intercepted_binops = frozenset({"*", "**", "%", "-"})  # a sum is counted by `_add`; the others are of numbers

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals.pop("lipsum", None)
        for name, function in list(self.filters.items()):
            self.filters[name] = template_filters.bounded_filter(name, function)
        self.filters |= {**template_filters.OWN, **CALLED}
        for name in template_filters.COMPARING:
            test: Any = self.tests[name]
            self.tests[name] = template_filters.bounded_test(test)

    def bounded(self, source: str) -> jinja2.Template:
        """Compile a template with the counting built in."""
        return self.from_string(Counting().visit(self.parse(source)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current.get()
        if operator == "%":
            if isinstance(left, str):
                check_format(budget, left, right, "%")
        elif operator == "*":
            self._check_product(budget, left, right)
        elif operator == "-":
            for side in (left, right):
                if isinstance(side, Sized):  # the keys of a dictionary
                    budget.step(len(side))
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
        budget.steps -= CALL
        if budget.steps < 0:
            budget.end()
        kind = type(__obj)
        if kind is BuiltinMethodType:
            for name in _OF_THE_COMPILER:
                kwargs.pop(name, None)
            if __obj.__name__ in QUICK:
                return __obj(*args, **kwargs)
            return budget.made(__obj(*check_method(budget, __obj, args, kwargs), **kwargs))
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
        """Look up an attribute as Jinja does, with a fast path for dictionaries, which makes up for the counting."""
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
            check_format(current.get(), str(value.__self__), (*args, *kwargs.values()), "{")
            return formatting(*args, **kwargs)

        return bounded
