"""Compare two receipts: which part differs first, and how."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from engine.receipts.canonical import canonical, sha256
from engine.receipts.judgement import TextOf, named
from engine.receipts.receipt import ChoiceRecord, Receipt
from engine.types.fingerprint_parts import part_differences

__all__ = ["Difference", "Part", "pair_receipts", "receipt_differences"]

Part = Literal["request", "prompt", "model", "environment", "token", "bits", "finish_reason"]

_SHOWN: Final = 80  # characters of a value in a sentence


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two receipts differ.

    Attributes:
        where: the request's field, the model's file, or `choice 0, position 12`; empty where `part` says it all.
        sentence: the difference for people.
    """

    part: Part
    where: str
    sentence: str


def receipt_differences(a: Receipt, b: Receipt, text_of: TextOf | None = None) -> list[Difference]:
    """List in what two receipts differ, causes first; empty if both record the same reply to the same request.

    When and by whom they were written is not compared. `text_of`: a token's text.
    """
    return [
        *_request(a.request, b.request),
        *_prompt(a, b),
        *_model(dict(a.model.files), dict(b.model.files)),
        *(Difference("environment", "", told) for told in part_differences(a.environment.parts, b.environment.parts)),
        *_choices(a.choices, b.choices, text_of),
    ]


def pair_receipts(a: Iterable[Receipt], b: Iterable[Receipt]) -> Iterator[tuple[Receipt | None, Receipt | None]]:
    """Pair the receipts of two files: by id, else by the digest of their requests, in the order of the first file.

    A receipt without a partner is paired with None; those of the second file come last. Among equal ones, the first
    that has no partner yet is taken.
    """
    ours, rest = list(a), list(b)
    by_id = {receipt.id: receipt for receipt in rest}
    partners: dict[int, Receipt] = {}
    taken: set[int] = set()
    for i, receipt in enumerate(ours):
        other = by_id.get(receipt.id)
        if other is not None and id(other) not in taken:
            partners[i] = other
            taken.add(id(other))
    by_request: dict[str, list[Receipt]] = {}
    for receipt in reversed(rest):
        if id(receipt) not in taken:
            by_request.setdefault(_request_digest(receipt), []).append(receipt)
    for i, receipt in enumerate(ours):
        if i not in partners and (equal := by_request.get(_request_digest(receipt))):
            partners[i] = equal.pop()
            taken.add(id(partners[i]))
    yield from ((receipt, partners.get(i)) for i, receipt in enumerate(ours))
    yield from ((None, receipt) for receipt in rest if id(receipt) not in taken)


def _request_digest(receipt: Receipt) -> str:
    told = receipt.request.get("sha256")
    return told if isinstance(told, str) else sha256(canonical(dict(receipt.request)))


def _request(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    if "sha256" in a or "sha256" in b:  # one of them holds no text
        ours, theirs = (one["sha256"] if "sha256" in one else sha256(canonical(dict(one))) for one in (a, b))
        if ours != theirs:
            yield Difference("request", "", f"the requests have other digests: {ours[:16]}… → {theirs[:16]}…")
        return
    first, second = dict(_leaves(a)), dict(_leaves(b))
    for name in sorted(first.keys() | second.keys()):
        if name not in second:
            yield Difference("request", name, f"only in the first: {name} {_shown(first[name])}")
        elif name not in first:
            yield Difference("request", name, f"only in the second: {name} {_shown(second[name])}")
        elif first[name] != second[name] or type(first[name]) is not type(second[name]):
            yield Difference("request", name, f"{name} {_shown(first[name])} → {_shown(second[name])}")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Return the values inside JSON data by their dotted paths. Lists of plain values are one value."""
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _leaves(part, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{path}.{i}")
    else:
        yield path, value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _prompt(a: Receipt, b: Receipt) -> Iterator[Difference]:
    ours, theirs = a.prompt, b.prompt
    if ours.sha256 == theirs.sha256 and ours.tokens == theirs.tokens:
        return
    told = f"the prompts differ: {ours.tokens} tokens → {theirs.tokens}"
    place = _place(ours.token_ids, theirs.token_ids)
    where = "" if place is None else f"token {place}"
    yield Difference("prompt", where, told if place is None else f"{told}, first at token {place}")


def _model(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    for name in sorted(a.keys() | b.keys()):
        if name not in b:
            yield Difference("model", name, f"only in the first: the file {name}")
        elif name not in a:
            yield Difference("model", name, f"only in the second: the file {name}")
        elif a[name] != b[name]:
            yield Difference("model", name, f"the file {name} differs: {a[name][:12]}… → {b[name][:12]}…")


def _choices(a: tuple[ChoiceRecord, ...], b: tuple[ChoiceRecord, ...], text_of: TextOf | None) -> Iterator[Difference]:
    if len(a) != len(b):
        yield Difference("request", "sampling.n", f"the number of choices differs: {len(a)} → {len(b)}")
    for ours, theirs in zip(a, b, strict=False):
        yield from _choice(ours, theirs, text_of)


def _choice(a: ChoiceRecord, b: ChoiceRecord, text_of: TextOf | None) -> Iterator[Difference]:
    where = f"choice {a.index}"
    if a.sha256 != b.sha256:
        place = _place(a.token_ids, b.token_ids)
        if place is None:
            yield Difference("token", where, f"{where}: the tokens differ: {a.tokens} → {b.tokens}")
        else:
            texts = " → ".join(f"{named(_at(one, place), text_of)}{_score_at(one, place)}" for one in (a, b))
            yield Difference("token", f"{where}, position {place}", f"{where}, position {place}: {texts}")
    elif a.bits != b.bits:
        yield Difference("bits", where, f"{where}: the tokens are the same, but {_bits(a.scores, b.scores)}")
    if a.finish_reason != b.finish_reason:
        yield Difference("finish_reason", where, f"{where}: finish_reason {a.finish_reason} → {b.finish_reason}")


def _at(choice: ChoiceRecord, place: int) -> int | None:
    ids = choice.token_ids or ()
    return ids[place] if place < len(ids) else None


def _score_at(choice: ChoiceRecord, place: int) -> str:
    """Return both scores of a token in brackets; nothing where tokens without a draw make its score uncertain."""
    if choice.scores is None or len(choice.scores) != 8 * choice.tokens or place >= choice.tokens:
        return ""
    logprob, perturbed = struct.unpack_from("<ff", choice.scores, 8 * place)
    return f" [log-probability {logprob:.6g}, perturbed {perturbed:.6g}]"


def _bits(a: bytes | None, b: bytes | None) -> str:
    if a is None or b is None or len(a) != len(b):
        return "their scores differ"
    draws = list(zip(struct.iter_unpack("<ff", a), struct.iter_unpack("<ff", b), strict=True))
    place = next(i for i in range(len(draws)) if a[8 * i : 8 * i + 8] != b[8 * i : 8 * i + 8])
    gaps = [0.0 if ours[0] == theirs[0] else abs(ours[0] - theirs[0]) for ours, theirs in draws]
    largest = f"at most {max(gaps):.3g}" if all(map(math.isfinite, gaps)) else "more than any number"
    return f"scores differ from draw {place} on; log-probabilities by {largest}"


def _place(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> int | None:
    """Return the first position at which two lists of ids differ; None if one of them is not there."""
    if a is None or b is None:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
