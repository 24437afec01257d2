"""Every reply is counted once, however it ends, and its tokens are those of its usage and of the ledger."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import CHAT, begin, call, run
from fakes import HELLO, FakeEngine, Step, chat, make_app, output
from hypothesis import given, settings, strategies as st
from ledger_for_tests import Clock

from engine import ChoiceDelta, OutOfMemory, PreparedRequest, RequestStream, Usage, VerbatimError
from server.accounts.charging import Meter
from server.errors import ClientGone
from server.ledger.store import Ledger
from server.metrics.counts import ModelCounts
from server.metrics.replies import ReplyWatch


class Ticks:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(tokens: int, new: tuple[int, ...], *, finish: Any = None, **fields: Any) -> Any:
    """An output after which `tokens` were generated: `new` tokens for each choice in this step."""
    from engine import RequestOutput

    deltas = tuple(ChoiceDelta(i, "", tuple(range(count)), finish_reason=finish) for i, count in enumerate(new))
    return RequestOutput("r", deltas, Usage(7, tokens, 3), finished=finish is not None, **fields)


def test_the_times_of_a_reply() -> None:
    """Whenever its client reads: outputs are noted when they arrive."""
    clock, counts, stream = Ticks(), ModelCounts(), RequestStream("r")
    with ReplyWatch(counts, clock, began=99.0) as watch:
        watch.runs(stream, 2)
        clock.now = 102.0
        stream.deliver(step(2, (1, 1), queued_seconds=1.5))
        clock.now = 103.0
        stream.deliver(step(6, (3, 1)))  # one choice had a draft
        clock.now = 105.0
        stream.deliver(step(8, (1, 1), finish="stop"))
        clock.now = 109.0
    assert (counts.queue_time.total, counts.queue_time.count) == (1.5, 1)
    assert (counts.first_token.total, counts.first_token.count) == (3.0, 1)
    assert (counts.between_tokens.total, counts.between_tokens.count) == (pytest.approx(1 / 3 + 2), 2)
    assert (counts.per_token.total, counts.per_token.count) == (3 / 4, 1)
    assert (counts.whole.total, counts.whole.count) == (6.0, 1)
    assert (counts.prompt_tokens, counts.cached_tokens, counts.generation_tokens) == (7, 3, 8)
    assert counts.outcomes == {"complete": 1, "disconnected": 0, "error": 0}
    assert counts.reasons == {"stop": 2, "length": 0, "tool_calls": 0}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ClientGone(), "disconnected"),
        (asyncio.CancelledError(), "disconnected"),
        (OutOfMemory("full"), "error"),
        (RuntimeError(), "error"),
        (None, "disconnected"),  # how `unless_disconnected` ends
    ],
)
def test_what_is_computed_after_the_end_counts_once(error: BaseException | None, outcome: str) -> None:
    async def main() -> None:
        counts, stream = ModelCounts(), RequestStream("r")
        try:
            with ReplyWatch(counts, Ticks(), 0.0) as watch:
                watch.runs(stream, 1)
                stream.deliver(step(1, (1,)))
                stream.leaving = asyncio.get_running_loop().create_future()  # as an abort does
                stream.end()
                if error is not None:
                    raise error
        except BaseException as raised:
            if raised is not error:
                raise
        assert counts.outcomes[outcome] == counts.outcomes.total() == 1
        assert (counts.generation_tokens, counts.cached_tokens) == (1, 0)
        stream.note(step(4, (3,)))  # the step that was under way
        stream.usage = Usage(7, 5, 2)
        stream.leaving.set_result(None)
        await asyncio.sleep(0)
        assert (counts.prompt_tokens, counts.cached_tokens, counts.generation_tokens) == (7, 2, 5)
        assert counts.outcomes.total() == 1

    run(main())


def test_a_reply_of_which_nothing_was_accepted_is_a_refusal() -> None:
    counts = ModelCounts()
    with pytest.raises(VerbatimError), ReplyWatch(counts, Ticks(), 0.0):
        raise VerbatimError("no room")
    assert counts.outcomes.total() == 0


# -- a random mix, over the whole application -------------------------------------------------------------------------


class Shop:
    """An application with keys, its ledger and its metrics."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}", Clock())
        self.meter = Meter(self.ledger, {}, Clock())
        self.engine = FakeEngine()
        self.app = make_app(self.engine, meter=self.meter, metrics="open")
        self.secret = self.ledger.create_key("ada").secret

    def begin(self, body: dict[str, Any], path: str = CHAT) -> Any:
        return begin(self.app, body, path=path, headers=[(b"authorization", f"Bearer {self.secret}".encode())])


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path)
    yield made
    made.meter.close()


