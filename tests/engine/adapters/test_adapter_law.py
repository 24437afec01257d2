"""The engine's law with adapters: the bits of a reply depend on the model and its own adapter, and on no other's.

The circumstances are those of `tests/engine/test_invariants.py`, with rows of the model and of two adapters in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapters_for_tests as adapters
import pytest
import test_invariants as law
import torch
from few_rows import few_rows_keep_their_bits

from engine import LLM, LoadError, check_receipt
from engine.compute.attention import current_plan
from engine.compute.cpu.kernels import Kernels, NoKernels

FAMILIES = ["llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_oss"]
SOME = [FAMILIES[0], *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])]
CIRCUMSTANCES = [name for name in law.CIRCUMSTANCES if name != "a new process"]
Folders = Callable[[str], dict[str, Path]]


@pytest.fixture(scope="module")
def folders(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """`folders(family)`: two adapters of a family, of other layers and ranks, by name."""
    known: dict[str, dict[str, Path]] = {}

    def get(family: str) -> dict[str, Path]:
        if family not in known:
            place, base = tmp_path_factory.mktemp("adapters"), tiny(family)
            targets = adapters.TARGETS.get(family, adapters.ALL)
            known[family] = {
                "one": adapters.write(place / "one", base, targets=targets),
                "two": adapters.write(place / "two", base, targets=targets[:1], rank=3, seed=2, dtype=torch.bfloat16),
            }
        return known[family]

    return get


def opened(base: Path, found: dict[str, Path], **config: Any) -> LLM:
    entries = [{"name": name, "path": path} for name, path in found.items()]
    return LLM(base, **{"context_length": 1024, "cache_size": "64MiB", "adapters": entries, **config})


@pytest.fixture(scope="module")
def baseline(tiny: Callable[[str], Path], folders: Folders) -> Callable[[str, str, str], law.Bits]:
    """The reply of a model in whose entry stands nothing but the adapter that is asked for, if any."""
    known: dict[tuple[str, str, str], law.Bits] = {}

    def get(family: str, prompt: str, adapter: str) -> law.Bits:
        key = family, prompt, adapter
        if key not in known:
            only = {adapter: folders(family)[adapter]} if adapter else {}
            known[key] = law.run(opened(tiny(family), only), law.PROMPTS[prompt], adapter=adapter)
        return known[key]

    return get


@pytest.fixture(scope="module")
def kept(folders: Folders) -> law.Kept:
    """Models beside both of their adapters; a checkpoint's folder has the name of its family."""
    return law.Kept(lambda folder, **config: opened(folder, folders(folder.name), **config))


def _cases() -> Iterator[Any]:
    """One family, adapter and prompt in every circumstance; a few more where there is time; all of them in a sweep."""
    for family in FAMILIES:
        for adapter in ("one", "two", ""):
            for prompt in law.PROMPTS:
                unusual = (family != "llama") + (adapter != "one") + (prompt != "short")
                marks = {0: (), 1: (pytest.mark.slow,)}.get(unusual, (pytest.mark.sweep,))
                yield pytest.param(family, adapter, prompt, marks=marks)


