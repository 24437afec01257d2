"""The `input` of a body, a text or items → `ChatMessage`s.

Thoughts, messages and calls that follow each other are one turn of the assistant; messages of the user that do are one
of the user, since many templates take turns that alternate only. What instructs the model at the beginning
(`instructions`, messages of the system and of developers) is one message, for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from engine import ChatMessage, InvalidFormat, InvalidParameter, ToolCall, Unsupported, VerbatimError
from server.api.chat_messages import MAX_MESSAGES, MAX_PARTS, check_calls
from server.api.parsing import LIST, OBJECT, STRING, at_most, optional, required, typed
from server.api.responses.fields import RESPONSES, ROLES
from server.api.responses.thoughts import unpacked_thoughts
from server.api.responses.tools import called_name
from server.api.tools import call_arguments, call_id

__all__ = ["read_input"]

_TEXTS: Final[Mapping[str, str]] = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""The parts of a message's content that are text, each with the field that holds it."""
_UNUSED: Final = frozenset(("annotations", "logprobs"))
"""Fields of text parts that come back as they were told, and say nothing to the model."""
_INSTRUCTING: Final = ("system", "developer")
_BETWEEN: Final = "\n\n"
"""What stands between messages that become one. Texts of the assistant that only thoughts part are joined as they are:
it wrote them as one."""


@dataclass(slots=True)
class _Turn:
    """A message while its items are read, whose texts are joined at the end: once, however many there are.

    `parted`: the next text begins a paragraph; `answers`: the path of its call's id; `arguments`: those of its calls'.
    """

    role: str
    texts: list[str] = field(default_factory=list)
    parted: bool = False
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    call_id: str | None = None
    answers: str = ""
    arguments: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Add a message's text."""
        if text:
            self.texts += [_BETWEEN, text] if self.parted else [text]
            self.parted = True

    def message(self) -> ChatMessage:
        thoughts = "".join(self.thoughts) or None
        return ChatMessage(self.role, "".join(self.texts), None, thoughts, tuple(self.calls), self.call_id)


def read_input(data: Mapping[str, Any], ignored: list[str]) -> tuple[ChatMessage, ...]:
    """Read `instructions` and `input`. Adds names of unknown fields to `ignored`.

    Raises:
        InvalidFormat: an item lacks a field, or has one of the wrong type.
        InvalidParameter: too many of something, a wrong role, or an output of a call that nobody made.
        Unsupported: an item or a part that this build cannot read.
    """
    given = required(data, "input", RESPONSES.honoured["input"].kind)
    instructions = RESPONSES.given(data, "instructions")
    turns = [] if instructions is None else [_Turn("system", [instructions])]
    if isinstance(given, str):
        turns.append(_Turn("user", [given]))
    else:
        if not given:
            raise InvalidParameter("input must hold at least one item, not 0.", param="input")
        at_most(MAX_MESSAGES, len(given), "input", "items")
        parts = (
            item[name] for item in given if isinstance(item, dict) for name in ("content", "output") if name in item
        )
        at_most(MAX_PARTS, sum(len(part) for part in parts if isinstance(part, list)), "input", "parts")
        for i, item in enumerate(given):
            _read(item, f"input.{i}", turns, ignored)
    turns = _one_instruction(turns)
    messages = tuple(turn.message() for turn in turns)
    _check(messages, turns)
    return messages


def _one_instruction(turns: list[_Turn]) -> list[_Turn]:
    """Join the messages at the beginning that instruct the model."""
    count = next((i for i, turn in enumerate(turns) if turn.role not in _INSTRUCTING), len(turns))
    if count < 2:
        return turns
    text = _BETWEEN.join("".join(turn.texts) for turn in turns[:count])
    return [_Turn(turns[0].role, [text]), *turns[count:]]


def _check(messages: Sequence[ChatMessage], turns: Sequence[_Turn]) -> None:
    """Check the calls of all items together, as those of a chat; an error names the item's own path."""
    try:
        check_calls(messages)
    except VerbatimError as error:
        own = {f"messages.{i}.tool_call_id": turn.answers for i, turn in enumerate(turns) if turn.answers}
        for i, turn in enumerate(turns):
            own |= {f"messages.{i}.tool_calls.{j}.function.arguments": at for j, at in enumerate(turn.arguments)}
        name = error.param or "messages"
        error.param = own.get(name, "input")
        error.message = error.message.replace(name, error.param)
        raise


def _read(item: Any, at: str, turns: list[_Turn], ignored: list[str]) -> None:
    kind = optional(typed(item, at, OBJECT), "type", STRING, f"{at}.")
    reader, known = _READERS.get("message" if kind is None else kind, (None, ()))
    if reader is None:
        raise Unsupported(f"{at}.type: {_why_not(kind or '')}", param=f"{at}.type")
    reader(item, at, turns, ignored)
    # `id` and `status` tell of an item that was sent before; every item may have them.
    ignored += [f"{at}.{key}" for key, value in item.items() if key not in (*known, "type", "id", "status")]