def endless(request: PreparedRequest) -> Iterable[Step]:
    """Tokens without an end, a little time apart."""
    for i in range(10_000):
        yield output(request, [ChoiceDelta(c, "x", (1,)) for c in range(request.params.n)], (i + 1) * request.params.n)
        yield 0.001


def failing(request: PreparedRequest) -> Iterable[Step]:
    """Two tokens, then an error that is the request's own fault and charged as such."""
    from engine import RequestError

    yield output(request, [ChoiceDelta(0, "x", (1,))], 1)
    yield output(request, [ChoiceDelta(0, "y", (1,))], 2)
    yield output(request, (), 2, finished=True, error=RequestError("its grammar is stuck"))


def figures(app: Any) -> dict[tuple[str, str], float]:
    """(name, last label) → value, of the model's counters."""
    from prometheus_client.parser import text_string_to_metric_families as families

    text = call(app, path="/metrics").body.decode()
    return {
        (
            one.name.removeprefix("verbatim:"),
            next((v for k, v in one.labels.items() if k != "model_name"), ""),
        ): one.value
        for family in families(text)
        for one in family.samples
        if one.labels.get("model_name") == "fake" and "le" not in one.labels
    }


KINDS = ("whole", "streamed", "several", "prompts", "left", "failed", "failed stream", "refused")


@given(kinds=st.lists(st.sampled_from(KINDS), max_size=8), seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_the_sums_are_those_of_the_ledger(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], seed: int
) -> None:
    shop = Shop(tmp_path_factory.mktemp("shop"))
    ends: Counter[str] = Counter()
    told: list[dict[str, Any]] = []

    async def one(kind: str, pause: float) -> None:
        await asyncio.sleep(pause)
        shop.engine.script = endless if kind == "left" else failing if "failed" in kind else HELLO
        if kind == "prompts":
            answer = await shop.begin({"model": "fake", "prompt": ["ab", "cde"]}, "/v1/completions").ended()
        elif kind == "left":
            exchange = shop.begin(chat(stream=True, n=2))
            await exchange.until(lambda: len(exchange.messages) > 3)
            exchange.disconnect()
            await asyncio.wait_for(exchange.task, 60)
            ends["disconnected"] += 1
            return
        else:
            fields: dict[str, Any] = {"whole": {}, "several": {"n": 3}, "refused": {"temperature": 9}}.get(
                kind, {"stream": True}
            )
            answer = await shop.begin(chat(**({} if kind == "failed" else fields))).ended()
        if kind == "refused":
            assert answer.status == 422
        elif "failed" in kind:
            ends["error"] += 1
        else:
            ends["complete"] += 1
            if kind in ("whole", "several", "prompts"):
                told.append(answer.json["usage"])

    async def main() -> None:
        chance = random.Random(seed)
        for kind in kinds:  # the script is the engine's, so one after the other
            await one(kind, chance.random() * 0.002)
        await shop.meter.drain()

    run(main())
    shop.meter._worker.submit(lambda: None).result()
    found = figures(shop.app)
    [row] = shop.ledger.usage() or [dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), 0)]
    assert found["prompt_tokens_total", ""] == row["prompt_tokens"]
    assert found["prefix_cache_hits_total", ""] == row["cached_tokens"]
    assert found["generation_tokens_total", ""] == row["completion_tokens"]
    if set(kinds) <= {"whole", "several", "prompts", "refused"}:
        assert sum(usage["completion_tokens"] for usage in told) == row["completion_tokens"]
        assert sum(usage["prompt_tokens"] for usage in told) == row["prompt_tokens"]
    for outcome in ("complete", "disconnected", "error"):
        assert found["replies_total", outcome] == ends[outcome]
    assert found["e2e_request_latency_seconds_count", ""] == ends["complete"]
    assert found["time_to_first_token_seconds_count", ""] == ends.total()
    shop.meter.close()
