"""Takes a request from its arrival to an answer that is ready to run: everything that can refuse it comes before.

    admit the account (429, 402) → read and parse the body (503, 413, 408, 400, 422) → find the model, or have it
    loaded (404, 503) → prepare (400, 422) → admit the prompt (429) → `CompletionResponse`, whose lease can still
    refuse (402, 503)

The same for every endpoint. Knows no field of a body and no shape of a reply.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from fastapi import Request

from engine import (
    EngineProtocol,
    GenerationRequest,
    InvalidParameter,
    PreparedRequest,
    Registry,
    VerbatimError,
    timed,
)
from server.accounts.account import Account, account_of
from server.accounts.authentication import key_of
from server.accounts.charging import Meter
from server.api.generation import CompletionResponse, Endpoint, Job, Reply, unless_disconnected
from server.api.models.leasing import engine_of
from server.api.parsing import ParsedRequest
from server.api.receipts.recording import RecordedBody, begin_recording, to_be_recorded
from server.errors import ClientGone
from server.metrics.snapshot import Metrics
from server.receipts.service import Receipts
from server.settings import ServerSettings
from server.wire.bodies import Bodies

__all__ = ["Identity", "Service", "answer", "ignored_fields", "own_names", "renamed", "shown_names"]

T = TypeVar("T")
OwnName = Callable[[str | None], str | None]
"""What the engine calls a field → where the body has it; None where no body has it."""

_WORDS: Final = re.compile(
    r"""(?<!\w)(?:'[^']*'|"[^"]*"|`[^`]*`) | (?<![\w./-]) (?P<name>[a-z]+(?:_[a-z]+)+) (?![./-]?\w)""", re.VERBOSE
)
"""What is quoted in a message, and names of fields in several words: those in one are words of English, too."""

MOST_TOLD: Final = 1 << 17
"""Log-probabilities of prompts in one reply: writing them takes the event loop some tenths of a second."""


@dataclass(frozen=True, slots=True)
class Service:
    """What requests are answered with. `meter`: None where the server has no keys."""

    registry: Registry
    settings: ServerSettings
    meter: Meter | None
    bodies: Bodies
    receipts: Receipts
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Identity:
    """What a reply is called, and when it is made.

    `id` follows the endpoint's prefix; `created`: Unix seconds; `clock`: what a template that prints the time reads
    unless the model's entry pins it, None for the real clock.

    A caller in this process may set it as `identity` in the request's state, so that replies do not depend on chance
    and time.
    """

    id: str
    created: int
    clock: dt.datetime | None = None

    @classmethod
    def fresh(cls) -> Identity:
        """Draw an id and read the clock."""
        return cls(secrets.token_hex(16), int(time.time()))  # noqa: TID251  the API wants the wall clock


async def answer(service: Service, endpoint: Endpoint, request: Request) -> CompletionResponse:
    """Admit, parse and prepare a request for completions. Returns a response that runs it when it is sent.

    Raises:
        VerbatimError: the request is refused.
        ClientGone: the client left.
    """
    account = account_of(service.meter, key_of(request.scope))
    account.admit()
    identity: Identity = request.scope["state"].get("identity") or Identity.fresh()
    sizes: list[int] = []

    def parse(raw: bytes, request_id: str) -> ParsedRequest:
        sizes.append(len(raw))
        return endpoint.parse(raw, request_id)

    async with service.bodies.of(request, account.group, parse) as checked:
        parsed = await checked(endpoint.id_prefix + identity.id)
        began = service.metrics.clock()
        ignored_fields(parsed.ignored, service.settings)  # refused here, before anything is prepared
        account.admit_model(parsed.model)
        engine = await engine_of(service.registry, account, request, parsed.model)
        parsed = endpoint.fitted(parsed, engine.info)
        form = service.receipts.form(parsed.receipt)
        work = _prepared(engine, parsed.generations, account, identity.clock, record=form is not None)
        own_name = own_names(endpoint.own_name, parsed.places)
        requests = await unless_disconnected(renamed(work, own_name), request.receive)
        if requests is None:
            raise ClientGone
        body = RecordedBody(service.bodies.memory, account.group, sizes[0])
        named = engine.info, identity.created
        recording = await begin_recording(service.receipts, parsed.receipt, requests, *named, body)
    prepared = tuple(made for _, made in requests)
    _check_told(prepared)
    first, info = prepared[0], engine.info
    ignored, left_out = (tuple(filter(None, map(own_name, names))) for names in (first.ignored, first.left_out))
    headers = ignored_fields(parsed.ignored + ignored, service.settings, left_out)
    if parsed.receipt is True and form == "digest":
        headers["x-receipt-form"] = "digest"
    account.admit_prompt(sum(len(one.prompt_token_ids) for one in prepared))
    request.scope["state"]["told"] = {
        "model": info.id,
        "completion": first.request_id,
        "seed": first.params.seed,
        "fingerprint": info.system_fingerprint,
        "prompt_tokens": sum(len(one.prompt_token_ids) for one in prepared),
        "completion_tokens": 0,
    }
    told = identity.created, info.id, info.system_fingerprint
    reply = Reply(first.request_id, *told, prepared, parsed.prompt_logprobs, parsed.repeated)
    watch = service.metrics.reply(info.id, began)
    job = Job(engine, account, reply, parsed.stream, parsed.include_usage, headers, watch, recording)
    return CompletionResponse(job, endpoint, service.settings)


