"""Keys over HTTP: who gets in, what is held and settled, what is refused, with a real ledger behind fakes."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import CHAT, Answer, begin, call, run
from fakes import HELLO, SILENT, FakeEngine, Script, chat, make_app, output, word_by_word
from ledger_for_tests import Clock, query

from engine import (
    ChoiceDelta,
    InvalidParameter,
    OutOfMemory,
    PreparedRequest,
    QueueFull,
    QueueTimeout,
    VerbatimError,
)
from server.accounts import charging
from server.accounts.authentication import OPEN
from server.accounts.charging import Meter
from server.accounts.settling import Settler
from server.api.chat_reply import Collector
from server.ledger.records import Key, LedgerFault, Limits, NewKey, Prices, Unwritable
from server.ledger.store import Ledger

WORST = 5 + 64  # the fake's prompt, and as many tokens as it can be asked for


class Desk:
    """An application with keys, and its ledger."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}", self.clock)
        self.meter = Meter(self.ledger, {"priced": Prices(3, 1, 10)}, self.clock)
        self.engine = FakeEngine()
        self.app = make_app(self.engine, meter=self.meter)

    def key(self, name: str = "ada", **fields: Any) -> NewKey:
        return self.ledger.create_key(name, **fields)

    def ask(self, key: NewKey | str | None, body: Any = None, **how: Any) -> Answer:
        return run(self.exchange(key, body, **how).ended())  # type: ignore[no-any-return]

    def exchange(self, key: NewKey | str | None, body: Any = None, **how: Any) -> Any:
        secret = key.secret if isinstance(key, NewKey) else key
        headers = [] if secret is None else [(b"authorization", f"Bearer {secret}".encode())]
        return _Later(self.app, body, headers, how)

    def balance(self, name: str = "ada") -> tuple[int | None, int, list[dict[str, Any]]]:
        """Balance, held and sums; they must add up."""
        assert self.ledger.check() == []
        key: Key = self.ledger.key(name)
        return key.balance, key.held, self.ledger.usage(key=name)


class _Later:
    """A request that begins when its loop runs."""

    def __init__(self, app: Any, body: Any, headers: list[tuple[bytes, bytes]], how: dict[str, Any]) -> None:
        self._made = lambda: begin(app, body, headers=headers, **how)

    async def ended(self) -> Answer:
        return await self._made().ended()

    def begin(self) -> Any:
        return self._made()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.meter.close()


# -- the door ---------------------------------------------------------------------------------------------------------


