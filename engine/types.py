"""The messages that cross between engine and caller: frozen, picklable, free of torch and of HTTP.

What a request asks for (`GenerationRequest`, `SamplingParams`), what it became (`PreparedRequest`), and what comes
back step by step (`RequestOutput`). Ranges that need no model to check are checked here, in one place, for the
server and for scripts alike; those that need one (the vocabulary, the context) are checked in `prepare`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from engine.errors import InvalidFormat, InvalidParameter, VerbatimError

FinishReason = Literal["stop", "length", "tool_calls"]
LogprobsMode = Literal["raw", "processed"]

MAX_STOP_STRINGS: Final = 16
MAX_STOP_LENGTH: Final = 1024  # characters
MAX_STOP_TOKEN_IDS: Final = 256
MAX_TOP_LOGPROBS: Final = 20
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1
NEGATIVE_INFINITY_LOGPROB: Final = -9999.0
"""What a log-probability of minus infinity is written as: JSON has no infinities (the OpenAI API does the same)."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model makes. `arguments`: a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. `role` is one of `system`, `developer`, `user`, `assistant`, `tool`.

    `reasoning_content`: an assistant's thoughts, for templates that show earlier ones to the model. `tool_calls`: what
    an assistant called; `tool_call_id`: the call that a `tool` turn answers.
    """

    role: str
    content: str | None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when they stop. Constructing one checks every range.

    Raises:
        InvalidFormat: a value of the wrong type.
        InvalidParameter: a value outside its range; `param` names the field.
    """

    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias) pairs, ids ascending and unique. A bias of -100 bans the token."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    logprobs_mode: LogprobsMode = "raw"
    return_token_ids: bool = False
    thinking_budget: int | None = None
    """Tokens of thought after which the thoughts are closed by force."""

    def __post_init__(self) -> None:
        _integer(self, "n", 1, None)
        if self.max_tokens is not None:
            _integer(self, "max_tokens", 1, None)
        _number(self, "temperature", 0.0, 2.0)
        _number(self, "top_p", 0.0, 1.0)
        _integer(self, "top_k", 0, None)
        _number(self, "min_p", 0.0, 1.0)
        _number(self, "presence_penalty", -2.0, 2.0)
        _number(self, "frequency_penalty", -2.0, 2.0)
        _number(self, "repetition_penalty", 0.01, 100.0)
        if self.seed is not None:
            _integer(self, "seed", INT64_MIN, INT64_MAX)
        _integer(self, "min_tokens", 0, None)
        if self.thinking_budget is not None:
            _integer(self, "thinking_budget", 0, None)
        for name in ("ignore_eos", "logprobs", "return_token_ids"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidFormat(f"{name} must be true or false, not {getattr(self, name)!r}.", param=name)
        _integer(self, "top_logprobs", 0, MAX_TOP_LOGPROBS)
        if self.logprobs_mode not in ("raw", "processed"):
            raise InvalidParameter(
                f"logprobs_mode must be 'raw' or 'processed', not {self.logprobs_mode!r}.", param="logprobs_mode"
            )
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter(
                f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}.", param="min_tokens"
            )

    @classmethod
    def merged(cls, *layers: Mapping[str, Any]) -> SamplingParams:
        """Build from layers of given fields, the last one wins: the model's defaults, then the request's own.

        Raises:
            InvalidParameter: a field that does not exist.
        """
        given: dict[str, Any] = {}
        for layer in layers:
            given.update(layer)
        for name in given:
            if name not in SAMPLING_FIELDS:
                raise InvalidParameter(f"{name} is not a sampling parameter.", param=name)
        if given.get("top_logprobs") and not given.get("logprobs"):
            raise InvalidParameter("top_logprobs needs logprobs: true.", param="top_logprobs")
        return cls(**given)


SAMPLING_FIELDS: Final = frozenset(f.name for f in dataclasses.fields(SamplingParams))


