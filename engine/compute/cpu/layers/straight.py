"""A step without the model's own `forward`: embedding, angles, all layers in one call, norm, output layer.

What Python does around them (decorators, keywords, a list of layers cut anew, modules that return what they are given)
takes a twentieth of a small model's token, and more of a tiny one's: weights have just gone through the processor's
caches, and nothing of Python is left there.

It is left out only of a model whose `forward` does nothing else. That is found out by calling it once with symbols in
place of token ids, positions, rows, and what its parts return (`read_forward`). A symbol can be handed on and nothing
else: it has no numbers, no shape, no truth. A `forward` that comes to its end with them cannot have looked at any, so
it hands them on in the same way in every step. All others are called as always.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from engine.compute.cpu.attention import CpuPlan
from engine.compute.cpu.layers.decoder_layer import NativeLayer
from engine.compute.cpu.layers.stack import Stack

__all__ = ["Straight", "read_forward"]


class _Looked(Exception):
    """A model did more with a symbol than to hand it on."""


class _Symbol(Tensor):
    """Stands for a tensor that nobody may look at: whatever torch is asked of it ends the trial.

    Attributes:
        role: what it stands for; trial: the one it belongs to.
    """

    role: str
    trial: _Trace

    @staticmethod
    def of(trial: _Trace, role: str) -> _Symbol:
        made: _Symbol = Tensor._make_subclass(_Symbol, torch.empty(0, dtype=torch.float32))
        made.role, made.trial = role, weakref.proxy(trial)  # no ring: a model is freed as soon as it is let go
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = next(_symbols([*args, *(kwargs or {}).values()]))
        if func is Tensor.__getitem__:
            return known.trial.rows_of(*args)
        if func in (Tensor.ndim.__get__, Tensor.dim) and known.role == "rows":  # type: ignore[attr-defined]
            return 1
        return known.trial.fail(f"it computes {func}")


def _symbols(given: Any) -> Iterator[_Symbol]:
    """Find the symbols among arguments, also in lists of them."""
    for one in given:
        if type(one) is _Symbol:
            yield one
        elif isinstance(one, (list, tuple)):
            yield from _symbols(one)


@dataclass(frozen=True, slots=True)
class _Call:
    """A part, and what it is called with: `_Named` values of the step, or constants."""

    part: nn.Module
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def __call__(self, values: Mapping[str, Tensor]) -> Any:
        return self.part(*(_filled(a, values) for a in self.arguments), **self._named(values))

    def _named(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: _filled(a, values) for name, a in self.keywords.items()} if self.keywords else {}


@dataclass(frozen=True, slots=True)
class _Named:
    """A value of a step, by its role."""

    role: str


def _filled(argument: Any, values: Mapping[str, Tensor]) -> Any:
    return values[argument.role] if type(argument) is _Named else argument


_ROLES: Final = ("embedding", "angles", "norm", "head")


class _Trace:
    """What a model does with symbols, from token ids to logits.

    Attributes:
        broken: what it did that cannot be repeated; "" if nothing. Kept, since a model may catch what it raises.
    """

    def __init__(self, layers: list[NativeLayer], embedding: nn.Module, head: nn.Module) -> None:
        self.broken = ""
        roles = ("tokens", "positions", "rows", "embedded", "normed", "kept", "logits", "cos", "sin")
        self.symbols = {role: _Symbol.of(self, role) for role in roles}
        self.outputs = [_Symbol.of(self, "middle") for _ in layers[1:]] + [_Symbol.of(self, "last")]
        self.angles = self.symbols["cos"], self.symbols["sin"]
        self.calls: dict[str, _Call] = {}
        self._layers, self._embedding, self._head = layers, embedding, head
        self._due = 0
        self._ambient = _ambient()

    def fail(self, why: str) -> Any:
        self.broken = self.broken or why
        raise _Looked(why)

    def rows_of(self, symbol: Any, key: Any) -> _Symbol:
        """Take `normed[:, rows]`."""
        by_rows = isinstance(key, tuple) and len(key) in (2, 3) and key[1] is self.symbols["rows"]
        if symbol is not self.symbols["normed"] or not by_rows or not all(map(_all, (key[0], *key[2:]))):
            self.fail("it cuts a tensor")
        return self.symbols["kept"]

    def layer(self, number: int) -> Callable[..., _Symbol]:
        def called(hidden_states: Any, *_: Any, **keywords: Any) -> _Symbol:
            before = self.outputs[number - 1] if number else self.symbols["embedded"]
            angles = keywords.get("position_embeddings")
            alike = type(angles) is tuple and len(angles) == 2 and all(map(_is, angles, self.angles))
            if self._due != number or hidden_states is not before or not alike:
                self.fail(f"layer {number} gets something else")
            self._due += 1
            return self.outputs[number]

        return called

    def part(self, part: nn.Module) -> Callable[..., Any]:
        """What a part other than a layer gives is told by what it is, or by what it is given."""

        own = dict(vars(part))

        def called(*arguments: Any, **keywords: Any) -> Any:
            given = [*arguments, *keywords.values()]
            role, gives = self._role(part, {a.role for a in given if type(a) is _Symbol})
            plain = all(type(a) in (_Symbol, str, int, float, bool, type(None)) for a in given)
            now = {name: value for name, value in vars(part).items() if name != "forward"}
            as_ever = (
                now.keys() == own.keys() and all(map(_is, now.values(), own.values())) and _ambient() == self._ambient
            )
            if not role or role in self.calls or not plain or not as_ever:
                self.fail(f"{type(part).__name__} is called otherwise")
            names = {name: _noted(a) for name, a in keywords.items()}
            self.calls[role] = _Call(part, tuple(map(_noted, arguments)), names)
            return gives

        return called

    def _role(self, part: nn.Module, given: set[str]) -> tuple[str, Any]:
        """Return what a part is, and what it gives; "" where it is given what the step does not have for it."""
        s = self.symbols
        if part is self._head:
            return ("head", s["logits"]) if given == {"kept"} else ("", None)
        if part is self._embedding:
            return ("embedding", s["embedded"]) if given == {"tokens"} else ("", None)
        if given in ({"positions"}, {"positions", "embedded"}):
            return "angles", self.angles
        return ("norm", s["normed"]) if given == {"last"} else ("", None)

    @property
    def whole(self) -> bool:
        return not self.broken and set(self.calls) == set(_ROLES) and self._due == len(self._layers)


def _ambient() -> tuple[Any, ...]:
    """Return what a model may set around the calls of its parts, and what changes their results."""
    return torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.get_default_dtype()


def _is(one: Any, other: Any) -> bool:
    return one is other


def _all(key: Any) -> bool:
    return type(key) is slice and key == slice(None)


def _noted(argument: Any) -> Any:
    return _Named(argument.role) if type(argument) is _Symbol else argument


class Straight:
    """The parts of a model, called in turn."""

    def __init__(
        self, calls: Mapping[str, _Call], layers: list[NativeLayer], around: list[nn.Module], listed: nn.Module
    ) -> None:
        """`around`: the modules whose `forward` is left out. They have the parts, and `listed`, the layers."""
        self._calls, self._layers, self._stack = [calls[role] for role in _ROLES], layers, cast(Stack, layers[0].stack)
        self._places = [(m._modules, own, part) for m in (*around, listed) for own, part in m._modules.items()]
        self._hooked = [hooks for m in (*around, *layers) for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooked += [modules._global_forward_hooks, modules._global_forward_pre_hooks]
        self._own = [vars(m) for m in (*around, *layers)]

    @property
    def holds(self) -> bool:
        """Whether the model is the one that was read: the same parts, layers that are one call, no new hooks."""
        if any(self._hooked) or self._layers[0].stack is not self._stack:
            return False
        alike = all(now.get(own) is part for now, own, part in self._places)
        return alike and not any("forward" in own for own in self._own)

    def __call__(self, plan: CpuPlan, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Compute the logits that the model has.

        Args:
            tokens, positions: `[1, T] int64`; rows: `[n] int64`, whose logits are wanted.

        Returns:
            `[1, n, vocab]`, as the output layer gives them.
        """
        embed, angles, norm, head = self._calls
        x = embed({"tokens": tokens})
        y = self._stack.compute(plan, x, angles({"positions": positions, "embedded": x}))
        logits: Tensor = head({"kept": norm({"last": y})[:, rows]})
        return logits


