"""Compares a reply of the API with the receipt inside it. The reply's text is not compared, only what both hold.

A reply is a completion, which has `choices`, or a response, which has `output` and is one choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from engine.receipts.canonical import digest_of_ids
from engine.receipts.receipt import ChoiceRecord, Receipt

__all__ = ["is_reply", "reply_difference"]


def is_reply(value: Mapping[str, Any]) -> bool:
    """Return whether an object is a whole reply of the API."""
    if value.get("type") == "message":
        return True
    if value.get("object") == "response":
        return isinstance(value.get("output"), list)
    return isinstance(value.get("choices"), list) and bool(value["choices"])


_STOP_REASONS: Final = {
    "stop": ("end_turn", "stop_sequence"),
    "length": ("max_tokens",),
    "tool_calls": ("tool_use", "end_turn"),
}
"""By finish reason, the stop reasons of Anthropic's API that tell it."""


def reply_difference(reply: Mapping[str, Any], receipt: Receipt, number: int = 0, prompts: int = 1) -> str | None:
    """Say in what a reply is not the one that its receipt is of; None if nothing is found.

    Compared are the id, the number of choices, their finish reasons, and their token ids if the reply has them.

    Args:
        reply: as it was sent, with `choices` or `output`; or a message, as Anthropic's API has it.
        number: of the receipt's prompt, from 0; prompts: how many the reply is to.
    """
    expected = str(reply.get("id")) + (f"-{number}" if number else "")
    if expected != receipt.id:
        return f"the reply has the id {expected!r:.100}, and its receipt {receipt.id!r:.100}"
    if reply.get("object") == "response":
        return _response_difference(reply, receipt)
    if reply.get("type") == "message":
        return _message_difference(reply, receipt)
    choices, n = reply["choices"], len(receipt.choices)
    if len(choices) != n * prompts:
        return f"the reply has {len(choices)} choices, and its receipt {n}" + (
            " for each prompt" if prompts > 1 else ""
        )
    for choice, record in zip(choices[number * n : (number + 1) * n], receipt.choices, strict=True):
        if not isinstance(choice, dict) or choice.get("index") != number * n + record.index:
            return "the reply's choices are not numbered from 0"
        if (reason := choice.get("finish_reason")) != record.finish_reason:
            told = f"{reason!r:.40} in the reply, and {record.finish_reason!r} in its receipt"
            return f"the finish reason of choice {choice['index']} is {told}"
        if "token_ids" in choice and not _same_tokens(choice["token_ids"], record):
            return f"choice {choice['index']} has other token ids in the reply than in its receipt"
    return None


def _response_difference(reply: Mapping[str, Any], receipt: Receipt) -> str | None:
    if len(receipt.choices) != 1:
        return f"the reply is a response, which is one choice, and its receipt has {len(receipt.choices)}"
    [record] = receipt.choices
    expected = "incomplete" if record.finish_reason == "length" else "completed"
    if (status := reply.get("status")) != expected:
        return f"the status is {status!r:.40} in the reply, and {expected!r} by its receipt"
    if "token_ids" in reply and not _same_tokens(reply["token_ids"], record):
        return "the reply has other token ids than its receipt"
    return None


def _message_difference(message: Mapping[str, Any], receipt: Receipt) -> str | None:
    """Say in what a message is not the one that its receipt is of. It tells no token ids."""
    if len(receipt.choices) != 1:
        return f"a message is one choice, and its receipt has {len(receipt.choices)}"
    expected = receipt.choices[0].finish_reason
    if (reason := message.get("stop_reason")) not in _STOP_REASONS[expected]:
        return f"the stop reason is {reason!r:.40} in the message, and {expected!r} in its receipt"
    return None


def _same_tokens(ids: Any, record: ChoiceRecord) -> bool:
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 1 << 32 for token in ids):
        return False
    return len(ids) == record.tokens and digest_of_ids(ids) == record.sha256