def _integer(owner: object, name: str, low: int, high: int | None) -> None:
    value = getattr(owner, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidFormat(f"{name} must be an integer, not {value!r}.", param=name)
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidParameter(f"{name} must be {limit}, not {value}.", param=name)


def _number(owner: object, name: str, low: float, high: float) -> None:
    value = getattr(owner, name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidFormat(f"{name} must be a number, not {value!r}.", param=name)
    if not low <= value <= high:  # False for NaN too
        raise InvalidParameter(f"{name} must be between {low:g} and {high:g}, not {value!r}.", param=name)
    object.__setattr__(owner, name, float(value))


def _stop_strings(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(s, str) for s in stops):
        raise InvalidFormat(f"stop must be a string or a list of strings, not {stop!r}.", param="stop")
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidParameter(f"stop takes at most {MAX_STOP_STRINGS} strings, not {len(stops)}.", param="stop")
    for s in stops:
        if not s:
            raise InvalidParameter("stop must not contain an empty string: it would match at once.", param="stop")
        if len(s) > MAX_STOP_LENGTH:
            raise InvalidParameter(
                f"a stop string may have at most {MAX_STOP_LENGTH} characters, not {len(s)}.", param="stop"
            )
    return tuple(dict.fromkeys(stops))


def _stop_token_ids(ids: Any) -> tuple[int, ...]:
    name = "stop_token_ids"
    if not isinstance(ids, Sequence) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InvalidFormat(f"{name} must be a list of integers, not {ids!r}.", param=name)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidParameter(f"{name} takes at most {MAX_STOP_TOKEN_IDS} ids, not {len(ids)}.", param=name)
    return tuple(sorted(set(ids)))


def _logit_bias(bias: Any) -> tuple[tuple[int, float], ...]:
    """Accept a mapping (keys may be digit strings, as JSON has them) or pairs; return ascending pairs."""
    if not isinstance(bias, Mapping | tuple):
        raise InvalidFormat(f"logit_bias must map token ids to numbers, not {bias!r}.", param="logit_bias")
    items = bias.items() if isinstance(bias, Mapping) else bias
    out: dict[int, float] = {}
    for key, value in items:
        try:
            token = key if isinstance(key, int) and not isinstance(key, bool) else _digits(key)
        except ValueError:
            raise InvalidParameter(f"logit_bias: {key!r} is not a token id.", param=f"logit_bias.{key}") from None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InvalidFormat(
                f"logit_bias: the bias of token {token} must be a number, not {value!r}.", param=f"logit_bias.{key}"
            )
        if not -100.0 <= value <= 100.0:
            raise InvalidParameter(
                f"logit_bias: the bias of token {token} must be between -100 and 100, not {value!r}.",
                param=f"logit_bias.{key}",
            )
        out[token] = float(value)
    return tuple(sorted(out.items()))


def _digits(key: object) -> int:
    # int() alone would also take " 7", "07", "1_0" and Arabic digits: two spellings of one id in one object.
    if not isinstance(key, str) or not key.isascii() or not key.isdigit() or len(key) > 18 or key != str(int(key)):
        raise ValueError(key)
    return int(key)


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
    """What the reply is held to, as `engine.grammar` writes it."""
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


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """`token` is text, or `bytes:\\xe2\\x80` for a token that is no whole character; `bytes` its true bytes."""

    token_id: int
    token: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token. A special token that adds no text (an end token) has empty `bytes`."""

    token_id: int
    token: str
    bytes: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one step added to one choice. Joined over all steps they are the whole answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls that became whole in this step."""
    schema_error: str | None = None
    """With the finish reason, where a schema could not be enforced whole: why the text is not valid; empty if it is."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    """Over all choices."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step did for one request. `finished` is set exactly once, on the last output; `error` only there."""

    request_id: str
    deltas: tuple[ChoiceDelta, ...]
    usage: Usage
    finished: bool = False
    error: VerbatimError | None = None


@dataclass(frozen=True, slots=True)
class LawReport:
    """What the load-time self-test found: do the bits of a reply depend on the request alone, here?"""

    holds: bool
    reason: str
    """One sentence; why not, if not."""
    checks: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is known of a loaded model."""

    id: str
    created: int
    """Unix seconds of the checkpoint's newest file: a property of the model, not of this process."""
    architecture: str
    runner: Literal["packed", "fallback"]
    device: str
    dtype: str
    context_length: int
    cache_tokens: int
    max_sequences: int
    vocab_size: int
    system_fingerprint: str
    law: LawReport
    default_sampling: Mapping[str, Any]
    weight_bytes: int
    linear: str = "torch"
    """What computes the linear layers: `native` (compiled here), `native int8`, `packed`, `strict` or `torch`."""
    reasoning: tuple[str, str] | None = None
    """What stands before and after the model's thoughts; None if its template knows of none."""
    tool_calls: str = ""
    """How the model is taken to write a tool call."""
    tool_calls_source: str = "generic"
    """Where that was learnt: `models.yaml`, `tokenizer`, `chat template`, `table (NAME)`, or `generic`: the template
    knows no tools, and they are explained in a system turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot, cheap enough to be asked for at every scrape."""

    alive: bool
    stalled: bool
    """True when there is work and no step has ended for longer than the stall limit."""
    waiting: int
    running: int
    steps: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    blocks_total: int
    blocks_free: int
    drafted_tokens: int = 0
    """Tokens that were guessed, of which `accepted_tokens` came."""
    accepted_tokens: int = 0


def clean_logprob(value: float) -> float:
    """A log-probability as JSON can carry it."""
    return value if math.isfinite(value) else NEGATIVE_INFINITY_LOGPROB