def routes(app: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Every (method, path) that an application or a router answers."""
    found: list[tuple[str, str]] = []
    for route in app.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            found += routes(inner, prefix + route.include_context.prefix)
        else:
            path = prefix + route.path.replace("{model_id:path}", "fake")
            found += [(method, path) for method in sorted(route.methods)]
    return found


def test_every_route_is_behind_a_key_or_on_the_list(desk: Desk) -> None:
    desk.key()
    seen = routes(desk.app)
    assert {path for _, path in seen} > {CHAT, "/v1/usage", "/openapi.json", *OPEN}
    for method, path in [
        *seen,
        ("GET", "/nothing"),
        ("OPTIONS", CHAT),
        ("GET", "/health/nope"),
        ("GET", "/v1//models/"),
    ]:
        body = chat() if method == "POST" else None
        answer = desk.ask(None, body, path=path, method=method)
        if path in OPEN:
            assert answer.status == (404 if path.endswith("/receipts/key") else 200), path  # it does not sign
        else:
            assert answer.status == 401, path
            assert method == "HEAD" or answer.error["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert desk.engine.requests == []


def test_a_stranger_is_told_nothing_by_paths_methods_and_encodings(desk: Desk) -> None:
    """Neither models nor paths; and no body is decoded without a key."""
    key = desk.key()
    for path in ("/health", "/health/", "/health/ready"):
        assert b"fake" not in desk.ask(None, path=path).body
        assert desk.ask(None, path=path, method="HEAD").status == 200
    for method, path in (
        ("HEAD", "/v1/models"),
        ("GET", "/chat/completions"),
        ("OPTIONS", "/nope"),
        ("GET", "/version"),
    ):
        answers = [desk.ask(who, path=path, method=method).status for who in (None, key)]
        assert answers[0] == 401
        assert answers[1] in (200, 404)
    for encoding in (b"br", b"gzip"):
        headers = [(b"content-encoding", encoding)]
        bearer = (b"authorization", f"Bearer {key.secret}".encode())
        assert call(desk.app, chat(), headers=headers).status == 401
        assert call(desk.app, chat(), headers=[*headers, bearer]).status in (400, 415)


@pytest.mark.parametrize(
    "headers",
    [
        [], [(b"authorization", b"")], [(b"authorization", b"Bearer")], [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer vk-wrong")], [(b"authorization", b"Basic %s")], [(b"authorization", b"%s")],
        [(b"authorization", b"Bearer \xff\xfe")], [(b"authorization", b"Bearer %s"), (b"authorization", b"Bearer x")],
        [(b"x-api-key", b"")], [(b"x-api-key", b"vk-wrong")], [(b"x-api-key", b"Bearer %s")],
        [(b"x-api-key", b"%s"), (b"authorization", b"Bearer x")],
        [(b"x-api-key", b"x"), (b"authorization", b"Bearer %s")],
    ],
)  # fmt: skip
def test_what_opens_nothing(desk: Desk, headers: list[tuple[bytes, bytes]]) -> None:
    secret = desk.key().secret.encode()
    given = [(name, value.replace(b"%s", secret)) for name, value in headers]

    async def ask() -> Answer:
        return await begin(desk.app, chat(), headers=given).ended()

    answer = run(ask())
    assert (answer.status, answer.error["type"]) == (401, "authentication_error")
    assert secret.decode() not in answer.body.decode()


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-api-key", b"%s")], [(b"x-api-key", b"%s"), (b"authorization", b"Bearer %s")],
        [(b"authorization", b"bearer %s")], [(b"x-api-key", b""), (b"authorization", b"Bearer %s")],
    ],
)  # fmt: skip
def test_what_opens_the_server(desk: Desk, headers: list[tuple[bytes, bytes]]) -> None:
    """Clients of Anthropic's API send the key in a header of its own, and some send both."""
    secret = desk.key().secret.encode()
    given = [(name, value.replace(b"%s", secret)) for name, value in headers]

    async def ask() -> Answer:
        return await begin(desk.app, chat(), headers=given).ended()

    assert run(ask()).status == 200


@pytest.mark.parametrize("path", ["/v1/messages", "/api/v1/messages/count_tokens"])
def test_errors_of_anthropics_paths_have_its_shape(desk: Desk, path: str) -> None:
    desk.key()

    async def ask() -> Answer:
        return await begin(desk.app, chat(), path=path).ended()

    answer = run(ask())
    assert answer.json["type"] == "error"
    assert answer.json["error"]["type"] == "authentication_error"
    assert answer.json["error"]["code"] == "invalid_api_key"
    assert answer.json["request_id"] == answer.headers["x-request-id"]


def test_nothing_of_a_body_is_read_without_a_key(desk: Desk) -> None:
    desk.key()

    async def ask() -> Answer:
        exchange = begin(desk.app, [b"x" * 100, b"y" * 100])
        answer = await exchange.ended()
        assert len(exchange._pending) == 2, "the body was read"
        return answer

    assert run(ask()).status == 401


def test_revoked_and_expired_keys(desk: Desk) -> None:
    revoked, short = desk.key("eve"), desk.key("bob", expires=desk.clock.now + 10)
    assert [desk.ask(key, chat()).status for key in (revoked, short)] == [200, 200]
    desk.ledger.revoke("eve")
    desk.clock.now += 10
    assert [desk.ask(key, chat()).status for key in (revoked, short)] == [401, 401]


def test_the_scheme_is_not_case_sensitive(desk: Desk) -> None:
    secret = desk.key().secret.encode()

    async def ask() -> Answer:
        return await begin(desk.app, chat(), headers=[(b"authorization", b"bEARER   " + secret)]).ended()

    assert run(ask()).status == 200


def test_without_keys_everybody_is_served_and_there_are_no_books() -> None:
    async def ask() -> Answer:
        return await begin(make_app(), path="/v1/usage").ended()

    answer = run(ask())
    assert (answer.status, answer.error["code"]) == (404, "no_keys")


def test_a_browser_of_another_page_gets_nothing_unless_configured(desk: Desk) -> None:
    origin = [(b"origin", b"https://evil.example"), (b"access-control-request-method", b"POST")]

    async def ask(app: Any) -> Answer:
        return await begin(app, None, method="OPTIONS", path=CHAT, headers=origin).ended()

    assert not any(name.startswith("access-control") for name in run(ask(make_app())).headers)
    assert not any(name.startswith("access-control") for name in run(ask(desk.app)).headers)
    allowed = make_app(meter=desk.meter, cors_origins=["https://evil.example"])
    answer = run(ask(allowed))
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://evil.example")


# -- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_charged_what_it_used(desk: Desk, stream: bool) -> None:
    key = desk.key(balance=1000)
    answer = desk.ask(key, chat(stream=stream, n=2, seed=2**53))
    assert answer.status == 200
    used = 5 + 2 * 4
    assert desk.balance() == (
        1000 - used, 0,
        [{"key": "ada", "requests": 1, "prompt_tokens": 5, "cached_tokens": 2, "completion_tokens": 8, "cost": used}],
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{"id": "priced"}, {"id": "priced:sql", "parent": "priced"}])
def test_prices_are_by_model_and_by_kind_of_token(desk: Desk, changes: dict[str, str]) -> None:
    """An adapter without prices of its own costs what its model does."""
    info = dataclasses.replace(desk.engine.info, **changes)
    app = make_app(FakeEngine(info=info), meter=desk.meter)
    desk.app = app
    desk.ask(desk.key(balance=1000), chat(model=changes["id"]))
    assert desk.balance()[0] == 1000 - (3 * 3 + 2 * 1 + 4 * 10)


