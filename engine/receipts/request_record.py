"""The record of a request: a `GenerationRequest` with every default filled in, as plain JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.types.requests import GenerationRequest
from engine.types.sampling_params import SamplingParams

__all__ = ["from_record", "to_record"]


def to_record(request: GenerationRequest, params: SamplingParams) -> dict[str, Any]:
    """Return the record of a request that was prepared with `params`.

    Raises:
        ReceiptError: it holds something that JSON cannot write.
    """
    raise NotImplementedError


def from_record(record: Mapping[str, Any], request_id: str, *, group: str = "") -> GenerationRequest:
    """Return the request of a record, with `record` set.

    Raises:
        ReceiptError: the record is not what `to_record` writes.
    """
    raise NotImplementedError
