"""`ChatTemplate`: renders messages into prompt text with a model's own Jinja template. Knows no tokens, no model.

The environment is that of transformers (`utils/chat_template_utils.py`), for which templates are written. It is built
here because `strftime_now` must read a clock that can be pinned, and because a variable that no template reads must be
refused. A test compares the two on every template at hand.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.utils import Namespace

from engine.errors import InvalidFormat, InvalidParameter, LoadError, TemplateRefused
from engine.templates.budget import Budget, OverBudget, current
from engine.templates.sandbox import BoundedEnvironment
from engine.templates.turns import TurnStyle, definition_of, turn_of
from engine.types.messages import ChatMessage, ToolCall
from engine.types.tools import Tool

__all__ = ["ChatTemplate", "choose_template", "definition_of"]

MAX_PROMPT_CHARACTERS: Final = 1 << 26
"""The longest prompt that a template may write. No context is that long."""

_LONGEST_TEMPLATE: Final = 1 << 20
"""Characters. The longest of a published model has some 40,000."""
_LONGEST_FORMAT: Final = 1000
_LONGEST_WORDS: Final = 2000  # of a refusal

RESERVED: Final = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    }
)
"""Variables that the server sets, and `chat_template_kwargs` must not."""


class ChatTemplate:
    """A compiled chat template. Holds no state between renderings; safe to use from several threads."""

    def __init__(
        self,
        source: str | None,
        special_tokens: Mapping[str, str] | None = None,
        clock: Callable[[], datetime] | None = None,
        tool_use: str | None = None,
    ) -> None:
        """Compile a template.

        Args:
            source: Jinja; None for a model without a template, which then refuses all messages.
            special_tokens: `bos_token` and the like, passed to the template under these names.
            clock: what `strftime_now` reads. Default: local time.
            tool_use: the source of another template, for requests with tools.

        Raises:
            LoadError: the template is not valid Jinja.
        """
        self.source = source
        self.tool_use = ChatTemplate(tool_use, special_tokens, clock) if tool_use is not None else None
        """The template for requests with tools, if the model has one of its own."""
        self._special_tokens = dict(special_tokens or {})
        self._template: jinja2.Template | None = None
        self.variables: frozenset[str] = frozenset()
        """Names that the template reads without setting them: `messages`, `enable_thinking`, …"""
        self._style = TurnStyle()
        if source is None:
            return
        if len(source) > _LONGEST_TEMPLATE:
            raise LoadError(
                f"The chat template has {len(source)} characters; more than {_LONGEST_TEMPLATE} are not read."
            )
        if any("\ud800" <= character <= "\udfff" for character in source):
            raise LoadError("The chat template holds half a character (a lone surrogate), which no tokenizer encodes.")
        environment = _environment(clock or datetime.now)
        try:
            self.variables = _inputs(environment.parse(source))
            self._template = environment.bounded(source)
        except TemplateSyntaxError as error:
            raise LoadError(
                f"The chat template is not valid Jinja: line {error.lineno}: {_cut(error.message)}"
            ) from None
        except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            # Python cannot compile what Jinja made of it: twenty nested loops, thousands of brackets.
            raise LoadError(f"The chat template cannot be compiled: {_cut(error)}") from None
        self._style = TurnStyle(developers="developer" in source, thinking="thinking" in source)
        self._style = dataclasses.replace(self._style, in_parts=self._drops_text())
        self._style = dataclasses.replace(self._style, arguments_as_text=self._shows_arguments_as_text())

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, *, source: str | None = None, clock: Callable[[], datetime] | None = None
    ) -> ChatTemplate:
        """Compile a transformers tokenizer's template, or `source` instead, with the tokenizer's special tokens."""
        source, tool_use = cls.sources(tokenizer, source)
        return cls(source, tokenizer.special_tokens_map, clock, tool_use)

    @staticmethod
    def sources(tokenizer: Any, source: str | None = None) -> tuple[str | None, str | None]:
        """Return the source of the template that `from_tokenizer` compiles, and of the one for tools if it differs."""
        if source is not None:
            return source, None
        own = getattr(tokenizer, "chat_template", None)
        source, tool_use = choose_template(own), choose_template(own, "tool_use")
        return source, tool_use if tool_use != source else None

    def serving(self, *, tools: bool) -> ChatTemplate:
        """Return the template that renders requests with tools, or without."""
        return self.tool_use if tools and self.tool_use is not None else self

    @property
    def extra_variables(self) -> tuple[str, ...]:
        """Names that `chat_template_kwargs` may set, sorted."""
        return tuple(sorted(self.variables - RESERVED - self._special_tokens.keys()))

    def render(
        self,
        messages: Sequence[ChatMessage],
        variables: Mapping[str, Any] | None = None,
        *,
        again: bool = True,
        tools: Sequence[Tool] = (),
        clock: datetime | None = None,
    ) -> str:
        """Render the prompt for the assistant's next turn.

        Args:
            messages: at least one. `developer` turns become `system` unless the template speaks of developers.
            variables: the request's `chat_template_kwargs`.
            again: whether the assistant speaks next. If not, the conversation ends with the last message.
            tools: what the model may call.
            clock: what `strftime_now` reads in this rendering; None: the template's clock.

        Raises:
            TemplateRefused: the template raised; its own words are in the message. Or there is no template.
            InvalidFormat: no messages.
            InvalidParameter: a variable that is reserved, or that the template does not read.
        """
        if tools and self.tool_use is not None:
            return self.tool_use.render(messages, variables, again=again, tools=tools, clock=clock)
        if self._template is None or self.source is None:
            raise TemplateRefused(
                "This model has no chat template (a base model, perhaps): set chat_template in models.yaml to a Jinja "
                "file, or use a checkpoint that was trained for chat.",
                param="messages",
            )
        if not messages:
            raise InvalidFormat("messages must hold at least one message.", param="messages")
        variables = variables or {}
        self._check(variables)
        context = {
            **self._special_tokens,
            **variables,
            "messages": [turn_of(message, self._style) for message in messages],
            "tools": [definition_of(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": again,
            **({} if clock is None else {"strftime_now": _strftime_now(lambda: clock)}),
        }
        size = sum(len(m.content or "") + len(m.reasoning_content or "") for m in messages)
        return _render(self._template, context, Budget(len(messages) + len(tools), size))

    def _drops_text(self) -> bool:
        """Whether a message's text must be a list of parts, as in many templates of models with images."""
        message = ChatMessage("user", "Frage")
        for in_parts in (False, True):
            self._style = dataclasses.replace(self._style, in_parts=in_parts)
            try:
                if "Frage" in self.render([message]):
                    return in_parts
            except TemplateRefused as refused:
                if isinstance(refused.__cause__, OverBudget):
                    raise LoadError(
                        f"The chat template {refused.__cause__.message}, in a prompt of one word."
                    ) from None
        return False

    def _shows_arguments_as_text(self) -> bool:
        """Whether the template shows arguments that are text and no object."""
        call = ToolCall("abcdef001", "aufruf", "kein JSON")
        turns = [ChatMessage("user", "Frage"), ChatMessage("assistant", "", tool_calls=(call,))]
        self._style = dataclasses.replace(self._style, arguments_as_text=True)
        try:
            return call.arguments in self.render(
                turns, again=False, tools=[Tool(call.name, "-", {"type": "object", "properties": {}})]
            )
        except TemplateRefused:
            return False

    def _check(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            param = f"chat_template_kwargs.{name}"
            if name in RESERVED or name in self._special_tokens:
                raise InvalidParameter(f"chat_template_kwargs: {name} is set by the server.", param=param)
            if name not in self.variables:
                known = self.extra_variables
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                reads = f"It reads: {', '.join(known)}." if known else "It reads none beside the messages."
                raise InvalidParameter(
                    f"chat_template_kwargs: this model's template has no variable {name!r}. {hint}{reads}", param=param
                )


def choose_template(templates: str | Mapping[str, str] | None, name: str = "default") -> str | None:
    """Choose from a tokenizer's `chat_template`, which is one template, several by name, or None.

    `name` falls back to `default`, as transformers does for `tool_use`.

    Raises:
        LoadError: named templates without that name and without a default.
    """
    if templates is None or isinstance(templates, str):
        return templates
    if not isinstance(templates, Mapping) or not all(isinstance(text, str) for text in templates.values()):
        raise LoadError(f"The tokenizer's chat_template must be text, or texts by name, not {str(templates)[:100]}.")
    for key in (name, "default"):
        if key in templates:
            return templates[key]
    raise LoadError(
        f"The tokenizer has the chat templates {', '.join(sorted(templates))}, but no default: set chat_template in "
        "models.yaml."
    )


def _inputs(tree: nodes.Template) -> frozenset[str]:
    """Names that a template reads before it sets them, if it ever sets them, or asks whether they are defined.

    `find_undeclared_variables` alone also counts a name that is set in each branch of an `if` and read after it:
    settable by nobody, so accepting it would be accepting and ignoring.
    """
    first: dict[str, str] = {}
    for name in _names(tree):
        first.setdefault(name.name, name.ctx)
    questions = [
        *(test.node for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")),
        *(call.node for call in tree.find_all(nodes.Filter) if call.name in ("default", "d")),
    ]
    asked = {node.name for node in questions if isinstance(node, nodes.Name)}
    undeclared = jinja2.meta.find_undeclared_variables(tree)
    return frozenset(name for name in undeclared if first[name] == "load" or name in asked)


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    """Yield names in the order of evaluation: a `set` reads its right side first."""
    if isinstance(node, nodes.Name):
        yield node
    children = list(node.iter_child_nodes())
    for child in reversed(children) if isinstance(node, nodes.Assign) else children:
        yield from _names(child)


def _render(template: jinja2.Template, context: Mapping[str, Any], budget: Budget) -> str:
    pieces, length = [], 0
    token = current.set(budget)
    try:
        for piece in template.generate(**context):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_PROMPT_CHARACTERS:
                raise TemplateError(f"The prompt grew beyond {MAX_PROMPT_CHARACTERS} characters.")
    except OverBudget as error:
        raise TemplateRefused(f"The chat template {error.message}.", param="messages") from error
    except SecurityError as error:
        raise TemplateRefused(f"The chat template did what it must not: {_cut(error)}", param="messages") from error
    except TemplateError as error:
        raise TemplateRefused(f"The chat template refused: {_cut(error.message or error)}", param="messages") from error
    except Exception as error:
        # Only the template runs in here, on data: whatever it raises (None + str, a missing index, recursion) means
        # that it was not written for these messages.
        words = f"{type(error).__name__}: {_cut(error)}"
        raise TemplateRefused(f"The chat template failed on these messages: {words}", param="messages") from error
    finally:
        current.reset(token)
    return "".join(pieces)


def _cut(words: object) -> str:
    """Cut a template's own words, which may be as long as a prompt."""
    text = str(words)
    return text if len(text) <= _LONGEST_WORDS else f"{text[:_LONGEST_WORDS]} …"


def _environment(clock: Callable[[], datetime]) -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now(clock)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _strftime_now(clock: Callable[[], datetime]) -> Callable[[str], str]:
    def strftime_now(format: str) -> str:
        if len(format) > _LONGEST_FORMAT:
            raise OverBudget(f"asks for a date of more than {_LONGEST_FORMAT} characters")
        return clock().strftime(format)

    return strftime_now


class _Generation(jinja2.ext.Extension):
    """Renders the text inside `{% generation %} … {% endgeneration %}`, which marks the assistant's words for training.

    It is a call block, as in transformers, not bare statements: names set inside stay inside.
    """

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_pass_on"), [], [], body).set_lineno(line)

    def _pass_on(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """A `dict` without the attributes of a class, which lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A `namespace` that refuses underscored names, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # self among args, so that namespace(self=...) works
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # it may contain itself, forty times over, so the length of its text cannot be bounded
        raise SecurityError("A namespace has no text.")


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"A namespace must not hold the underscored name {name!r}.")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
