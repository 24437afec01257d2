"""`GenerationRequest`, what a caller asks for, and `PreparedRequest`, what the engine runs."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.types.messages import ChatMessage
from engine.types.reply_format import ReplyFormat
from engine.types.sampling_params import SamplingParams
from engine.types.tools import AUTO, Tool, ToolChoice


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form that a reply must have. `param`: the request's field that asks for it, for error messages.

    `kind` and `value`: `json`, a JSON schema (with `strict`, enforced whole or refused); `regex`, an expression;
    `choice`, a list of texts; `grammar`, Lark in llguidance's dialect; `gbnf`, a grammar in llama.cpp's language.
    """

    kind: Literal["json", "regex", "choice", "grammar", "gbnf"]
    value: Any
    strict: bool = True
    param: str = "response_format"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a caller asks for. Exactly one of `messages`, `prompt` and `prompt_token_ids` is given.

    `sampling` holds only the fields that were given, so that the model's own defaults can fill the rest.
    """

    request_id: str
    messages: tuple[ChatMessage, ...] | None = None
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_field: str | None = None
    """The name of the prompt in error messages (`prompt.3`), where the caller knows it by another than it has here."""
    suffix: str | None = None
    """The text that comes after the reply, which fills the gap between `prompt` and it. Only for models whose tokenizer
    has tokens for this."""
    add_special_tokens: bool = True
    """Whether `prompt` is encoded with the tokens that the tokenizer puts around a text."""
    add_generation_prompt: bool = True
    """Whether the prompt made of `messages` ends with the beginning of the assistant's turn."""
    continue_final_message: bool = False
    """Whether the last of `messages`, the assistant's, is the beginning of the reply, which goes on behind its last
    character. Then `add_generation_prompt` does not matter."""
    continue_token_ids: tuple[int, ...] | None = None
    """Tokens with which the reply begins, behind the prompt. The first tokens of a reply are followed by the same ones
    as in it."""
    echo: bool = False
    """Whether the prepared request tells the prompt's text, token by token."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    reasoning_effort: str | None = None
    tools: tuple[Tool, ...] = ()
    """The tools that the model may call. Without any, calls in the reply are text."""
    parallel_tool_calls: bool = True
    tool_choice: ToolChoice = AUTO
    group: str = ""
    """The group that the request belongs to: its key's. Waiting groups are served in turn; each has a prefix cache of
    its own, unless the entry shares one. A reply does not depend on it."""
    context_limit: int | None = None
    """Tokens, prompt and reply together, that the caller may use; None: as many as the model's context holds."""
    cache_salt: str = ""
    """Only requests with the same salt find each other's prompts in the group's prefix cache."""
    prediction: str | None = None
    """A text that the reply may hold much of. It is tried as a draft: the reply stays the same and comes sooner."""
    record: bool = False
    """Whether the outputs tell what a receipt holds: the raw log-probability and the perturbed score of
    every token that is drawn."""
    clock: dt.datetime | None = None
    """What a chat template that prints the time reads; None: the entry's clock, else the real one."""
    adapter: str = ""
    """The adapter that computes the reply beside the model's own weights; empty: none."""


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt as text, for replies that begin with it.

    Attributes:
        text: what the caller sent; of token ids their text, special tokens as their names.
        tokens: the text of each token, written as log-probabilities write tokens.
        offsets: for each token the characters of `text` before it.
    """

    text: str
    tokens: tuple[str, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """The tokens of a prompt. `strings`: each as the tokenizer's vocabulary spells it."""

    tokens: tuple[int, ...]
    strings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request that passed all checks: only a full queue can still refuse it.

    `params.max_tokens` and `params.seed` are filled in; `prompt_token_ids` is not empty and leaves room for one token.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    begun: int = 0
    """How many of the last tokens are no prompt but the beginning of the reply."""
    begun_param: str = "continue_final_message"
    """The request's field that gave this beginning, for error messages."""
    grammar: str | None = None
    """The grammar that the reply must satisfy, in llguidance's dialect of Lark; None for free text."""
    grammar_param: str = "response_format"
    """The request's field that asks for the grammar, for error messages."""
    reply_format: ReplyFormat = field(default_factory=ReplyFormat)
    ignored: tuple[str, ...] = ()
    """Fields that have no effect on this model."""
    left_out: tuple[str, ...] = ()
    """Dotted names of keywords of schemas that do not hold the reply: some say nothing, others cannot be enforced."""
    group: str = ""
    echo: EchoedPrompt | None = None
    """The prompt as text, if the request asks for it."""
    cache_share: tuple[str, ...] = ()
    """The share of the prefix cache that the request reads and fills. Keys and values depend on the adapter: each has
    shares of its own."""
    prediction: tuple[int, ...] = ()
    """Tokens that the replies may hold many of."""
    record: bool = False
    """Whether the outputs hold `scores`."""
    follow: tuple[tuple[int, ...], ...] | None = None
    """By choice: the tokens of a reply that is checked. The choice takes them, whatever it draws, and the outputs hold
    `checks`. None: choices take what they draw."""
    adapter: str = ""
    """The adapter that computes the reply; empty: none."""