def own_names(own_name: OwnName, places: Mapping[str, str]) -> OwnName:
    """Return the function from what the engine calls a field to where the body has it.

    Args:
        own_name: the same for every body of an endpoint; None for a field that no body has.
        places: as in `ParsedRequest`.
    """

    def found(name: str | None) -> str | None:
        for place, own in places.items():
            if name is not None and (name == place or name.startswith(f"{place}.")):
                return own + name.removeprefix(place)
        return own_name(name)

    return found


async def renamed(work: Awaitable[T], own_name: OwnName) -> T:
    """Await work of the engine's. Its errors come with the names that fields have in the body."""
    try:
        return await work
    except VerbatimError as error:
        name, own = error.param, own_name(error.param)
        error.param = own
        begin = ""
        if name and own and error.message.startswith(name):
            begin = own
            error.message = error.message.removeprefix(name)
        error.message = begin + _WORDS.sub(lambda found: _own_word(found, own_name), error.message)
        raise


def _own_word(found: re.Match[str], own_name: OwnName) -> str:
    """Return the name that a body has for a field which a message speaks of; what is quoted stays."""
    return (found["name"] and own_name(found["name"])) or found[0]


def _check_told(prepared: Sequence[PreparedRequest]) -> None:
    """Refuse a reply that tells too many log-probabilities of its prompts: once for each choice."""
    told = sum(
        len(one.prompt_token_ids) * (one.params.prompt_logprobs + 1) * one.params.n
        for one in prepared
        if one.params.prompt_logprobs is not None
    )
    if told > MOST_TOLD:
        raise InvalidParameter(
            f"this reply would tell {told} log-probabilities of its prompts, for every choice and with alternatives; "
            f"at most {MOST_TOLD} are told: ask for fewer prompts, choices or alternatives.",
            param="logprobs" if prepared[0].echo is not None else "prompt_logprobs",
        )


async def _prepared(
    engine: EngineProtocol,
    generations: Sequence[GenerationRequest],
    account: Account,
    clock: dt.datetime | None,
    *,
    record: bool,
) -> list[tuple[GenerationRequest, PreparedRequest]]:
    """Prepare the requests of one reply. A seed that is drawn for the first is the seed of all.

    `clock`: as in `Identity`; `record`: whether they become receipts. Returns each request as it was prepared, and what
    it became.
    """
    most = engine.info.max_requests
    if len(generations) > most:
        raise InvalidParameter(
            f"prompt may hold at most {most} prompts here, as many as may run and wait at once, not "
            f"{len(generations)}.",
            param="prompt",
        )
    prepared: list[tuple[GenerationRequest, PreparedRequest]] = []
    for generation in generations:
        if prepared:
            seed = prepared[0][1].params.seed
            generation = dataclasses.replace(generation, sampling={**generation.sampling, "seed": seed})
        generation = dataclasses.replace(generation, group=account.group, context_limit=account.context_limit)
        if clock is not None:
            generation = timed(generation, engine.info, clock)
        generation = to_be_recorded(generation, engine.info) if record else generation
        prepared.append((generation, await engine.prepare(generation)))
    return prepared


def ignored_fields(names: tuple[str, ...], settings: ServerSettings, left_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Name ignored fields in a response header, or refuse them where `strict_params` is set.

    Args:
        left_out: keywords of schemas that are not enforced. They are named and not refused: to refuse them is what
            `strict` beside a schema is for.
    """
    if names and settings.strict_params:
        raise InvalidParameter(f"{names[0][:200]} is not a known field.", param=names[0][:200], code="unknown_field")
    return {"x-ignored-fields": shown_names((*names, *left_out))} if names or left_out else {}


def shown_names(names: tuple[str, ...]) -> str:
    """Join field names for a header: printable ASCII and of bounded length, whatever a client called them."""
    shown = [re.sub(r"[^!-+\--~]", "?", _shortened(name)) for name in names[:32]]
    return ", ".join([*shown, "..."] if len(names) > 32 else shown)


def _shortened(name: str) -> str:
    """A name of at most 64 characters: of a long one its beginning and its end, where a schema's keyword is."""
    return name if len(name) <= 64 else f"{name[:20]}...{name[-41:]}"
