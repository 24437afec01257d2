"""A batch: a line's answer is a function of the line and the fingerprint, whatever else there is, and is never torn."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
from batch_lines import answered, line, many, write
from fakes import HELLO, FakeEngine, FakeRegistry, output

from engine import EngineDead, NumericalFault, OutOfMemory, PreparedRequest, Registry, VerbatimError
from server.app import create_app
from server.batch.answering import Batch, Stopped
from server.batch.input import InputFile
from server.settings import ServerSettings

# -- the same bytes --------------------------------------------------------------------------------------------------


def test_order_and_concurrency_do_not_matter(registry: Registry, tmp_path: Path) -> None:
    """The engine of this registry takes 8 requests, 4 of them running."""
    lines = many()
    source = write(tmp_path / "in.jsonl", lines)
    alone = answered(source, registry, 1)
    assert [json.loads(data)["custom_id"] for data in alone] == [data["custom_id"] for data in lines]
    assert {json.loads(data)["response"]["status_code"] for data in alone} == {200}
    assert answered(source, registry, 4) == alone
    assert answered(source, registry, 8) == alone
    random.Random(3).shuffle(lines)
    shuffled = answered(write(tmp_path / "shuffled.jsonl", lines), registry, 8)
    assert shuffled != alone
    assert sorted(shuffled) == sorted(alone)


def test_what_a_line_is_made_of(registry: Registry, tmp_path: Path) -> None:
    body = json.loads(answered(write(tmp_path / "in", [line("a")]), registry, 1)[0])["response"]["body"]
    assert body["created"] == 0
    assert "prompt_tokens_details" not in body["usage"]
    same = answered(write(tmp_path / "again", [line("b"), line("a")]), registry, 2)
    other, again = (json.loads(data)["response"]["body"] for data in same)
    assert again == body
    assert (other["id"], other["seed"]) != (body["id"], body["seed"]), "another id is another draw"
    given = [line("a", seed=body["seed"]), line("c", seed=None)]
    drawn, null = (json.loads(d)["response"]["body"] for d in answered(write(tmp_path / "g", given), registry, 1))
    assert drawn["choices"] == body["choices"], "the seed that is told is the one that was used"
    assert isinstance(null["seed"], int)


def test_spaces_do_not_matter_and_content_does(registry: Registry, tmp_path: Path) -> None:
    data = line("a")
    (tmp_path / "in").write_text(json.dumps(data, indent=None, separators=(" , ", " : ")) + "\r\n")
    loose = answered(tmp_path / "in", registry, 1)
    assert loose == answered(write(tmp_path / "tight", [data]), registry, 1)
    assert loose != answered(write(tmp_path / "other", [line("a", "Hello!")]), registry, 1)


def test_an_endpoint_over_http_gives_the_same_body(registry: Registry, tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    [data] = answered(write(tmp_path / "in", [line("a", logprobs=True)]), registry, 1)
    body = json.loads(data)["response"]["body"]
    client = TestClient(create_app(registry), base_url="http://127.0.0.1")
    told = client.post("/v1/chat/completions", json={**line("a", logprobs=True)["body"], "seed": body["seed"]}).json()
    del told["usage"]["prompt_tokens_details"]
    assert {**told, "id": body["id"], "created": 0} == body


# -- lines that fail -------------------------------------------------------------------------------------------------

FAULTS: list[tuple[str, str, int | None, str]] = [
    ("nonsense", "The line is not JSON", None, "invalid_format"),
    ("[1]", "The line must be a JSON object", None, "invalid_format"),
    ('{"custom_id": "x", "custom_id": "y"}', "twice in one object", None, "duplicate_field"),
    ('"\\ud800"', "The line holds half a surrogate pair", None, "invalid_format"),
    (json.dumps({"method": "POST"}), "custom_id is required", None, "missing_field"),
    (json.dumps(line("")), "between 1 and 512 characters", None, "invalid_parameter"),
    (json.dumps(line(7)), "custom_id must be a string", None, "invalid_format"),
    (json.dumps(line("first")), "that of an earlier line", None, "invalid_parameter"),
    (json.dumps({**line("m"), "method": "GET"}), "method must be POST", None, "invalid_parameter"),
    (json.dumps({**line("u"), "url": "/v1/embeddings"}), "url must be /v1/chat/completions", None, "invalid_parameter"),
    (json.dumps({**line("b"), "body": []}), "body must be an object", None, "invalid_format"),
    (json.dumps({**line("k"), "priority": 1}), "'priority' is not a key", None, "invalid_format"),
    (json.dumps(line("s", stream=True)), "answered as a whole", None, "unsupported_parameter"),
    (json.dumps(line("model", model="gpt-4")), "the model 'gpt-4' does not exist", 404, "model_not_found"),
    (json.dumps(line("422", temperature=3)), "temperature must be between", 422, "invalid_parameter"),
    (json.dumps(line("400", temperature="x")), "temperature must be a number", 400, "invalid_format"),
    (json.dumps(line("long", "long " * 200)), "context holds 128", 400, "context_length_exceeded"),
]


def test_a_fault_is_its_own_lines_answer(registry: Registry, tmp_path: Path) -> None:
    """What HTTP would refuse is the body of a response; what is no request at all is an error of the line."""
    source = tmp_path / "in"
    wide = b'{"custom_id": "' + b"x" * 5000 + b'"}'
    first, last = json.dumps(line("first")), json.dumps(line("last"))
    source.write_bytes(b"\n".join([first.encode(), *(text.encode() for text, *_ in FAULTS), b" ", wide, last.encode()]))
    out = [json.loads(data) for data in answered(source, registry, 4, settings=ServerSettings(max_body_bytes=4096))]
    assert [out[0]["response"]["status_code"], out[-1]["response"]["status_code"]] == [200, 200]
    assert "more than 4096 bytes" in out[-2]["error"]["message"]
    assert len(out) == len(FAULTS) + 3, "blank lines have no answer"
    for (text, words, status, code), got in zip(FAULTS, out[1:], strict=False):
        if status is None:
            assert got["response"] is None, text
            error = got["error"]
        else:
            assert got["error"] is None, text
            assert got["response"]["status_code"] == status
            error = got["response"]["body"]["error"]
        assert (words in error["message"], error["code"]) == (True, code), error
    assert len({got["id"] for got in out}) >= len(out) - 1


def test_ignored_fields_are_named(registry: Registry, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a", foo=1, bar=2)])
    assert json.loads(answered(source, registry, 1)[0])["response"]["ignored_fields"] == "foo, bar"
    [strict] = answered(source, registry, 1, settings=ServerSettings(strict_params=True))
    assert json.loads(strict)["response"]["body"]["error"]["code"] == "unknown_field"


# -- what depends on the load ----------------------------------------------------------------------------------------


def fake_lines(count: int) -> list[dict[str, Any]]:
    return [line(str(i), model="fake") for i in range(count)]


def test_a_request_without_memory_is_run_again_alone(tmp_path: Path) -> None:
    """Whether memory suffices depends on the neighbours: such a refusal never becomes an answer."""
    engine = FakeEngine()

    def script(request: PreparedRequest) -> Any:
        if len(engine.open) > 1:
            yield output(request, [], 0, finished=True, error=OutOfMemory("out of memory."))
        else:
            yield 0.01
            yield from HELLO(request)

    engine.script = script
    out = answered(write(tmp_path / "in", fake_lines(6)), FakeRegistry(engine), 3)
    assert [json.loads(data)["response"]["status_code"] for data in out] == [200] * 6


def test_a_request_without_a_place_is_run_again_alone(registry: Registry, tmp_path: Path) -> None:
    """The engine of this registry takes 8 requests; here 12 are under way."""
    source = write(tmp_path / "in", many(24))
    assert answered(source, registry, 12) == answered(source, registry, 1)


@pytest.mark.parametrize("error", [OutOfMemory("too large."), NumericalFault("not finite.")])
def test_a_fault_of_the_request_itself_is_its_answer(tmp_path: Path, error: VerbatimError) -> None:
    engine = FakeEngine(lambda request: [output(request, [], 0, finished=True, error=error)])
    out = answered(write(tmp_path / "in", fake_lines(3)), FakeRegistry(engine), 2)
    for data in out:
        response = json.loads(data)["response"]
        assert (response["status_code"], response["body"]["error"]["code"]) == (503, error.code)


def test_a_dead_engine_stops_the_run(tmp_path: Path) -> None:
    engine = FakeEngine(submit_error=EngineDead("fake has stopped: broken."))
    with pytest.raises(Stopped, match="fake has stopped"):
        answered(write(tmp_path / "in", fake_lines(20)), FakeRegistry(engine), 4)
    assert not engine.open


def test_what_is_held_is_bounded(tmp_path: Path) -> None:
    """While the first line takes long, a bounded number of those behind it is run."""
    engine = FakeEngine()
    most = 0

    def script(request: PreparedRequest) -> Any:
        nonlocal most
        most = max(most, len(engine.open))
        if len(engine.requests) <= 2:
            yield 0.3
        yield from HELLO(request)

    engine.script = script
    source = write(tmp_path / "in", fake_lines(100))
    seen: list[int] = []

    async def collect() -> None:
        with InputFile(source, 10_000) as file:
            batch = Batch(create_app(FakeRegistry(engine)), {}, concurrency=2)  # type: ignore[arg-type]
            async for _ in batch.answers(file):
                seen.append(len(engine.requests))

    asyncio.run(collect())
    assert most == 2
    assert seen[0] <= 16
    assert len(seen) == 100


def test_leaving_early_frees_every_place(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.script = lambda r: HELLO(r) if r.request_id == engine.requests[0].request_id else [None]

    async def one() -> None:
        with InputFile(write(tmp_path / "in", fake_lines(9)), 10_000) as file:
            answers = Batch(create_app(FakeRegistry(engine)), {}, concurrency=4).answers(file)  # type: ignore[arg-type]
            await anext(answers)
            assert len(engine.open) >= 3
            await answers.aclose()

    asyncio.run(one())
    assert not engine.open
