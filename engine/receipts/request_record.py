"""The record of a request: a `GenerationRequest` with every default filled in, as plain JSON, and back.

What cannot change a reply is left out: the id, the group, the cache's salt, the prediction, the echo, and which field
of an API asked for a prompt or a constraint. So is the adapter, which is a part of the environment, as the model is.
Exactly one of `messages`, `prompt` and `prompt_token_ids` is there, and every other name, but those of a given
beginning where none is given. `engine.receipts.canonical` says what is written as text.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any, Final

from engine.errors import ReceiptError, RequestError
from engine.receipts.canonical import Reader, json_of, number_of, text_of_json, written_integer
from engine.types.messages import ChatMessage, ToolCall
from engine.types.requests import Constraint, GenerationRequest
from engine.types.sampling_fields import Integer, TokenBiases
from engine.types.sampling_params import SAMPLING_FIELDS, SamplingParams
from engine.types.tools import Tool, ToolChoice

__all__ = ["from_record", "recorded_params", "to_record"]

_PROMPTS: Final = ("messages", "prompt", "prompt_token_ids")
_FIELDS: Final = (
    "suffix",
    "add_special_tokens",
    "add_generation_prompt",
    "sampling",
    "chat_template_kwargs",
    "constraint",
    "reasoning_effort",
    "tools",
    "parallel_tool_calls",
    "tool_choice",
    "clock",
)

_BEGINNINGS: Final = ("continue_final_message", "continue_token_ids")
"""Names that only the record of a reply has whose beginning was given."""


def to_record(request: GenerationRequest, params: SamplingParams) -> dict[str, Any]:
    """Return the record of a request that was prepared with `params`.

    Raises:
        ReceiptError: it holds something that JSON cannot write.
    """
    choice = request.tool_choice
    return {
        **_prompt_record(request),
        "suffix": request.suffix,
        "add_special_tokens": request.add_special_tokens,
        "add_generation_prompt": request.add_generation_prompt,
        **_beginning_record(request),
        "sampling": {name: _sampling_value(name, getattr(params, name)) for name in SAMPLING_FIELDS},
        "chat_template_kwargs": text_of_json(dict(request.chat_template_kwargs), "chat_template_kwargs"),
        "constraint": _constraint_record(request.constraint),
        "reasoning_effort": request.reasoning_effort,
        "tools": [_tool_record(tool) for tool in request.tools],
        "parallel_tool_calls": request.parallel_tool_calls,
        "tool_choice": _choice_record(choice),
        "clock": request.clock.isoformat() if request.clock and request.messages is not None else None,
    }


def from_record(record: Any, request_id: str, *, group: str = "") -> GenerationRequest:
    """Return the request of a record, with `record` set.

    Raises:
        ReceiptError: the record is not what `to_record` writes.
    """
    read = Reader(record, "request", _FIELDS, (*_PROMPTS, *_BEGINNINGS))
    given = [name for name in _PROMPTS if read.has(name)]
    if len(given) != 1:
        raise ReceiptError(f"request must hold exactly one of {', '.join(_PROMPTS)}.")
    variables = json_of(read.text("chat_template_kwargs"), "request.chat_template_kwargs")
    if not isinstance(variables, dict):
        raise ReceiptError("request.chat_template_kwargs must be the text of an object.")
    return GenerationRequest(
        request_id=request_id,
        messages=_messages(read.list("messages")) if given == ["messages"] else None,
        prompt=read.text("prompt") if given == ["prompt"] else None,
        prompt_token_ids=read.ids("prompt_token_ids") if given == ["prompt_token_ids"] else None,
        suffix=read.text_or_none("suffix"),
        add_special_tokens=read.flag("add_special_tokens"),
        add_generation_prompt=read.flag("add_generation_prompt"),
        continue_final_message=_continues(read),
        continue_token_ids=_continued_ids(read),
        sampling=_sampling(read.any("sampling")),
        chat_template_kwargs=variables,
        constraint=_constraint(read.any("constraint")),
        reasoning_effort=read.text_or_none("reasoning_effort"),
        tools=tuple(_tool(tool, f"request.tools.{i}") for i, tool in enumerate(read.list("tools"))),
        parallel_tool_calls=read.flag("parallel_tool_calls"),
        tool_choice=_choice(read.any("tool_choice")),
        clock=_clock(read.text_or_none("clock")),
        group=group,
        record=True,
    )


def recorded_params(request: GenerationRequest) -> SamplingParams:
    """Return the parameters of a request that `from_record` made."""
    return SamplingParams.merged(request.sampling)


# -- writing ----------------------------------------------------------------------------------------------------


def _prompt_record(request: GenerationRequest) -> dict[str, Any]:
    if request.messages is not None:
        return {"messages": [_message_record(message) for message in request.messages]}
    if request.prompt is not None:
        return {"prompt": request.prompt}
    return {"prompt_token_ids": list(request.prompt_token_ids or ())}


def _beginning_record(request: GenerationRequest) -> dict[str, Any]:
    found: dict[str, Any] = {"continue_final_message": True} if request.continue_final_message else {}
    if request.continue_token_ids:
        found["continue_token_ids"] = list(request.continue_token_ids)
    return found


def _message_record(message: ChatMessage) -> dict[str, Any]:
    return {
        "role": message.role,
        "content": message.content,
        "name": message.name,
        "reasoning_content": message.reasoning_content,
        "tool_calls": [{"id": c.id, "name": c.name, "arguments": c.arguments} for c in message.tool_calls],
        "tool_call_id": message.tool_call_id,
    }


def _sampling_value(name: str, value: Any) -> Any:
    kind = SAMPLING_FIELDS[name].kind
    if isinstance(kind, TokenBiases):
        return {str(token): bias for token, bias in value}
    if isinstance(kind, Integer) and value is not None:
        return written_integer(value)
    return list(value) if isinstance(value, tuple) else value


def _constraint_record(constraint: Constraint | None) -> dict[str, Any] | None:
    if constraint is None:
        return None
    value = list(constraint.value) if constraint.kind == "choice" else constraint.value
    text = text_of_json(value, constraint.param)
    return {"kind": constraint.kind, "value": text, "strict": constraint.strict}


def _choice_record(choice: ToolChoice) -> dict[str, Any]:
    allowed = {"allowed": list(choice.allowed)} if choice.allowed else {}  # receipts of the first release have none
    return {"kind": choice.kind, "name": choice.name, **allowed}


def _tool_record(tool: Tool) -> dict[str, Any]:
    where = f"the tool {tool.name!r:.100}"
    parameters = None if tool.parameters is None else text_of_json(dict(tool.parameters), where)
    return {"name": tool.name, "description": tool.description, "parameters": parameters, "strict": tool.strict}


# -- reading ----------------------------------------------------------------------------------------------------


def _continues(read: Reader) -> bool:
    if not read.has("continue_final_message"):
        return False
    if not read.flag("continue_final_message"):
        raise ReceiptError("request.continue_final_message is false: then it is left out.")
    return True


def _continued_ids(read: Reader) -> tuple[int, ...] | None:
    if not read.has("continue_token_ids"):
        return None
    if not (ids := read.ids("continue_token_ids")):
        raise ReceiptError("request.continue_token_ids holds nothing: then it is left out.")
    return ids


def _messages(values: list[Any]) -> tuple[ChatMessage, ...]:
    names = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id")
    messages = []
    for i, value in enumerate(values):
        read = Reader(value, f"request.messages.{i}", names)
        messages.append(
            ChatMessage(
                read.one_of("role", "system", "developer", "user", "assistant", "tool"),
                read.text_or_none("content"),
                read.text_or_none("name"),
                read.text_or_none("reasoning_content"),
                tuple(_call(call, f"{read.where}.tool_calls.{j}") for j, call in enumerate(read.list("tool_calls"))),
                read.text_or_none("tool_call_id"),
            )
        )
    return tuple(messages)


def _call(value: Any, where: str) -> ToolCall:
    read = Reader(value, where, ("id", "name", "arguments"))
    return ToolCall(read.text("id"), read.text("name"), read.text("arguments"))


def _sampling(value: Any) -> dict[str, Any]:
    read = Reader(value, "request.sampling", tuple(SAMPLING_FIELDS))
    fields = {
        name: number_of(read.any(name)) if isinstance(field.kind, Integer) else read.any(name)
        for name, field in SAMPLING_FIELDS.items()
    }
    try:
        params = SamplingParams.merged(fields)
    except RequestError as error:
        raise ReceiptError(f"request.sampling: {error.message}") from None
    for name in ("max_tokens", "seed"):
        if getattr(params, name) is None:
            raise ReceiptError(f"request.sampling.{name} is null: without it the reply cannot be computed again.")
    return {name: getattr(params, name) for name in SAMPLING_FIELDS}


def _constraint(value: Any) -> Constraint | None:
    if value is None:
        return None
    read = Reader(value, "request.constraint", ("kind", "value", "strict"))
    kind: Any = read.one_of("kind", "json", "regex", "choice", "grammar", "gbnf")
    return Constraint(kind, json_of(read.text("value"), "request.constraint.value"), read.flag("strict"))


def _choice(value: Any) -> ToolChoice:
    where = "request.tool_choice"
    read = Reader(value, where, ("kind", "name"), ("allowed",))
    kind: Any = read.one_of("kind", "auto", "required", "function")
    allowed = read.list("allowed") if read.has("allowed") else []
    if not all(isinstance(name, str) for name in allowed) or (read.has("allowed") and not allowed):
        raise ReceiptError(f"{where}.allowed must be a list of names.")
    try:
        return ToolChoice(kind, read.text_or_none("name"), tuple(allowed))
    except RequestError as error:
        raise ReceiptError(f"request.{error.message}") from None


def _tool(value: Any, where: str) -> Tool:
    read = Reader(value, where, ("name", "description", "parameters", "strict"))
    parameters = read.text_or_none("parameters")
    schema = None if parameters is None else json_of(parameters, f"{where}.parameters")
    if schema is not None and not isinstance(schema, Mapping):
        raise ReceiptError(f"{where}.parameters must be the text of an object.")
    return Tool(read.text("name"), read.text_or_none("description"), schema, read.flag("strict"))


def _clock(value: str | None) -> dt.datetime | None:
    try:
        return None if value is None else dt.datetime.fromisoformat(value)
    except ValueError:
        raise ReceiptError("request.clock must be a time as in 2026-11-26T12:00:00.") from None
