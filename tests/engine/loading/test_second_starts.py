"""Models that start a second time, with weights of every kind: kept ones, one pass of the self-test, the same bits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import LLM
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.packed_weight import PackedWeight
from engine.config import ModelConfig
from engine.loading import selftest
from engine.loading.kept import bundle, key, weights
from engine.loading.kept.weights import KeptWeights
from engine.loading.loader import load
from tests import tiny_models
from tests.engine.checkpoints.gguf_quantised import folder_of, write_quantised
from tests.engine.checkpoints.test_packed_layers import quantise
from tests.engine.checkpoints.test_streamed_layers import _scatter


@pytest.fixture
def home(kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in which even the smallest models are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setattr(weights.KeptWeights.__init__, "__kwdefaults__", {"folder": None, "most": None, "least": 0})
    monkeypatch.setattr(Kernels, "load", classmethod(lambda cls, *args, **given: kernels))
    return tmp_path / "cache" / "verbatim" / "packed"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of weights that were packed because none was kept."""
    names, real = list[str](), KeptWeights.keep

    def keep(self: KeptWeights, name: str, make: Callable[[], PackedWeight]) -> PackedWeight:
        def noted() -> PackedWeight:
            names.append(name)
            return make()

        return real(self, name, noted)

    monkeypatch.setattr(KeptWeights, "keep", keep)
    return names


def _files(home: Path) -> list[Path]:
    for thread in threading.enumerate():
        if thread.name == "keep weights":
            thread.join()
    return sorted(home.glob("*.weights"))


def _answer(path: Path, quantization: str | None) -> tuple[str, list[tuple[int, str]]]:
    """The fingerprint, and every token of a reply with its bits."""
    llm = LLM(path, quantization=quantization, context_length=128, cache_size="8MiB")
    reply = llm.generate("word after word", max_tokens=8, seed=3, logprobs=True)[0]
    return llm.info.system_fingerprint, [(entry.token_id, entry.logprob.hex()) for entry in reply.logprobs or ()]


def _twice(folder: Path) -> Path:
    """A checkpoint that holds its tied weight twice."""
    tiny_models.write(folder, "qwen3")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _family(name: str) -> Callable[[Path], Path]:
    return lambda folder: tiny_models.write(folder, name)