def test_the_worst_case_is_held_while_it_runs(desk: Desk) -> None:
    key = desk.key(balance=WORST + 10)
    desk.engine.script = SILENT

    async def twice() -> tuple[Answer, Any]:
        first = desk.exchange(key, chat()).begin()
        await first.until(lambda: bool(desk.engine.open))
        assert desk.ledger.key("ada").held == WORST
        second = await desk.exchange(key, chat()).ended()
        first.disconnect()
        await first.task
        return second, first

    second, _ = run(twice())
    assert (second.status, second.error["type"], second.error["code"]) == (
        402, "insufficient_balance", "insufficient_balance",
    )  # fmt: skip
    assert (second.error["available"], second.error["needed"]) == (10, WORST)
    assert "fewer tokens" in second.error["message"]
    assert "_tokens" not in second.error["message"], "endpoints call the field differently"
    assert desk.balance() == (WORST + 10, 0, []), "nothing was computed, nothing is charged"


def test_nothing_left_is_told_before_the_body_is_read(desk: Desk) -> None:
    answer = desk.ask(desk.key(balance=0), [b"x" * 10, b"y"])
    assert answer.status == 402
    assert desk.engine.requests == []


def partly(*words: str, error: VerbatimError | None = None) -> Script:
    """Says some words, and then an error or nothing more."""

    def script(request: PreparedRequest) -> Any:
        for i, word in enumerate(words):
            yield output(request, [ChoiceDelta(0, word, (i,))], i + 1)
        yield output(request, [], len(words), finished=True, error=error) if error else None

    return script


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_pays_what_was_generated(desk: Desk, stream: bool) -> None:
    key = desk.key(balance=500)
    desk.engine.script = partly("a", "b", "c")

    async def leave() -> None:
        exchange = desk.exchange(key, chat(stream=stream)).begin()
        await exchange.until(lambda: any((s.usage and s.usage.completion_tokens == 3) for s in list_of(desk.engine)))
        exchange.disconnect()
        await exchange.task

    run(leave())
    balance, held, [row] = desk.balance()
    assert (balance, held, row["completion_tokens"]) == (500 - 5 - 3, 0, 3)


def list_of(engine: FakeEngine) -> list[Any]:
    return list(engine.streams.values())


