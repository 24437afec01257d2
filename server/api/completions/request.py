"""Reads the body of a completion of plain text: bytes → a `ParsedRequest` with one request of the engine per prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from engine import GenerationRequest, InvalidFormat, InvalidParameter, Unsupported, whole_number
from server.api.common_fields import read_common, read_model
from server.api.completions.fields import COMPLETION, DEFAULT_MAX_TOKENS, MOST_LOGPROBS, MOST_PROMPTS
from server.api.formats import read_constraint
from server.api.parsing import ParsedRequest, at_most, required
from server.json_text import kind_of, load_body, shown

__all__ = ["parse"]

_FORMS: Final = "text, token ids, or a list of either"


def parse(raw: bytes, request_id: str) -> ParsedRequest:
    """Parse and check a body.

    Raises:
        InvalidFormat: not JSON, not an object, a field missing or of the wrong type.
        InvalidParameter: right type, wrong value; Unsupported: a field this build cannot honour.
    """
    data = load_body(raw)
    model = read_model(COMPLETION, data)
    prompts = _prompts(required(data, "prompt", COMPLETION.honoured["prompt"].kind))
    common = read_common(COMPLETION, data)
    nested: list[str] = []
    echo = bool(COMPLETION.given(data, "echo"))
    sampling = _sampling(data, echo)
    suffix = COMPLETION.given(data, "suffix")
    if suffix and echo:
        raise InvalidParameter("echo and suffix cannot be combined.", param="suffix")
    shared = GenerationRequest(
        request_id=request_id,
        sampling=sampling,
        constraint=read_constraint(COMPLETION, data, nested),
        cache_salt=common.cache_salt,
        suffix=suffix or None,
        add_special_tokens=COMPLETION.given(data, "add_special_tokens") is not False,
        echo=echo,
    )
    generations = [_generation(shared, i, prompt, len(prompts)) for i, prompt in enumerate(prompts)]
    ignored = (*common.ignored, *nested)
    prompt_logprobs = COMPLETION.sampling(data).get("prompt_logprobs")
    return ParsedRequest(
        model, tuple(generations), common.stream, common.include_usage, ignored, prompt_logprobs, common.receipt
    )


def _generation(shared: GenerationRequest, number: int, prompt: str | tuple[int, ...], count: int) -> GenerationRequest:
    return dataclasses.replace(
        shared,
        request_id=f"{shared.request_id}-{number}" if number else shared.request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=None if isinstance(prompt, str) else prompt,
        prompt_field=f"prompt.{number}" if count > 1 else "prompt",
    )


def _prompts(given: Any) -> list[str | tuple[int, ...]]:
    """Read the prompts: one text, several, the token ids of one, or those of several."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidParameter("prompt must not be an empty list.", param="prompt")
    if whole_number(given[0]) is not None:
        return [_token_ids(given, "prompt")]
    at_most(MOST_PROMPTS, len(given), "prompt", "prompts")
    kind = type(given[0])
    if kind not in (str, list):
        raise _wrong("prompt.0", _FORMS, given[0])
    for i, prompt in enumerate(given):
        if type(prompt) is not kind:
            raise _wrong(f"prompt.{i}", "a string, like prompt.0" if kind is str else "a list, like prompt.0", prompt)
    return [p if isinstance(p, str) else _token_ids(p, f"prompt.{i}") for i, p in enumerate(given)]


def _token_ids(given: list[Any], at: str) -> tuple[int, ...]:
    ids = [whole_number(token) for token in given]
    if None in ids:
        i = ids.index(None)
        raise _wrong(f"{at}.{i}", "an integer", given[i])
    return tuple(token for token in ids if token is not None)


def _wrong(at: str, words: str, value: Any) -> InvalidFormat:
    return InvalidFormat(f"{at} must be {words}, not {kind_of(value)}{shown(value)}.", param=at)


def _sampling(data: Mapping[str, Any], echo: bool) -> dict[str, Any]:
    """Read the sampling fields, and say in the engine's words what this endpoint says in its own."""
    found = {"max_tokens": DEFAULT_MAX_TOKENS, **COMPLETION.sampling(data)}
    logprobs = COMPLETION.given(data, "logprobs")
    if logprobs is not None:
        if not 0 <= logprobs <= MOST_LOGPROBS:
            raise InvalidParameter(f"logprobs must be between 0 and {MOST_LOGPROBS}, not {logprobs}.", param="logprobs")
        found.update(logprobs=True, top_logprobs=logprobs)
        if echo:
            found["prompt_logprobs"] = max(logprobs, found.get("prompt_logprobs", 0))
    best_of, n = COMPLETION.given(data, "best_of"), found.get("n", 1)
    if best_of not in (None, 1, n):
        raise Unsupported(f"best_of is not supported by this build, unless it is 1 or n, {n}.", param="best_of")
    return found
