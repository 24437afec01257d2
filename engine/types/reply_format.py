"""`ReplyFormat`: how to read a reply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.types.tools import Tool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyFormat:
    """How to split one request's replies into thoughts, answer and tool calls, and what to check at their end.

    Plain data, decided by the request and its prompt. The chat format says how the model writes each part.
    """

    chat: bool = False
    """Whether the prompt was rendered by the chat template. The reply to a plain prompt holds no thoughts."""
    thinking: bool = False
    """Whether the prompt ends inside the thoughts, so that the reply begins with them."""
    opening: str = ""
    """The beginning of the reply that the prompt has already written, for models read by a response template."""
    previous: int | None = None
    """The token of text before the first one of the reply: a tokenizer may write a token in the middle of a text
    otherwise than at its beginning. The prompt's last one, where the reply goes on with the prompt's text. Any one,
    where the reply is held to a form from its beginning: then its first token keeps its space. Else None."""
    tools: tuple[Tool, ...] = ()
    """The tools whose calls are recognised. Without any, calls stay text."""
    parallel_tool_calls: bool = True
    """Whether a reply may hold several calls. If not, it ends with the first."""
    exact_calls: bool = False
    """Whether a grammar holds the reply. Then only what the chat format writes, to the letter, is a call."""
    calls_or_answer: bool = False
    """Whether the reply is either calls or an answer under a constraint. Then a call inside the answer is text."""
    unenforced_schema: Any = None
    """The answer's JSON schema, if the grammar enforces only part of it: the finished answer is validated."""
    unenforced_tools: frozenset[str] = frozenset()
    """Names of tools whose schemas the grammar enforces only in part: the arguments of their calls are validated."""

    def tool(self, name: str) -> Tool | None:
        """Return the tool of this name; None if the request has none."""
        return next((tool for tool in self.tools if tool.name == name), None)
