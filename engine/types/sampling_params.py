"""`SamplingParams`: how tokens are chosen and when they stop. Ranges are checked here alone, for server and scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from engine.errors import InvalidFormat, InvalidParameter

LogprobsMode = Literal["raw", "processed"]

MAX_STOP_STRINGS: Final = 16
MAX_STOP_LENGTH: Final = 1024  # characters
MAX_STOP_TOKEN_IDS: Final = 256
MAX_TOP_LOGPROBS: Final = 20
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1


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