def read_forward(model: nn.Module, **keywords: Any) -> Straight | None:
    """Find out whether a model's `forward` calls its parts one after the other and does nothing else.

    Args:
        model: a causal language model that takes `logits_to_keep`; its decoder layers are one stack, or the answer is
            None.
        keywords: what each step gives it besides token ids, `position_ids` and `logits_to_keep`.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, NativeLayer)]
    home, listed = _home(model, layers)
    if home is None or listed is None or len({id(layer.stack) for layer in layers}) != 1 or layers[0].stack is None:
        return None
    if [layer.index for layer in layers] != list(range(len(layers))):
        return None
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    except Exception:  # whatever an unknown architecture raises: it is called as always
        return None
    parts = {id(p): p for p in (*home.children(), embedding, head) if isinstance(p, nn.Module) and p is not listed}
    around = [m for m in model.modules() if any(id(inside) == id(home) for inside in m.modules())]
    if any(_hooked(m) for m in (*around, *layers)) or any("forward" in vars(p) for p in parts.values()):
        return None
    if not {id(embedding), id(head)} <= {id(child) for m in around for child in m.children()}:
        return None
    with torch.inference_mode(), _restored(around) as unchanged:
        trace = _Trace(layers, embedding, head)
        recorders: list[tuple[nn.Module, Callable[..., Any]]] = [(p, trace.part(p)) for p in parts.values()]
        recorders += [(layer, trace.layer(number)) for number, layer in enumerate(layers)]
        tokens, positions, rows = (trace.symbols[role] for role in ("tokens", "positions", "rows"))
        try:
            with _in_place_of(recorders):
                output = model(tokens, position_ids=positions, logits_to_keep=rows, **keywords)
            straight = trace.whole and output.logits is trace.symbols["logits"] and unchanged()
        except Exception:  # whatever a model raises whose inputs tell it nothing
            return None
    return Straight(trace.calls, layers, around, listed) if straight else None


def _home(model: nn.Module, layers: list[NativeLayer]) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the module that has a list of just these layers, and the list."""
    for module in model.modules():
        for child in module.children():
            if layers and isinstance(child, nn.ModuleList) and list(map(id, child)) == list(map(id, layers)):
                return module, child
    return None, None


