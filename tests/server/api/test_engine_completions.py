"""Completions and the tokenizer's endpoints on real engines: bytes, and SentencePiece's kind."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Answer, call
from hypothesis import HealthCheck, given, settings, strategies as st
from openai import OpenAI
from test_completions import joined
from tokenizers import processors
from wire_client import serving

from engine import ModelConfig, Registry
from server.api import admission
from server.api.completions import reply
from server.app import create_app
from tests.engine import tokenizers_for_tests

PIECES = "tiny-pieces"
MODELS = ["tiny", PIECES]
TEXTS = st.lists(st.sampled_from(["a", "hello", " world", "é", "🤷", "\n", ".", "  ", "漢"]), min_size=1, max_size=8)
SETTINGS = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


def llama_with_pieces(folder: Path) -> Path:
    """A checkpoint with SentencePiece's kind of tokenizer, which puts `<s>` before a text."""
    found = tokenizers_for_tests.llama_like()
    found.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    found.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def app(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One application per model, as a key's tokenizer endpoints want one model."""
    import tiny_models

    folder = llama_with_pieces(tiny_models.write(tmp_path_factory.mktemp("pieces") / "llama", "llama"))
    config = ModelConfig(
        id=PIECES,
        path=folder,
        cache_size="8MiB",
        context_length=128,
        max_sequences=4,
        threads=1,  # type: ignore[arg-type]
    )
    other = Registry([config])
    other.start()
    other.wait()
    apps = {"tiny": create_app(registry), PIECES: create_app(other)}
    yield apps
    other.close()


def ask(app: Any, model: str, path: str = "/v1/completions", **fields: Any) -> Answer:
    defaults = {"max_tokens": 6, "seed": 7} if path.endswith("completions") else {}
    return call(app[model], {"model": model, **defaults, **fields}, path=path)


def good(answer: Answer) -> Any:
    assert answer.status == 200, answer.body
    return answer.json


@pytest.mark.parametrize("model", MODELS)
def test_an_echo_is_the_whole_text_token_by_token(app: Any, model: str) -> None:
    """The tokens' texts, put together at their offsets, are the text; the prompt in it is what was sent."""

    @SETTINGS
    @given(TEXTS.map("".join))
    def check(prompt: str) -> None:
        [choice] = good(ask(app, model, prompt=prompt, echo=True, logprobs=2, return_token_ids=True))["choices"]
        plain = good(ask(app, model, prompt=prompt, logprobs=2))["choices"][0]
        assert choice["text"] == prompt + plain["text"]
        found = choice["logprobs"]
        count = len(found["tokens"]) - len(choice["token_ids"])
        assert {name: values[count:] for name, values in found.items() if name != "text_offset"} == {
            name: values for name, values in plain["logprobs"].items() if name != "text_offset"
        }
        offsets = [place - len(prompt) for place in found["text_offset"][count:]]
        assert offsets == plain["logprobs"]["text_offset"]
        assert found["token_logprobs"][0] is None
        assert None not in found["token_logprobs"][1:]
        assert found["text_offset"] == sorted(found["text_offset"])
        ends = [*found["text_offset"][1:count], len(prompt)]
        for token, start, end in zip(found["tokens"][:count], found["text_offset"][:count], ends, strict=True):
            if not token.startswith("bytes:") and model == "tiny" and token != "<|im_end|>":
                assert choice["text"][start:end] == token

    check()


@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_of_ids_is_the_prompt_of_its_text(app: Any, model: str) -> None:
    @SETTINGS
    @given(TEXTS.map("".join))
    def check(prompt: str) -> None:
        ids = good(ask(app, model, "/tokenize", prompt=prompt))["tokens"]
        fields = {"logprobs": 1, "prompt_logprobs": 1, "return_token_ids": True, "margins": True}
        by_text, by_ids = (good(ask(app, model, prompt=given, **fields)) for given in (prompt, ids))
        assert by_text["choices"] == by_ids["choices"]
        assert by_text["usage"]["prompt_tokens"] == len(ids)

    check()


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_is_the_synchronous_answer(app: Any, model: str) -> None:
    @SETTINGS
    @given(
        st.lists(TEXTS.map("".join), min_size=1, max_size=3),
        st.fixed_dictionaries(
            {},
            optional={
                "n": st.integers(1, 2),
                "logprobs": st.integers(0, 3),
                "echo": st.booleans(),
                "prompt_logprobs": st.integers(0, 2),
                "max_tokens": st.integers(0, 8),
                "margins": st.booleans(),
                "return_token_ids": st.booleans(),
                "stop": st.sampled_from(["a", "é"]),
                "temperature": st.sampled_from([0, 1.5]),
            },
        ),
    )
    def check(prompts: list[str], fields: dict[str, Any]) -> None:
        whole = good(ask(app, model, prompt=prompts, **fields))
        *events, last, done = ask(
            app, model, prompt=prompts, **fields, stream=True, stream_options={"include_usage": True}
        ).events
        assert done == "[DONE]"
        assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        expected = [{name: v for name, v in choice.items() if name != "index"} for choice in whole["choices"]]
        assert joined(events, len(expected)) == expected

    check()


@pytest.mark.parametrize("model", MODELS)
def test_several_prompts_are_answered_as_if_each_were_alone(app: Any, model: str) -> None:
    prompts = ["hello", "a", "hello world.", "\n"]
    fields = {"logprobs": 1, "echo": True, "n": 2}
    together = good(ask(app, model, prompt=prompts, **fields))
    alone = [good(ask(app, model, prompt=prompt, **fields)) for prompt in prompts]
    texts = [choice for body in alone for choice in body["choices"]]
    assert [{**choice, "index": i % 2} for i, choice in enumerate(together["choices"])] == texts
    for name in ("prompt_tokens", "completion_tokens"):
        assert together["usage"][name] == sum(body["usage"][name] for body in alone)


def test_a_prompt_rendered_by_hand_is_the_chats(app: Any) -> None:
    """`/tokenize` gives the tokens of a chat request; continued as a plain prompt they are the same reply."""
    messages = [{"role": "system", "content": "Be <|im_end|> brief."}, {"role": "user", "content": "Hé?"}]
    found = good(ask(app, "tiny", "/v1/tokenize", messages=messages, return_token_strs=True))
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    chat = good(ask(app, "tiny", "/v1/chat/completions", messages=messages, return_token_ids=True, prompt_logprobs=1))
    plain = good(ask(app, "tiny", prompt=found["tokens"], return_token_ids=True, prompt_logprobs=1))
    assert chat["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]
    assert chat["usage"]["prompt_tokens"] == found["count"]
    assert chat["prompt_logprobs"] == plain["choices"][0]["prompt_logprobs"]
    assert [next(iter(e)) for e in chat["prompt_logprobs"][1:]] == [str(i) for i in found["tokens"][1:]]


def test_the_assistants_turn_may_be_left_out(app: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with_turn, without = (
        good(ask(app, "tiny", "/tokenize", messages=messages, add_generation_prompt=turn))["tokens"]
        for turn in (True, False)
    )
    assert with_turn[: len(without)] == without
    assert len(with_turn) > len(without)


@pytest.mark.parametrize("model", MODELS)
def test_tokens_become_their_text_again(app: Any, model: str) -> None:
    for special in (True, False):
        ids = good(ask(app, model, "/tokenize", prompt="hello é", add_special_tokens=special))["tokens"]
        text = good(ask(app, model, "/detokenize", tokens=ids))["prompt"]
        assert text.removeprefix("<s>").strip() == "hello é"
        assert text.startswith("<s>") == (special and model == PIECES)


def test_a_text_over_the_context_is_counted(app: Any) -> None:
    assert good(ask(app, "tiny", "/tokenize", prompt="ab " * 200))["count"] > 128


def test_chat_tells_prompt_logprobs_and_margins_streamed_or_not(app: Any) -> None:
    fields = {"messages": [{"role": "user", "content": "Hi"}], "prompt_logprobs": 2, "margins": True, "n": 2}
    whole = good(ask(app, "tiny", "/v1/chat/completions", **fields, return_token_ids=True))
    *events, _ = ask(app, "tiny", "/v1/chat/completions", **fields, return_token_ids=True, stream=True).events
    assert events[0]["prompt_logprobs"] == whole["prompt_logprobs"]
    assert sum("prompt_logprobs" in event for event in events) == 1
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    for choice in whole["choices"]:
        assert len(choice["margins"]) == len(choice["token_ids"])
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert [m for part in parts for m in part.get("margins", [])] == choice["margins"]
        assert all(margin is None or margin >= 0 for margin in choice["margins"])


@pytest.mark.parametrize("content", ["text", "parts"])
def test_a_prediction_changes_nothing_but_is_told(app: Any, content: str) -> None:
    fields = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "ignore_eos": True}
    path = "/v1/chat/completions"
    plain = good(ask(app, "tiny", path, **fields))
    text = "abc " + plain["choices"][0]["message"]["content"]
    given = text if content == "text" else [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]
    helped = good(ask(app, "tiny", path, **fields, prediction={"type": "content", "content": given}))
    assert helped["choices"] == plain["choices"]
    details = helped["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] > 0
    assert plain["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_at_all(app: Any, stream: bool) -> None:
    """`max_tokens: 0` computes the prompt, and says so."""
    fields = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 0, "stream": stream}
    answer = ask(app, "tiny", "/v1/chat/completions", **fields)
    if stream:
        assert [c["finish_reason"] for e in answer.events[:-1] for c in e["choices"]][-1] == "length"
        return
    [choice] = good(answer)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert answer.json["usage"]["completion_tokens"] == 0
    [choice] = good(ask(app, "tiny", max_tokens=0, prompt="hello", echo=True, logprobs=1))["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello", "length")
    assert len(choice["logprobs"]["tokens"]) > 1


def test_log_probabilities_of_prompts_are_bounded_in_one_reply(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each choice repeats those of its prompt, so a short body could ask for a reply that takes minutes to write."""
    fields = {"prompt": [[5] * 50] * 3, "max_tokens": 0, "echo": True, "logprobs": 4}
    monkeypatch.setattr(admission, "MOST_TOLD", 3 * 50 * 5)
    good(ask(app, "tiny", **fields))
    answer = ask(app, "tiny", n=2, **fields)
    assert answer.status == 422
    assert answer.json["error"]["param"] == "logprobs"
    assert "1500 log-probabilities" in answer.json["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_prompts_are_written_beside_the_event_loop(
    app: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """There may be many, and meanwhile others are to be served."""
    writers: dict[str, list[int]] = {"scored": [], "drawn": []}
    of = reply._Parts.of

    def noted(self: Any, output: Any) -> Any:
        writers["drawn" if output.prompt_logprobs is None else "scored"].append(threading.get_ident())
        return of(self, output)

    monkeypatch.setattr(reply._Parts, "of", noted)
    answer = ask(app, "tiny", prompt=[[5] * 50, [6] * 40], max_tokens=3, echo=True, logprobs=2, stream=stream)
    assert answer.status == 200
    assert len(writers["scored"]) == 2
    assert not set(writers["scored"]) & set(writers["drawn"])


def test_a_suffix_needs_tokens_for_it(app: Any) -> None:
    answer = ask(app, "tiny", prompt="a", suffix="b")
    assert (answer.status, answer.error["param"], answer.error["code"]) == (422, "suffix", "unsupported_parameter")
    answer = ask(app, "tiny", prompt=[5], suffix="b")
    assert (answer.status, answer.error["param"]) == (422, "suffix")


def test_errors_name_the_prompt_among_several(app: Any) -> None:
    for prompt, param in [
        (["a", "b " * 200], "prompt.1"),
        ([[5], [446]], "prompt.1"),
        (["a", ""], "prompt.1"),
        ("b " * 200, "prompt"),
    ]:
        answer = ask(app, "tiny", prompt=prompt)
        assert answer.status in (400, 422)
        assert answer.error["param"] == param


def test_the_openai_client(app: Any) -> None:
    with serving(app["tiny"]) as running:
        client = OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0)
        whole = client.completions.create(model="tiny", prompt=["hello", "a"], logprobs=2, echo=True, seed=1)
        chunks = client.completions.create(
            model="tiny", prompt=["hello", "a"], logprobs=2, echo=True, seed=1, stream=True
        )
        texts = ["", ""]
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [choice.text for choice in whole.choices]
        assert whole.choices[0].logprobs is not None
        assert whole.choices[0].logprobs.token_logprobs is not None
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 32


def remote_tokenizer(url: str) -> Callable[[str, dict[str, Any] | None], Any]:
    """What evaluation harnesses with a remote tokenizer send: no model, no more fields than these."""
    import httpx

    def send(path: str, body: dict[str, Any] | None) -> Any:
        answer = httpx.get(url + path) if body is None else httpx.post(url + path, json=body)
        assert answer.status_code == 200, answer.text
        return json.loads(answer.text)

    return send


def test_a_remote_tokenizer_and_log_likelihoods(app: Any) -> None:
    """lm-evaluation-harness with `tokenizer_backend: remote`: encode, decode, and score what comes after a context."""
    with serving(app["tiny"]) as running:
        send = remote_tokenizer(f"http://127.0.0.1:{running.port}")
        info = send("/tokenizer_info", None)
        assert {"eos_token", "bos_token", "pad_token", "chat_template"} <= info.keys()
        encode = lambda text: send("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]  # noqa: E731
        assert len(encode(info["eos_token"])) == 1
        context, continuation = encode("hello"), encode(" world")
        assert send("/detokenize", {"tokens": context + continuation})["prompt"] == "hello world"
        body = {"model": "tiny", "prompt": [context + continuation], "temperature": 0, "max_tokens": 1, "logprobs": 1}
        body |= {"seed": 1234, "echo": True}
        [choice] = send("/v1/completions", body)["choices"]
        scores = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        assert len(scores) == len(tops) == len(continuation)
        assert all(score <= max(top.values()) for score, top in zip(scores, tops, strict=True))
