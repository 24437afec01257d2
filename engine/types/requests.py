"""What a caller asks for (`GenerationRequest`), and what it became (`PreparedRequest`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.types.messages import ChatMessage
from engine.types.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a reply must be. `param` is the request's field that asks for it, for messages.

    `kind` and `value`: `json`, a JSON schema (with `strict`, enforced whole or refused); `regex`, an expression;
    `choice`, a list of texts; `grammar`, Lark in llguidance's dialect.
    """

    kind: Literal["json", "regex", "choice", "grammar"]
    value: Any
    strict: bool = True
    param: str = "response_format"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a caller wants. Exactly one of `messages`, `prompt` and `prompt_token_ids` is given.

    `sampling` holds only the fields that were given, so that the model's own defaults can fill the rest.
    """

    request_id: str
    messages: tuple[ChatMessage, ...] | None = None
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    reasoning_effort: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    """Definitions in the API's shape. None of them: the reply is not looked at for calls."""
    parallel_tool_calls: bool = True
    tool_choice: str = "auto"
    """`auto`, `required`, or after a colon the name of the one that must be called: `:get_weather`."""
    group: str = ""
    """Whose request it is. Where requests wait, groups take turns; each has a prefix cache of its own, unless the
    entry shares one. A reply does not depend on it."""
    context_limit: int | None = None
    """Tokens, prompt and reply together, that the caller's key allows; None: as many as the model's context holds."""
    cache_salt: str = ""
    """A share of the prefix cache of its own, within the group's: only requests with the same salt find each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request that nothing can refuse any more but a full queue.

    `params.max_tokens` and `params.seed` are filled in; `prompt_token_ids` is not empty and leaves room for one token.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    grammar: str | None = None
    """What the reply is held to, as `engine.grammar.compiler` writes it."""
    unenforced_schema: Any = None
    """A JSON schema that the grammar holds only in part: the finished text is checked against it."""
    unenforced_tools: frozenset[str] = frozenset()
    """Tools whose schemas the grammar holds only in part: the arguments of a call are checked against them."""
    calls_first: bool = False
    """The reply is calls or an answer in a form: a call in the answer is text."""
    chat: bool = False
    """Whether the prompt is a conversation, so that the reply may begin with thoughts."""
    thinks: bool = False
    """Whether the prompt has opened the thoughts."""
    opening: str = ""
    """What the prompt has written of the reply already, where replies are read by a response template."""
    ignored: tuple[str, ...] = ()
    """Fields that have no effect on this model."""
    group: str = ""
    cache_share: tuple[str, ...] = ()
    """Whose prompts may be found in the prefix cache, and may find this one there."""
    tools: tuple[Mapping[str, Any], ...] = ()
    parallel_tool_calls: bool = True