def _gguf(*kinds: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder_of(folder, "llama")
        choose = lambda name: kinds[sum(map(ord, name)) % len(kinds)]  # noqa: E731
        return write_quantised(folder, folder.with_suffix(".gguf"), choose)

    return write


def _quantised(form: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        quantise(folder, form.replace("act order", "gptq"))
        if form == "act order":
            _scatter(folder)
        return folder

    return write


CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], str | None]] = {
    "floats": (_family("qwen3"), None),
    "floats, untied": (_family("llama"), None),
    "floats, transposed": (_family("gpt2"), None),
    "floats and experts": (_family("gpt_oss"), None),
    "a tied weight stored twice": (_twice, None),
    "int8": (_family("qwen3"), "int8"),
    "int8, a tied weight stored twice": (_twice, "int8"),
    "int4": (_family("qwen3"), "int4"),
    "int4, untied": (_family("phi3"), "int4"),
    "GGUF, Q4_1": (_gguf("Q4_1"), None),
    "GGUF, several kinds": (_gguf("Q4_K", "Q6_K", "Q8_0"), None),
    "GGUF, widened": (_gguf("Q4_1"), "none"),
    "GPTQ": (_quantised("gptq"), None),
    "GPTQ in act order": (_quantised("act order"), None),
    "GPTQ in act order, rounded anew": (_quantised("act order"), "int8"),
    "AWQ": (_quantised("awq"), None),
    "compressed-tensors": (_quantised("compressed-tensors"), None),
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_second_start_packs_nothing_and_answers_with_the_same_bits(
    checkpoint: str,
    home: Path,
    tmp_path: Path,
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever its weights are. The third start keeps nothing, and answers so, too."""
    write, quantization = CHECKPOINTS[checkpoint]
    path = write(tmp_path / "model")
    first = _answer(path, quantization)
    [file] = _files(home)
    number = file.stat().st_ino
    assert len(made) >= 4
    made.clear()
    with caplog.at_level(logging.INFO):
        assert _answer(path, quantization) == first
    assert made == []
    assert "packed weights of an earlier start" in caplog.text
    assert [path.stat().st_ino for path in _files(home)] == [number], "nothing is written anew"
    monkeypatch.setenv(weights.LIMIT_NAME, "off")
    assert _answer(path, quantization) == first


@pytest.mark.parametrize("rounds", [None, "int4"])
def test_a_tied_weight_is_kept_once(home: Path, tmp_path: Path, rounds: str | None) -> None:
    path = _twice(tmp_path / "model")
    for _ in range(2):
        model: Any = load(ModelConfig(id="m", path=path, quantization=rounds, cache_size=1 << 20)).runner
        _files(home)
        plain = model._model.model
        head, table = plain.get_output_embeddings(), plain.get_input_embeddings()
        assert head.packed.data.data_ptr() == table.packed.data.data_ptr()


def test_a_damaged_weight_of_a_model_is_packed_again(
    tiny: Callable[[str], Path], home: Path, made: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Only that one and those after it; the next start packs nothing again."""
    first = _answer(tiny("llama"), None)
    [file] = _files(home)
    opened = bundle.Bundle.open(file, file.stem)
    place = opened._index["model.layers.1.mlp.down_proj.weight"]["data"]["offset"]
    content, layers = bytearray(file.read_bytes()), len(made)
    content[place + 9] ^= 2
    file.unlink()  # it is mapped: to shorten it would end this process
    file.write_bytes(content)
    file.chmod(0o600)
    made.clear()
    assert _answer(tiny("llama"), None) == first
    assert "model.layers.1.mlp.down_proj.weight" in made
    assert len(made) < layers
    assert "the checksum of a weight is another" in caplog.text
    _files(home)
    made.clear()
    assert _answer(tiny("llama"), None) == first
    assert made == []


def test_changed_weights_quantisations_and_kernels_are_other_files(
    tiny: Callable[[str], Path], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a whole start: the key names what it has to."""
    changed = tiny_models.write(tmp_path / "changed", "qwen3", scale=0.2)
    for path, quantization in ((tiny("qwen3"), None), (tiny("qwen3"), "int8"), (changed, None)):
        load(ModelConfig(id="m", path=path, quantization=quantization, cache_size=1 << 20))
    assert len(_files(home)) == 3
    monkeypatch.setattr(key, "_digest_of_code", lambda: "other")
    load(ModelConfig(id="m", path=changed, cache_size=1 << 20))
    assert len(_files(home)) == 4


def test_nothing_is_kept_where_it_is_switched_off(
    tiny: Callable[[str], Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(weights.LIMIT_NAME, "off")
    load(ModelConfig(id="m", path=tiny("qwen3"), cache_size=1 << 20))
    assert _files(home) == []


# -- the self-test of a later start ------------------------------------------------------------------------------------


def _passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every pass of plain transformers, to compare with."""
    noted, real = list[str](), selftest.Reference.of

    def of(*given: Any, **named: Any) -> selftest.Reference:
        noted.append("")
        return real(*given, **named)

    monkeypatch.setattr(selftest.Reference, "of", staticmethod(of))
    return noted


def _spoil(home: Path, field: str, change: Callable[[Any], Any]) -> None:
    """Change what is kept of a self-test, with checksums that fit."""
    [file] = _files(home)
    opened = bundle.Bundle.open(file, file.stem)
    records = {name: opened.take(name) for name in opened.names}
    [test] = [record for name, record in records.items() if "self-test" in name]
    test[field] = change(test[field])
    bundle.write(file, file.stem, records)


def test_a_later_start_makes_one_pass_and_reports_the_same(
    tiny: Callable[[str], Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(id="m", path=tiny("qwen3"), cache_size=1 << 20)
    noted = _passes(monkeypatch)
    first = load(config).info
    assert (len(noted), len(_files(home))) == (1, 1)
    second = load(config).info
    assert len(noted) == 1
    assert second == first
    assert second.law.holds


@pytest.mark.parametrize(
    ("field", "change"),
    [("text 0", lambda logits: logits + 1e-6), ("computed", str.upper), ("row_safe", lambda safe: not safe)],
)
def test_a_start_that_computes_otherwise_makes_all_trials(
    tiny: Callable[[str], Path],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    field: str,
    change: Callable[[Any], Any],
) -> None:
    """As after a fault of memory, or a change that no key names: it is told, and what was kept is made again."""
    config = ModelConfig(id="m", path=tiny("qwen3"), cache_size=1 << 20)
    noted = _passes(monkeypatch)
    first = load(config).info
    _spoil(home, field, change)
    assert load(config).info == first
    assert len(noted) == 2
    assert "does not give the bits of the start that kept it" in caplog.text
    _files(home)
    load(config)
    assert len(noted) == 2


def test_other_threads_and_lengths_are_tried_anew(
    tiny: Callable[[str], Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted, threads = _passes(monkeypatch), torch.get_num_threads()
    config = ModelConfig(id="m", path=tiny("qwen3"), cache_size=1 << 20)
    try:
        for number, changed in enumerate(({}, {"threads": 3}, {"context_length": 300}), start=1):
            load(config.model_copy(update=changed))
            _files(home)
            assert len(noted) == number
    finally:
        torch.set_num_threads(threads)