@pytest.mark.parametrize(("family", "adapter", "prompt"), list(_cases()))
@pytest.mark.parametrize(
    "circumstance", [pytest.param(c, marks=pytest.mark.slow) if c == "2 threads" else c for c in CIRCUMSTANCES]
)
def test_the_circumstance_does_not_matter(
    circumstance: str,
    family: str,
    adapter: str,
    prompt: str,
    tiny: Callable[[str], Path],
    folders: Folders,
    baseline: Callable[[str, str, str], law.Bits],
    kept: law.Kept,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = baseline(family, prompt, adapter)
    plain = law.crowd()
    names = ["", "one", "two"]
    mixed = [(text, {**params, "adapter": names[i % 3]}) for i, (text, params) in enumerate(plain)]
    monkeypatch.setattr(law, "open_model", kept)
    monkeypatch.setattr(law, "crowd", lambda: mixed)
    monkeypatch.setitem(law.PARAMS, "adapter", adapter)
    assert law.CIRCUMSTANCES[circumstance](tiny(family), law.PROMPTS[prompt]) == right


@pytest.mark.slow
@pytest.mark.skipif(few_rows_keep_their_bits(), reason="torch's products keep a row's bits on this processor")
def test_beside_experts_that_break_the_law_no_adapter_is_served(
    tiny: Callable[[str], Path], folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without compiled kernels torch multiplies the experts."""

    def none(*_: Any, **__: Any) -> Kernels:
        raise NoKernels("no compiler")

    monkeypatch.setattr(Kernels, "load", none)
    assert not law.open_model(tiny("gpt_oss")).info.law.holds
    with pytest.raises(LoadError, match="no adapter is reproducible"):
        opened(tiny("gpt_oss"), folders("gpt_oss"))


@pytest.mark.parametrize("family", SOME)
def test_what_must_matter_does(family: str, tiny: Callable[[str], Path], folders: Folders) -> None:
    llm = opened(tiny(family), folders(family))
    replies = {law.run(llm, law.SHORT, adapter=adapter) for adapter in ("", "one", "two")}
    assert len(replies) == 3
    infos = [llm.info, *llm.info.adapters.values()]
    assert len({info.system_fingerprint for info in infos}) == 3
    assert all(info.law.holds for info in infos)
    assert llm.info.system_fingerprint == law.open_model(tiny(family)).info.system_fingerprint


@pytest.mark.parametrize("family", SOME)
def test_merged_is_beside_up_to_rounding(family: str, tiny: Callable[[str], Path], folders: Folders) -> None:
    params: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "logprobs": True}
    path = folders(family)["one"]
    [beside] = opened(tiny(family), folders(family)).generate(law.SHORT, adapter="one", **params)
    merged = law.open_model(tiny(family), adapters={"one": {"path": path, "merge": True}})
    [whole] = merged.generate(law.SHORT, **params)
    assert merged.info.merged_adapter == "one"
    assert not merged.info.adapters
    assert merged.info.law.holds
    assert beside.token_ids == whole.token_ids
    numbers = [torch.tensor([entry.logprob for entry in reply.logprobs or ()]) for reply in (beside, whole)]
    assert torch.allclose(*numbers, atol=1e-4)


def test_no_adapter_finds_anothers_prompt_in_the_cache(tiny: Callable[[str], Path], folders: Folders) -> None:
    """Keys and values are the adapter's: what another has cached is another text's."""
    llm = opened(tiny("llama"), folders("llama"))
    for adapter in ("", "one", "two"):
        [first] = llm.generate(law.LONG, max_tokens=1, adapter=adapter)
        assert first.usage.cached_tokens == 0
        [again] = llm.generate(law.LONG, max_tokens=1, adapter=adapter)
        assert again.usage.cached_tokens == again.usage.prompt_tokens - 1


@pytest.mark.parametrize("adapter", ["one", ""])
def test_a_receipt_is_that_of_its_adapter(adapter: str, tiny: Callable[[str], Path], folders: Folders) -> None:
    llm = opened(tiny("llama"), folders("llama"))
    [reply] = llm.generate(law.SHORT, receipt=True, adapter=adapter, **law.PARAMS)
    assert reply.receipt is not None
    assert check_receipt(llm, reply.receipt).verdict == "identical"
    assert check_receipt(llm, reply.receipt, mode="replay").verdict == "identical"
    report = check_receipt(llm, reply.receipt, adapter="two")
    assert report.verdict == "not_checkable"
    assert "the model's files are not those of the receipt" in report.sentence


def test_a_decoder_layer_in_one_call_is_taken_whenever_no_row_is_adapted(
    tiny: Callable[[str], Path], folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no request asks for costs nothing: steps without adapters' rows run as if there were none."""
    from engine.compute.cpu.layers.decoder_layer import NativeLayer
    from engine.compute.cpu.layers.layer_kernel import LayerStack

    llm = opened(tiny("llama"), folders("llama"))
    layers = [m for m in llm.engine.model.runner._model.model.modules() if isinstance(m, NativeLayer)]  # type: ignore[attr-defined]
    if not layers:
        pytest.skip("no compiled kernels here")
    calls: list[bool] = []
    kernel = LayerStack.__call__

    def counted(self: Any, *arguments: Any) -> Any:
        plan = current_plan()
        calls.append(bool(plan and plan.adapter_rows))
        return kernel(self, *arguments)

    monkeypatch.setattr(LayerStack, "__call__", counted)
    llm.generate(law.SHORT, max_tokens=2)
    assert calls
    before = len(calls)
    llm.generate(law.SHORT, max_tokens=2, adapter="one")
    assert len(calls) == before


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a model that is not packed": ("bloom", {"targets": ("query_key_value",)}, "no adapter is reproducible"),
    "numbers of 16 bits": ("llama", {"config": {"dtype": "bfloat16"}}, "on a CPU in float32, not on cpu in bfloat16"),
    "the layer that makes the logits": ("llama", {"targets": ("lm_head",)}, "give the adapter merge: true"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_beside_a_model_that_cannot_keep_the_law_it_is_refused_and_merged_it_is_served(
    case: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    family, how, said = REFUSED[case]
    targets, config = how.get("targets", ("q_proj",)), how.get("config", {})
    path = adapters.write(tmp_path / "a", tiny(family), targets=targets)
    with pytest.raises(LoadError, match="merge: true") as caught:
        opened(tiny(family), {"a": path}, **config)
    assert said in caught.value.message
    merged = law.open_model(tiny(family), adapters=[{"name": "a", "path": path, "merge": True}], **config)
    assert merged.generate(law.SHORT, max_tokens=2)[0].token_ids
    assert "adapter" in merged.info.fingerprint_parts


def test_beside_rounded_weights_an_adapter_keeps_the_law(tiny: Callable[[str], Path], folders: Folders) -> None:
    llm = opened(tiny("llama"), folders("llama"), quantization="int8")
    alone = law.run(llm, law.SHORT, adapter="one")
    for i, (text, params) in enumerate(law.crowd()[:6]):
        llm.add(text, **params, adapter=["", "one", "two"][i % 3])
    assert law.run(llm, law.SHORT, adapter="one") == alone


def test_what_is_computed_wrongly_is_found_at_load(
    tiny: Callable[[str], Path], folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test of each adapter can fail: numbers that are off, and rows that get their neighbours' adapter."""
    from engine.adapters import layers

    forward = layers._Product.forward
    monkeypatch.setattr(layers._Product, "forward", lambda self, rows: forward(self, rows) * 1.5)
    with pytest.raises(LoadError, match=r"adapters\.one: beside the model it differs from plain transformers"):
        opened(tiny("llama"), folders("llama"))

    monkeypatch.setattr(layers._Product, "forward", lambda self, rows: forward(self, rows) + 1e-6 * rows.shape[0])
    with pytest.raises(LoadError, match=r"adapters\.one: beside the model bits differ: packed"):
        opened(tiny("llama"), folders("llama"))
