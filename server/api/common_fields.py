"""Reads the fields that several endpoints have: the model, the stream's options, the cache salt, annotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from engine import InvalidParameter, ModelNotFound, Unsupported
from server.api.fields import MAX_SALT, BodyFields
from server.api.parsing import FLAG, INTEGER, optional, required, typed

__all__ = ["Common", "read_common", "read_ending", "read_model", "read_token_ids"]

MAX_MODEL: Final = 512
"""Characters of a model's name. No model here has a longer one."""
STREAM_OPTIONS: Final = ("include_usage", "continuous_usage_stats", "include_obfuscation")


@dataclass(frozen=True, slots=True)
class Common:
    """What bodies for completions have in common.

    Attributes:
        receipt: as in `ParsedRequest`.
        ignored: dotted names of unknown fields, to be added to.
    """

    stream: bool
    include_usage: bool
    cache_salt: str
    receipt: bool | Literal["digest"]
    ignored: list[str]


def read_common(fields: BodyFields, data: Mapping[str, Any]) -> Common:
    """Read the common fields of a body, and refuse those that this build cannot honour.

    Raises:
        InvalidFormat: a field of the wrong type.
        InvalidParameter: right type, wrong value; Unsupported: a field this build cannot honour.
    """
    ignored = [name for name in data if name not in fields.known]
    fields.refuse_unsupported(data)
    stream = fields.given(data, "stream") or False
    include_usage = _stream_options(fields, data, stream, ignored)
    _check_annotations(fields, data)
    return Common(stream, include_usage, _cache_salt(fields, data), _receipt(fields, data), ignored)


def read_model(fields: BodyFields, data: Mapping[str, Any]) -> str:
    """Read the model's name.

    Raises:
        InvalidFormat: it is missing, or no string.
        ModelNotFound: no model has a name so long.
    """
    return _checked_model(required(data, "model", fields.honoured["model"].kind))


def read_optional_model(fields: BodyFields, data: Mapping[str, Any]) -> str | None:
    """Read the model's name where it may be left out; None if it is.

    Raises: as `read_model`.
    """
    model = fields.given(data, "model")
    return None if model is None else _checked_model(model)


def read_ending(fields: BodyFields, data: Mapping[str, Any]) -> tuple[bool, bool]:
    """Read how the prompt of a conversation ends: whether the reply goes on with its last message, and whether the
    beginning of the assistant's turn follows.

    Raises:
        InvalidFormat: a field of the wrong type.
        InvalidParameter: both are asked for.
    """
    goes_on, again = (fields.given(data, name) for name in ("continue_final_message", "add_generation_prompt"))
    if goes_on and again:
        raise InvalidParameter(
            "add_generation_prompt must not be true with continue_final_message: the last message is gone on with, and "
            "no other turn begins.",
            param="add_generation_prompt",
        )
    return bool(goes_on), again is not False


def read_token_ids(fields: BodyFields, data: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    """Read a list of token ids; None if it is absent.

    Raises:
        InvalidFormat: it is no list of integers.
    """
    given = fields.given(data, name)
    return None if given is None else tuple(typed(token, f"{name}.{i}", INTEGER) for i, token in enumerate(given))


def _checked_model(model: str) -> str:
    if len(model) > MAX_MODEL:
        raise ModelNotFound(f"the model {model[:100]!r}… does not exist.", param="model")
    return model


def _cache_salt(fields: BodyFields, data: Mapping[str, Any]) -> str:
    salt = fields.given(data, "cache_salt")
    if salt is not None and not 1 <= len(salt) <= MAX_SALT:
        raise InvalidParameter(
            f"cache_salt must have between 1 and {MAX_SALT} characters, not {len(salt)}.", param="cache_salt"
        )
    return salt or ""


def _receipt(fields: BodyFields, data: Mapping[str, Any]) -> bool | Literal["digest"]:
    given: bool | Literal["digest"] | None = fields.given(data, "receipt")
    if isinstance(given, str) and given != "digest":
        raise InvalidParameter(f"receipt must be true, false or digest, not {given[:100]!r}.", param="receipt")
    return given or False


def _stream_options(fields: BodyFields, data: Mapping[str, Any], stream: bool, ignored: list[str]) -> bool:
    """Read whether the stream ends with the usage."""
    options = fields.given(data, "stream_options") if "stream_options" in fields.honoured else None
    if options is None:
        return False
    if not stream:
        raise InvalidParameter("stream_options is only allowed with stream: true.", param="stream_options")
    include_usage, *unsupported = (optional(options, name, FLAG, "stream_options.") for name in STREAM_OPTIONS)
    for name, value in zip(STREAM_OPTIONS[1:], unsupported, strict=True):
        if value:
            name = f"stream_options.{name}"
            raise Unsupported(f"{name} is not supported by this build.", param=name)
    ignored += [f"stream_options.{key}" for key in options if key not in STREAM_OPTIONS]
    return bool(include_usage)


def _check_annotations(fields: BodyFields, data: Mapping[str, Any]) -> None:
    """Check `user` and `metadata`. They are for the client's own records and change nothing, whatever is in them."""
    if "user" in fields.honoured:
        fields.given(data, "user")
    fields.given(data, "metadata")
