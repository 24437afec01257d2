"""The forms in which models write tool calls, for tests of what reads them and of what enforces them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from engine import ReplyFormat, Tool
from engine.replies.tool_calls.reader import CallReader
from engine.replies.tool_format import CALL_ID, GENERIC, ToolFormat

HERMES = GENERIC
LISTED = ToolFormat("json", "[TOOL_CALLS][", '{"name": "', '", "arguments": ', f', "id": "{CALL_ID}"}}', ", ", "]")
FENCED = ToolFormat("json", "<calls>", "<call>function<sep>", "\n```json\n", "\n```</call>", "\n", "</calls>")
CLOSE = ToolFormat("json", "<calls>", "<call>", "<sep>", "</call>", "", "</calls>")
BARE = ToolFormat("json", "", '{"name": "', '", "parameters": ', "}", None, "")
XML = ToolFormat(
    "pairs", "", "<tool_call>\n<function=", ">", "\n</function>\n</tool_call>", "\n", "",
    "\n<parameter=", ">\n", "\n</parameter>",
)  # fmt: skip
KEYED = ToolFormat(
    "pairs", "", "<tool_call>", "", "\n</tool_call>", "\n", "", "\n<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>"
)
FORMATS = {
    "hermes": HERMES, "listed": LISTED, "fenced": FENCED, "close": CLOSE, "bare": BARE, "xml": XML, "keyed": KEYED,
}  # fmt: skip


def written(found: ToolFormat, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls as a model writes them."""

    def arguments(given: dict[str, Any]) -> str:
        if found.style == "json":
            return json.dumps(given)
        values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in given.items()}
        return "".join(f"{found.key_open}{k}{found.value_open}{v}{found.value_close}" for k, v in values.items())

    texts = [
        f"{found.open}{n}{found.middle}{arguments(a)}{found.close.replace(CALL_ID, 'x1y2z3a4b')}" for n, a in calls
    ]
    return found.begin + (found.between or "").join(texts) + found.end


def read(found: ToolFormat, pieces: list[str], tools: Sequence[Tool], **how: bool) -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls, with their arguments as values, of a reply in pieces."""
    reader = CallReader(found, ReplyFormat(tools=tuple(tools), **how))
    parts = [reader.push(piece) for piece in pieces] + [reader.finish()]
    calls = [(name, json.loads(arguments)) for _, told in parts for name, arguments in told]
    return "".join(text for text, _ in parts), calls