def _hooked(module: nn.Module) -> bool:
    """Tell whether something is called with a module, or in its place, that reading its parts would not show."""
    everywhere = modules._global_forward_hooks or modules._global_forward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or everywhere)


@contextmanager
def _restored(around: list[nn.Module]) -> Iterator[Callable[[], bool]]:
    """Give modules back what a call changes of them. Yields what tells whether nothing was."""
    attributes = [(vars(m), dict(vars(m))) for m in around]
    inside = [(v, copy.copy(v)) for _, own in attributes for v in own.values() if isinstance(v, (dict, list, set))]
    buffers = [(b, b.clone()) for m in around for b in m.buffers(recurse=False)]

    def unchanged() -> bool:
        alike = all(_alike(now, before) for now, before in (*attributes, *inside))
        return alike and all(torch.equal(now, before) for now, before in buffers)

    try:
        yield unchanged
    finally:
        for now, before in (*attributes, *inside):
            now.clear()
            now.extend(before) if isinstance(now, list) else now.update(before)
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _alike(now: Any, before: Any) -> bool:
    """Tell whether two containers hold the very same objects."""
    if isinstance(now, dict):
        return list(now) == list(before) and all(map(_is, now.values(), before.values()))
    if isinstance(now, list):
        return len(now) == len(before) and all(map(_is, now, before))
    return bool(now == before)


@contextmanager
def _in_place_of(recorders: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Call recorders instead of modules. A module's own hooks are still called, with symbols."""
    try:
        for module, recorder in recorders:
            vars(module)["forward"] = recorder
        yield
    finally:
        for module, _ in recorders:
            vars(module).pop("forward", None)
