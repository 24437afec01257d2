"""All of it as a user has it: a real checkpoint shape with its real tokenizer, a server process, the openai client.

The shapes are shrunk (two layers), the tokenizers and templates are the published ones: byte-level BPE with padding
rows in the vocabulary (qwen3-0.6b), SentencePiece with byte fallback (phi-3).
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from live_server import Server, start
from openai import OpenAI
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow
SHAPES = ("qwen3-0.6b", "phi-3")
MESSAGES: Any = [{"role": "user", "content": "Say something. 🙂 你好"}]


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    tool = shared / "tools" / "make_checkpoint.py"
    subprocess.run(
        [sys.executable, str(tool), request.param, str(folder), "--layers", "2", "--hidden", "128"],
        check=True,
        capture_output=True,
        timeout=200,
    )
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "models.yaml").write_text(
        f"models:\n  - {{id: live, path: {checkpoint}, context_length: 1024, cache_size: 256MiB, max_sequences: 8}}\n"
    )
    with start([], folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


def ask(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "live", "messages": MESSAGES, "max_tokens": 24, "seed": 5, **fields}
    )


def joined(entries: Any) -> str:
    return b"".join(bytes(e.bytes) for e in entries).decode(errors="replace")


def test_a_reply_has_everything_the_reference_promises(client: OpenAI, checkpoint: Path) -> None:
    reply = ask(client)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert reply.id.startswith("chatcmpl-")
    assert reply.object == "chat.completion"
    assert abs(reply.created - time.time()) < 60
    assert (reply.model, reply.seed) == ("live", 5)
    assert reply.system_fingerprint.startswith("vb-")
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    [choice] = reply.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")


def test_the_text_is_what_the_tokenizer_says(client: OpenAI, checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for seed in range(4):
        [choice] = ask(client, seed=seed, max_tokens=60, logprobs=True, extra_body={"return_token_ids": True}).choices
        expected = tokenizer.decode(choice.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert choice.message.content == expected
        assert max(choice.token_ids) < len(tokenizer), "a padding row of the vocabulary was produced"
        assert len(choice.logprobs.content) == len(choice.token_ids)


def test_the_stream_is_the_same_answer(client: OpenAI) -> None:
    fields: dict[str, Any] = {"n": 3, "logprobs": True, "top_logprobs": 2, "max_tokens": 40}
    whole = ask(client, **fields)
    texts, entries, ends = [""] * 3, [[], [], []], [None] * 3  # type: ignore[var-annotated]
    usage = None
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}, **fields):
        assert chunk.system_fingerprint == whole.system_fingerprint
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert chunk.usage is None
            texts[choice.index] += choice.delta.content or ""
            entries[choice.index] += choice.logprobs.content if choice.logprobs else []
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [c.message.content for c in whole.choices]
    assert entries == [c.logprobs.content for c in whole.choices]
    assert ends == [c.finish_reason for c in whole.choices]
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_three_choices_differ_and_the_first_is_the_answer_to_one(client: OpenAI) -> None:
    three, one = ask(client, n=3).choices, ask(client).choices
    assert [c.index for c in three] == [0, 1, 2]
    assert three[0].message.content == one[0].message.content
    assert len({c.message.content for c in three}) == 3


def test_logprobs_are_sorted_cover_every_token_and_rebuild_the_text(client: OpenAI) -> None:
    [choice] = ask(client, logprobs=True, top_logprobs=5, max_tokens=40).choices
    assert joined(choice.logprobs.content) == choice.message.content
    for entry in choice.logprobs.content:
        values = [t.logprob for t in entry.top_logprobs]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert "\ufffd" not in entry.token


def test_stop_ends_before_the_text(client: OpenAI) -> None:
    free = ask(client, max_tokens=60).choices[0].message.content
    stop = free[len(free) // 2 :][:3]
    [choice] = ask(client, max_tokens=60, stop=[stop, "never this"]).choices
    assert choice.finish_reason == "stop"
    assert choice.message.content == free[: free.index(stop)]
    streamed = "".join(c.choices[0].delta.content or "" for c in ask(client, max_tokens=60, stop=stop, stream=True))
    assert streamed == choice.message.content


def test_logit_bias_forces_and_bans(client: OpenAI, checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    [token] = tokenizer.encode("a", add_special_tokens=False)[-1:]
    extra = {"return_token_ids": True}
    [choice] = ask(client, logit_bias={str(token): 100}, max_tokens=5, extra_body=extra).choices
    assert choice.token_ids == [token] * 5
    first = ask(client, temperature=0, max_tokens=1, extra_body=extra).choices[0].token_ids[0]
    banned = ask(client, temperature=0, max_tokens=8, logit_bias={str(first): -100}, extra_body=extra).choices[0]
    assert first not in banned.token_ids


def test_seeds_repeat_under_load(client: OpenAI) -> None:
    """Sixteen clients at once, in changing order, with neighbours of every length: each seed keeps its bytes."""

    def reply(seed: int) -> tuple[int, str, float]:
        answer = ask(client, seed=seed, max_tokens=6 + seed % 17, temperature=1.2, logprobs=True)
        [choice] = answer.choices
        return seed, choice.message.content, sum(e.logprob for e in choice.logprobs.content)

    alone = {seed: reply(seed) for seed in range(8)}
    with ThreadPoolExecutor(16) as pool:
        for result in pool.map(reply, [*range(8)] * 2 + [*range(7, -1, -1)] * 2):
            assert result == alone[result[0]]


def test_a_seed_that_was_not_given_is_told_and_replays(client: OpenAI) -> None:
    first = ask(client, seed=None)
    again = ask(client, seed=first.seed)
    assert again.choices[0].message.content == first.choices[0].message.content


def test_both_prefixes(server: Server) -> None:
    texts = {ask(server.client(prefix)).choices[0].message.content for prefix in ("/v1", "/api/v1")}
    assert len(texts) == 1
    assert [m.id for m in server.client("/api/v1").models.list()] == ["live"]
    assert server.client().models.retrieve("live").reproducible["holds"] is True  # type: ignore[attr-defined]


def test_errors_arrive_as_the_clients_own_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        ask(client, temperature=2.5)
    assert refused.value.body["param"] == "temperature"  # type: ignore[index]
    with pytest.raises(openai.NotFoundError):
        ask(client, model="other")
    with pytest.raises(openai.BadRequestError) as too_long:
        ask(client, messages=[{"role": "user", "content": "many words " * 2000}])
    assert too_long.value.code == "context_length_exceeded"
    assert too_long.value.body["context_length"] == 1024  # type: ignore[index]


def test_a_client_that_goes_away_frees_its_place(server: Server, client: OpenAI) -> None:
    """Eight places, eight streams that are dropped after the first chunk: the ninth request is served at once."""
    body = {"model": "live", "messages": MESSAGES, "max_tokens": 900, "ignore_eos": True, "stream": True}
    for _ in range(8):
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as stream:
            next(stream.iter_lines())
    began = time.monotonic()
    assert ask(client, max_tokens=2).usage.completion_tokens == 2
    assert time.monotonic() - began < 10, "the dropped streams still held their places"


def test_no_socket_but_the_one_it_listens_on(server: Server, client: OpenAI) -> None:
    ask(client)
    for connection in psutil.Process(server.process.pid).net_connections(kind="inet"):
        assert connection.laddr.port == server.port, connection
        assert connection.laddr.ip == "127.0.0.1"


def test_it_says_what_it_does_and_ends_in_order(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """`--model` without any file; SIGTERM lets a running reply finish and the process ends with 0."""
    with start(["--model", str(tiny("qwen3")), "--name", "named"], tmp_path) as server:
        seen: list[str] = []

        def read() -> None:
            body = {"model": "named", "messages": MESSAGES, "max_tokens": 30, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as stream:
                seen.extend(line for line in stream.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        deadline = time.monotonic() + 60
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.stop() == 0
        reader.join(60)
        assert seen[-1] == "data: [DONE]"
        log = server.log.read_text()
        assert "named: self-test" in log
        assert "stopped." in log
        assert "Traceback" not in log
