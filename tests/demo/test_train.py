"""Training: what the loss is taken on, and that stopping and going on changes nothing."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest
import torch
from safetensors.torch import load_file

from demo import tokenizer as tokenizing, train
from demo.corpus import conversation


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return tokenizing.train(0, 300)


def test_the_prompt_is_a_prefix_of_what_was_trained(tokenizer) -> None:  # type: ignore[no-untyped-def]
    for index in range(150):
        drawn = conversation(0, index)
        example = train.render(tokenizer, drawn)
        prompt = tokenizer.apply_chat_template(
            drawn.messages[:-1], tools=drawn.tools, add_generation_prompt=True, enable_thinking=drawn.thinking,
            tokenize=False,
        )  # fmt: skip
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert example.ids[: len(ids)] == ids
        assert example.weights[len(ids) - 1] == 0
        assert example.weights[len(ids)] > 0
        assert example.weights[-2] > 0  # the end of the turn; a line end follows


def test_text_comes_back_and_digits_stand_alone(tokenizer) -> None:  # type: ignore[no-untyped-def]
    for text in ('{"name": "Zoë", "n": 1234}', "naïve 🙂 你好\n\n  two", "<tool_call>\n{}\n</tool_call>", "a<think>b"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("1234") == list("1234")
    assert len(tokenizer.tokenize("<think></think><tool_call></tool_call>")) == 4


def test_the_template_reads_calls_and_thoughts_as_clients_send_them(tokenizer) -> None:  # type: ignore[no-untyped-def]
    def render(*messages: dict[str, object], **variables: object) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **variables))

    user, call = {"role": "user", "content": "x"}, {"name": "f", "arguments": {"a": "é"}}
    as_object = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}
    as_text = {**as_object, "tool_calls": [{"function": {**call, "arguments": '{"a": "é"}'}}]}
    shown = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call><|im_end|>'
    assert shown in render(user, as_object)
    assert render(user, as_object) == render(user, as_text)
    thought = {"role": "assistant", "content": "y", "reasoning_content": "because"}
    assert "<think>\nbecause\n</think>\n\ny" in render(user, thought)
    assert "because" not in render(user, thought, user)
    assert "because" not in render(user, {"role": "assistant", "content": "<think>\nbecause\n</think>\n\ny"}, user)
    assert render(user, add_generation_prompt=True, enable_thinking=True).endswith("assistant\n<think>\n")
    assert render(user, add_generation_prompt=True).endswith("assistant\n")
    with pytest.raises(jinja2.TemplateError, match="not narrator"):
        render({"role": "narrator", "content": "x"})


def test_a_changed_source_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus.py").write_text("a = 1")
    monkeypatch.setattr(train, "HERE", tmp_path)
    before = train._sources()
    (tmp_path / "evaluate.py").write_text("measures only")
    assert train._sources() == before
    (tmp_path / "corpus.py").write_text("a = 2")
    assert train._sources() != before


def test_the_mean_of_two_models(tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Also of weights that stand under two names."""
    one, two = (train.Qwen3ForCausalLM(train.config(len(tokenizer))) for _ in range(2))
    assert one.lm_head.weight is one.model.embed_tokens.weight
    before = {name: weights.clone() for name, weights in one.state_dict().items()}
    train._average(one, two.state_dict())
    for name, weights in one.state_dict().items():
        torch.testing.assert_close(weights, (before[name] + two.state_dict()[name]) / 2)


def test_tuning_draws_what_it_says(tokenizer) -> None:  # type: ignore[no-untyped-def]
    drawn = train.examples(tokenizer, 0, 5, tuning=True)
    assert len(drawn) == sum(count for _, count in train.TUNED)
    assert drawn != train.examples(tokenizer, 0, 5)
    assert drawn == train.examples(tokenizer, 0, 5, tuning=True)


def test_cuts_cover_every_example_once_and_keep_the_limit() -> None:
    lengths = sorted([5, 9, 30, 31, 400, 900, 1500, 2000, 2048, 2048])
    cuts = train._cuts(lengths)
    assert [i for begin, stop in cuts for i in range(begin, stop)] == list(range(len(lengths)))
    assert all((stop - begin) * lengths[stop - 1] <= train.TOKENS or stop - begin == 1 for begin, stop in cuts)


def test_orthogonal_matrices_have_like_singular_values() -> None:
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(train._orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
        assert values.min() > 0.3
        assert values.max() < 1.4


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "VOCABULARY_CORPUS", 300)
    monkeypatch.setattr(train, "CONVERSATIONS", 4)
    train.train(tmp_path / "once", 4, 0, "cpu")
    train.train(tmp_path / "twice", 4, 0, "cpu", stop_at=2)
    assert not (tmp_path / "twice").exists()
    train.train(tmp_path / "twice", 4, 0, "cpu")
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_tuning_weighs_decisions_alike(tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Whether a turn is long or short, its first token, which decides what the turn is, counts the same."""
    drawn = train.examples(tokenizer, 0, 100, tuning=True)
    assert len(drawn) == sum(count for _, count in train.TUNED)
    for example in drawn:
        starts = [i for i, w in enumerate(example.weights) if w and not example.weights[i - 1]]
        assert starts
        assert all(example.weights[i] == 1.0 for i in starts)
    again = train.examples(tokenizer, 0, 100, tuning=True)
    assert [e.ids for e in again] == [e.ids for e in drawn]


def test_the_rate_rises_falls_and_tunes() -> None:
    steps = 280
    rates = [train.rate(step, steps) for step in range(steps + steps // train.TUNING)]
    assert max(rates) == 1.0
    assert min(rates) > 0
    assert rates[steps - 1] < 0.02
    assert 0.02 < max(rates[steps:]) <= 0.3
    assert rates[-1] < max(rates[steps:])