@pytest.mark.parametrize(("stream", "charged"), [(False, 0), (True, 7)])
def test_an_error_costs_what_has_reached_the_client(desk: Desk, stream: bool, charged: int) -> None:
    desk.engine.script = partly("a", "b", error=OutOfMemory("too large."))
    answer = desk.ask(desk.key(balance=500), chat(stream=stream))
    assert answer.status == (200 if stream else 503)
    assert desk.balance()[:2] == (500 - charged, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_by_its_own_fault_pays_what_was_computed(desk: Desk, stream: bool) -> None:
    """A grammar that fails at its last token would else be the engine for nothing."""
    own = InvalidParameter("The grammar cannot be followed any further.", code="grammar_failed")
    desk.engine.script = partly("a", "b", error=own)
    answer = desk.ask(desk.key(balance=500), chat(stream=stream))
    assert answer.status == (200 if stream else 422)
    balance, held, [row] = desk.balance()
    assert (balance, held, row["completion_tokens"]) == (500 - 7, 0, 2)
    assert query(desk.ledger, "SELECT finish_reason FROM requests") == [("error",)]


def test_an_answer_that_cannot_be_written_costs_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it was computed, and a fault of the server kept it from the client."""

    def broken(_: Collector) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setattr(Collector, "body", broken)
    assert desk.ask(desk.key(balance=500), chat()).status == 500
    assert desk.balance() == (500, 0, [])


def test_an_error_that_reaches_a_stream_s_client_before_any_word_costs_nothing(desk: Desk) -> None:
    """The engine was faster than the events: words and error came at once, and the answer is a status."""

    def script(request: PreparedRequest) -> Any:
        yield output(request, [ChoiceDelta(0, "a", (0,))], 1, finished=True, error=OutOfMemory("too large."))

    desk.engine.script = script
    assert desk.ask(desk.key(balance=500), chat(stream=True)).status == 503
    assert desk.balance() == (500, 0, [])


def test_a_fault_before_the_first_token_costs_nothing(desk: Desk) -> None:
    """Streamed or not: it has waited for its turn and was refused, or its prompt was too much."""
    desk.engine.script = partly(error=QueueTimeout("it has waited for 5 seconds."))
    answer = desk.ask(desk.key(balance=500), chat(stream=True))
    assert answer.status == 503
    assert desk.balance() == (500, 0, [])


def test_every_choice_s_end_is_recorded(desk: Desk) -> None:
    desk.ask(desk.key(balance=5000), chat(n=16))
    assert query(desk.ledger, "SELECT finish_reason FROM requests") == [(",".join(["stop"] * 16),)]


def test_a_refused_request_costs_nothing(desk: Desk) -> None:
    key = desk.key(balance=500)
    desk.engine.submit_error = QueueFull("full.")
    assert desk.ask(key, chat()).status == 503
    assert desk.ask(key, chat(temperature=9)).status == 422
    assert desk.ask(key, b"{").status == 400
    assert desk.balance() == (500, 0, [])


def test_a_key_without_a_balance_is_recorded_and_not_charged(desk: Desk) -> None:
    assert desk.ask(desk.key(), chat()).status == 200
    balance, held, [row] = desk.balance()
    assert (balance, held, row["cost"], row["requests"]) == (None, 0, 0, 1)


def test_a_key_sees_its_own_usage(desk: Desk) -> None:
    ada, bob = desk.key("ada", balance=100), desk.key("bob")
    for key in (ada, bob, bob):
        desk.ask(key, chat())
    found = desk.ask(ada, path="/v1/usage", query=b"by=model").json
    assert (found["key"], found["balance"]) == ("ada", 100 - 9)
    assert [(row["key"], row["model"], row["requests"]) for row in found["data"]] == [("ada", "fake", 1)]
    assert desk.ask(ada, path="/v1/usage", query=b"since=1900000000").json["data"] == []
    for asked in (b"by=hour", b"since=yesterday", b"since=nan"):
        answer = desk.ask(ada, path="/v1/usage", query=asked)
        assert (answer.status, answer.error["param"]) == (422, asked.split(b"=")[0].decode())


def test_a_long_report_holds_nobody_up(desk: Desk) -> None:
    """One key's sums over many requests are not in the way of another's holds."""
    ada, bob = desk.key(), desk.key("bob", balance=500)
    go_on = threading.Event()
    really = desk.ledger.usage

    def slow(**given: Any) -> Any:
        go_on.wait(60)
        return really(**given)

    desk.ledger.usage = slow  # type: ignore[method-assign]

    async def both() -> tuple[int, int]:
        report = desk.exchange(ada, None, path="/v1/usage").begin()
        await asyncio.sleep(0.02)
        try:
            served = (await desk.exchange(bob, chat()).ended()).status
        finally:
            go_on.set()
        return served, (await report.ended()).status

    assert run(both()) == (200, 200)
    del desk.ledger.usage  # type: ignore[method-assign]


def test_reports_are_made_in_turns(desk: Desk) -> None:
    """A key that asks for many at once has others' between its own."""
    ada, bob = desk.key(), desk.key("bob")
    go_on, order = threading.Event(), []
    really = desk.ledger.usage

    def slow(**given: Any) -> Any:
        go_on.wait(60)
        order.append(given["key_id"])
        return really(**given)

    desk.ledger.usage = slow  # type: ignore[method-assign]

    async def storm() -> None:
        many = [desk.exchange(ada, None, path="/v1/usage").begin() for _ in range(5)]
        await many[0].until(lambda: desk.meter._reports._free == 0)
        one = desk.exchange(bob, None, path="/v1/usage").begin()
        await one.until(lambda: bob.key.id in desk.meter._reports._waiting)
        go_on.set()
        for exchange in (*many, one):
            assert (await exchange.ended()).status == 200

    run(storm())
    del desk.ledger.usage  # type: ignore[method-assign]
    assert (len(order), order.index(bob.key.id) <= 2) == (6, True), order


def test_what_a_crash_left_held_is_free_again(desk: Desk, tmp_path: Path) -> None:
    """Nobody can ask for the other process here: that it has stopped counting is what shows."""
    key = desk.key(balance=100)
    Ledger(f"sqlite:///{tmp_path / 'ledger.db'}", desk.clock, "another:unknown:1:1").hold(key.key.id, "lost", 90)
    settler = Settler(desk.ledger)
    settler.beat()
    assert desk.ask(key, chat()).status == 402
    for _ in range(6):
        settler.beat()
    assert desk.ask(key, chat(max_tokens=4)).status == 200


# -- limits -----------------------------------------------------------------------------------------------------------


def test_requests_per_minute(desk: Desk) -> None:
    key = desk.key(limits=Limits(requests_per_minute=2))
    answers = [desk.ask(key, chat()) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert all(answer.headers["x-ratelimit-limit-requests"] == "2" for answer in answers)
    assert answers[2].error["code"] == "rate_limit_exceeded"
    assert int(answers[2].headers["retry-after"]) >= 1
    assert "x-should-retry" not in answers[2].headers
    assert len(desk.engine.requests) == 2
    assert desk.ask(desk.key("bob"), chat()).status == 200, "another key has its own minute"
    assert desk.ask(key, path="/v1/models").status == 200, "looking at the models is no request"


def test_a_clock_that_is_set_back_shuts_no_key_out(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was counted in a future that is no more would count until it has come again."""
    key = desk.key(limits=Limits(requests_per_minute=1))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7200)
    desk.meter.limits._epoch += 7200
    assert [desk.ask(key, chat()).status for _ in range(2)] == [200, 429]
    monkeypatch.undo()
    assert [desk.ask(key, chat()).status for _ in range(2)] == [200, 429]


def test_tokens_per_minute(desk: Desk) -> None:
    key = desk.key(limits=Limits(tokens_per_minute=16))
    answers = [desk.ask(key, chat()) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429], "9, then what is left, then nothing"
    assert answers[2].headers["x-ratelimit-remaining-tokens"] == "0"
    assert "takes 5" in answers[2].error["message"]
    hopeless = desk.ask(desk.key("bob", limits=Limits(tokens_per_minute=4)), chat())
    assert (hopeless.status, hopeless.headers["x-should-retry"]) == (429, "false")


def test_requests_at_once(desk: Desk) -> None:
    key = desk.key(limits=Limits(concurrent=1))
    desk.engine.script = SILENT

    async def twice() -> Answer:
        first = desk.exchange(key, chat()).begin()
        await first.until(lambda: bool(desk.engine.open))
        second = await desk.exchange(key, chat()).ended()
        first.disconnect()
        await first.task
        desk.engine.script = HELLO
        assert (await desk.exchange(key, chat()).ended()).status == 200
        return second

    second = run(twice())
    assert (second.status, second.headers["retry-after"]) == (429, "1")


@pytest.mark.parametrize(("mine", "others"), [("fake", "other"), ("fake", "fake:sql"), ("fake:sql", "fake")])
def test_models_of_a_key(desk: Desk, mine: str, others: str) -> None:
    """A model does not give its adapters, nor an adapter its model."""
    engines = [FakeEngine(info=dataclasses.replace(desk.engine.info, id=name)) for name in (mine, others)]
    desk.app = make_app(*engines, meter=desk.meter)
    key = desk.key(models=[mine])
    assert desk.ask(key, chat(model=mine)).status == 200
    answer = desk.ask(key, chat(model=others))
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert [model["id"] for model in desk.ask(key, path="/v1/models").json["data"]] == [mine]
    assert desk.ask(key, path=f"/v1/models/{others}").status == 404
    assert desk.ask(desk.key("bob"), path=f"/v1/models/{others}").status == 200


def test_the_context_of_a_key(desk: Desk) -> None:
    key = desk.key(balance=1000, limits=Limits(context=8))
    desk.engine.script = SILENT

    async def look() -> int:
        exchange = desk.exchange(key, chat()).begin()
        await exchange.until(lambda: bool(desk.engine.open))
        held = desk.ledger.key("ada").held
        exchange.disconnect()
        await exchange.task
        return held

    assert run(look()) == 8, "the prompt of 5 and at most 3 more"
    short = desk.ask(desk.key("bob", limits=Limits(context=5)), chat())
    assert (short.status, short.error["code"]) == (400, "context_length_exceeded")
    assert (short.error["prompt_tokens"], short.error["context_length"]) == (5, 5)
    assert short.error["param"] == "messages"


# -- faults -----------------------------------------------------------------------------------------------------------


def failing(ledger: Ledger, name: str) -> Callable[[], None]:
    """Let one verb of a ledger fail until the returned function is called."""

    def fail(*_: Any) -> None:
        raise LedgerFault("the ledger cannot be used: database or disk is full")

    setattr(ledger, name, fail)
    return lambda: delattr(ledger, name)


def test_a_hold_that_is_given_up_twice_is_released(desk: Desk) -> None:
    """A server that ends gives up its requests, and again those that take their time."""
    key, go_on = desk.key(balance=500), threading.Event()
    really = desk.ledger.hold

    def slow(*given: Any) -> int:
        go_on.wait(60)
        return really(*given)

    desk.ledger.hold = slow  # type: ignore[method-assign]

    async def give_up() -> None:
        exchange = desk.exchange(key, chat()).begin()
        await exchange.until(lambda: bool(desk.meter._running))
        for _ in range(2):
            await asyncio.sleep(0.02)
            exchange.task.cancel()
        await asyncio.gather(exchange.task, return_exceptions=True)
        go_on.set()
        await desk.meter.drain()

    run(give_up())
    assert desk.balance() == (500, 0, [])


@pytest.mark.parametrize("name", ["authenticate", "hold"])
def test_a_database_that_fails_is_a_503_and_no_free_service(
    desk: Desk, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = desk.key(balance=500)
    mend = failing(desk.ledger, name)
    answer = desk.ask(key, chat())
    assert (answer.status, answer.error["code"]) == (503, "ledger_fault")
    assert "disk is full" not in answer.error["message"], "hosts, users and files are not for who may have no key"
    assert "disk is full" in caplog.text
    assert answer.headers["retry-after"]
    assert desk.engine.requests == [] or desk.engine.streams == {}
    mend()
    assert desk.ask(key, chat()).status == 200


@pytest.mark.parametrize("name", ["authenticate", "hold"])
def test_a_database_that_hangs_is_a_503(desk: Desk, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk or a host that is gone has no end of its own: clients are told, and a hold that comes late is released."""
    monkeypatch.setattr(charging, "_PATIENCE", 0.05)
    key, go_on, really = desk.key(balance=500), threading.Event(), getattr(desk.ledger, name)

    def hangs(*given: Any) -> Any:
        go_on.wait(60)
        return really(*given)

    setattr(desk.ledger, name, hangs)

    async def ask() -> None:
        answer = await desk.exchange(key, chat()).ended()
        assert (answer.status, answer.error["code"]) == (503, "ledger_fault")
        assert (await desk.exchange(None, None, path="/health/ready").ended()).status == 503
        go_on.set()
        await desk.meter.drain()

    run(ask())
    delattr(desk.ledger, name)
    assert desk.ask(key, chat()).status == 200
    assert desk.ask(None, path="/health/ready").status == 200
    assert desk.balance()[:2] == (500 - 9, 0)


def test_a_settlement_that_fails_waits_and_is_not_lost(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    key = desk.key(balance=2 * WORST)
    mend = failing(desk.ledger, "settle")
    with caplog.at_level(logging.ERROR):
        assert desk.ask(key, chat()).status == 200, "the client has its answer"
    assert "waits" in caplog.text
    assert desk.ledger.key("ada").held == WORST, "the hold stands"
    assert desk.ask(key, chat()).status == 503, "nothing more before it is written"
    mend()
    assert desk.ask(key, chat()).status == 200
    assert desk.balance()[:2] == (2 * WORST - 2 * 9, 0)


def test_what_is_set_aside_is_told_and_shuts_nobody_out(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """One request's row that cannot be written: the log and /health/ready say it, and the server goes on."""
    ada, bob = desk.key(balance=500), desk.key("bob", balance=500)

    def refuse(*_: Any) -> None:
        raise Unwritable("the ledger cannot hold a value: value too long for type character varying(32)")

    desk.ledger.settle = refuse  # type: ignore[method-assign]
    assert desk.ask(ada, chat()).status == 200
    del desk.ledger.settle  # type: ignore[method-assign]
    assert "varying(32)" in caplog.text
    answer = desk.ask(None, path="/health/ready")
    assert (answer.status, answer.json) == (200, {"status": "ready", "ledger": "ready", "settlements_set_aside": 1})
    assert [desk.ask(key, chat()).status for key in (ada, bob)] == [200, 200]
    assert desk.balance()[:2] == (500 - 2 * 9, 0), "it was charged"


def test_a_ledger_that_cannot_be_used_is_not_ready(desk: Desk) -> None:
    key = desk.key(balance=500)
    mend = failing(desk.ledger, "authenticate")
    desk.ask(key, chat())
    answer = desk.ask(None, path="/health/ready")
    assert (answer.status, answer.json["ledger"]) == (503, "cannot be used; see the log")
    mend()
    desk.ask(key, chat())
    assert desk.ask(None, path="/health/ready").status == 200


def test_a_beat_that_fails_is_not_the_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server that beats no more is taken for dead by others, and its holds are released while it runs."""
    ledger, really, beats = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}", Clock()), Ledger.beat, []

    def beat() -> Any:
        beats.append(1)
        if len(beats) == 2:
            raise RuntimeError("a fault that nobody thought of")
        return really(ledger)

    ledger.beat = beat  # type: ignore[method-assign]
    meter = Meter(ledger, {}, Clock(), beat_seconds=0.01)
    for _ in range(6000):
        if len(beats) > 3:
            break
        time.sleep(0.01)
    meter.close()
    assert len(beats) > 3
    assert "a beat failed" in caplog.text


def test_the_end_writes_what_waits(desk: Desk, tmp_path: Path) -> None:
    mend = failing(desk.ledger, "settle")
    desk.ask(desk.key(balance=500), chat())
    mend()
    desk.meter.close()
    desk.ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}", desk.clock)
    assert desk.balance()[:2] == (500 - 9, 0)


def test_many_at_once_never_overdraw(desk: Desk) -> None:
    key = desk.key(balance=3 * WORST)
    desk.engine.script = word_by_word("a", "b")

    async def storm() -> list[int]:
        answers = await asyncio.gather(*(desk.exchange(key, chat()).ended() for _ in range(20)))
        return [answer.status for answer in answers]

    statuses = run(storm(), 30)
    assert set(statuses) <= {200, 402}
    served = statuses.count(200)
    assert served >= 3
    assert desk.balance()[:2] == (3 * WORST - served * 7, 0)


def test_a_request_that_is_given_up_while_it_is_held(desk: Desk) -> None:
    """A client that leaves while the database is written: its hold is released."""
    key = desk.key(balance=500)

    async def leave() -> None:
        exchange = desk.exchange(key, chat()).begin()
        await asyncio.sleep(0.001)
        exchange.task.cancel()
        await asyncio.gather(exchange.task, return_exceptions=True)
        await asyncio.sleep(0.05)

    for _ in range(5):
        run(leave())
    assert desk.balance()[1] == 0