def _why_not(kind: str) -> str:
    if kind == "item_reference":
        return "nothing is stored here that 'item_reference' could name; send the items, store: false makes clients do."
    return f"an item of type {kind[:100]!r} is not supported; this server reads {', '.join(_READERS)}."


def _turn_of(role: str, turns: list[_Turn]) -> _Turn:
    """Return the turn of the user or of the assistant that an item belongs to: one until another's item comes."""
    if not turns or turns[-1].role != role:
        turns.append(_Turn(role))
    return turns[-1]


def _message(item: Mapping[str, Any], at: str, turns: list[_Turn], ignored: list[str]) -> None:
    role = required(item, "role", STRING, f"{at}.")
    if role not in ROLES:
        raise InvalidParameter(f"{at}.role must be one of {', '.join(ROLES)}, not {role[:100]!r}.", param=f"{at}.role")
    text = _texts(item, "content", at, ignored)
    if role in _INSTRUCTING:
        turns.append(_Turn(role, [text]))
    else:
        _turn_of(role, turns).say(text)


def _reasoning(item: Mapping[str, Any], at: str, turns: list[_Turn], ignored: list[str]) -> None:
    content = optional(item, "content", LIST, f"{at}.") or []
    texts = [_part(part, f"{at}.content.{i}", ("reasoning_text", "text"), ignored) for i, part in enumerate(content)]
    packed = optional(item, "encrypted_content", STRING, f"{at}.")
    if not texts and packed:
        text = unpacked_thoughts(packed)
        if text is None:
            at += ".encrypted_content"
            raise InvalidParameter(
                f"{at} was not written by this server, which cannot read it; leave it out.", param=at
            )
        texts = [text]
    if optional(item, "summary", LIST, f"{at}."):
        ignored.append(f"{at}.summary")
    turn = _turn_of("assistant", turns)
    turn.thoughts += texts
    turn.parted = turn.parted and bool(turn.calls)  # a reply of this server ends with calls: then it is another text


def _call(item: Mapping[str, Any], at: str, turns: list[_Turn], ignored: list[str]) -> None:
    here = f"{at}."
    call = ToolCall(call_id(item, "call_id", here), called_name(item, here), call_arguments(item, here))
    turn = _turn_of("assistant", turns)
    turn.calls.append(call)
    turn.arguments.append(f"{at}.arguments")


def _output(item: Mapping[str, Any], at: str, turns: list[_Turn], ignored: list[str]) -> None:
    answered = call_id(item, "call_id", f"{at}.")
    turns.append(_Turn("tool", [_texts(item, "output", at, ignored)], call_id=answered, answers=f"{at}.call_id"))


def _texts(item: Mapping[str, Any], name: str, at: str, ignored: list[str]) -> str:
    """Read a text, or text parts, which are joined with nothing between them. Null and an empty list are no text."""
    if name not in item:
        raise InvalidFormat(f"{at}.{name} is required.", param=f"{at}.{name}", code="missing_field")
    at, value = f"{at}.{name}", item[name]
    if value is None or isinstance(value, str):
        return value or ""
    typed(value, at, ((list,), "a string or a list of parts"))
    return "".join(_part(part, f"{at}.{i}", tuple(_TEXTS), ignored) for i, part in enumerate(value))


def _part(part: Any, at: str, allowed: tuple[str, ...], ignored: list[str]) -> str:
    kind = required(typed(part, at, OBJECT), "type", STRING, f"{at}.")
    if kind not in allowed:
        raise Unsupported(
            f"{at}.type: a part of type {kind[:100]!r} is not supported here; this server serves text only "
            f"({', '.join(allowed)}), no images, audio or files.",
            param=f"{at}.type",
        )
    name = _TEXTS.get(kind, "text")
    text: str = required(part, name, STRING, f"{at}.")
    ignored += [f"{at}.{key}" for key in part if key not in ("type", name) and key not in _UNUSED]
    return text


_Reader = Callable[[Mapping[str, Any], str, list[_Turn], list[str]], None]
_READERS: Final[Mapping[str, tuple[_Reader, tuple[str, ...]]]] = {
    "message": (_message, ("role", "content")),
    "reasoning": (_reasoning, ("summary", "content", "encrypted_content")),
    "function_call": (_call, ("call_id", "name", "namespace", "arguments")),
    "function_call_output": (_output, ("call_id", "output")),
}
"""How each type of item is read, and the fields that it has beside its type, its id and its status."""
