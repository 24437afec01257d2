"""`SamplingParams`: how tokens are chosen and when they stop.

Each field is declared once, with its default, its range and its description. The checks here, the fields that the
server reads from a request body, the OpenAPI document and docs/reference/api.md follow from the declaration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from engine.errors import InvalidParameter
from engine.types.sampling_fields import (
    INT64_MAX,
    INT64_MIN,
    Flag,
    Integer,
    Number,
    OneOf,
    SamplingField,
    Strings,
    TokenBiases,
    TokenIds,
    sampling_field,
    sampling_fields,
)

LogprobsMode = Literal["raw", "processed"]

_STOP: Final = Strings(most=16, longest=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when they stop. Constructing one checks every range.

    Raises:
        InvalidFormat: a value of the wrong type.
        InvalidParameter: a value outside its range; `param` names the field.
    """

    n: int = sampling_field(1, Integer(1), "Choices; choice 0 is the answer to n = 1.")
    max_tokens: int | None = sampling_field(
        None,
        Integer(0),
        "Cap on generated tokens; clamped to what is left of the context. 0 computes the prompt and draws nothing; -1 "
        "sets no cap.",
        off=-1,
    )
    temperature: float = sampling_field(1.0, Number(0.0, 2.0), "0 is greedy; the lowest token id wins a tie.")
    top_p: float = sampling_field(1.0, Number(0.0, 1.0), "Keep the likeliest tokens up to this mass, at least one.")
    top_k: int = sampling_field(0, Integer(0), "Keep this many tokens; 0 and -1 keep all.", extension=True, off=-1)
    min_p: float = sampling_field(
        0.0, Number(0.0, 1.0), "Keep tokens at least this likely, as a share of the likeliest.", extension=True
    )
    presence_penalty: float = sampling_field(
        0.0, Number(-2.0, 2.0), "Subtracted once from the logit of every token generated so far."
    )
    frequency_penalty: float = sampling_field(
        0.0, Number(-2.0, 2.0), "Subtracted for every time a token was generated so far."
    )
    repetition_penalty: float = sampling_field(
        1.0, Number(0.01, 100.0), "As in transformers, over prompt and answer.", extension=True
    )
    logit_bias: tuple[tuple[int, float], ...] = sampling_field(
        (), TokenBiases(-100.0, 100.0), "Token id → bias; -100 bans."
    )
    seed: int | None = sampling_field(
        None,
        Integer(INT64_MIN, INT64_MAX),
        "Same seed, same system_fingerprint, same request (with fields left out: same defaults_fingerprint, too): same "
        "bytes. Drawn and returned if omitted.",
    )
    stop: tuple[str, ...] = sampling_field(
        (),
        _STOP,
        f"Ends the answer before any of these texts; at most {_STOP.most}, each of 1 to {_STOP.longest} characters.",
    )
    stop_token_ids: tuple[int, ...] = sampling_field(
        (), TokenIds(most=256), "Token ids that end the answer.", extension=True
    )
    min_tokens: int = sampling_field(0, Integer(0), "The answer does not end before this many tokens.", extension=True)
    ignore_eos: bool = sampling_field(False, Flag(), "Go on after the end token.", extension=True)
    logprobs: bool = sampling_field(False, Flag(), "One entry per generated token.")
    top_logprobs: int = sampling_field(0, Integer(0, 20), "Alternatives returned per token; requires logprobs.")
    logprobs_mode: LogprobsMode = sampling_field(
        "raw",
        OneOf(get_args(LogprobsMode)),
        "The model's own distribution, or the one that was drawn from.",
        extension=True,
    )
    prompt_logprobs: int | None = sampling_field(
        None,
        Integer(0, 20),
        "The raw log-probability of each prompt token, with this many alternatives.",
        extension=True,
    )
    margins: bool = sampling_field(
        False,
        Flag(),
        "Per generated token: how far the best perturbed score was ahead of the second best.",
        extension=True,
    )
    return_token_ids: bool = sampling_field(False, Flag(), "`token_ids` beside each choice.", extension=True)
    thinking_budget: int | None = sampling_field(
        None, Integer(0), "Tokens of thought after which the engine closes the thoughts.", extension=True
    )

    def __post_init__(self) -> None:
        for name, field in SAMPLING_FIELDS.items():
            object.__setattr__(self, name, field.checked(name, getattr(self, name)))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter(
                f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}.", param="min_tokens"
            )

    @classmethod
    def merged(cls, *layers: Mapping[str, Any]) -> SamplingParams:
        """Build from layers of given fields; a later layer wins. The model's defaults come first, then the request.

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


SAMPLING_FIELDS: Final[Mapping[str, SamplingField]] = sampling_fields(SamplingParams)
"""Every field of `SamplingParams` as it is declared, by name."""
