"""Training: what the loss is taken on, and that stopping and going on changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo import tokenizer as tokenizing
from demo import train
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
        assert not example.own[len(ids) - 1]
        assert example.own[len(ids)]
        assert example.own[-2]  # the end of the turn; a line end follows


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
