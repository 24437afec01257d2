"""Right or refused: what the self-test does with models that are computed wrongly, each in its own way.

The models are small Llamas with one thing changed, as architectures and releases of transformers have changed it.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from engine.checkpoints.checkpoint import prepare_environment
from engine.compute.attention import IMPLEMENTATION, make_mask, register_attention
from engine.compute.attention_mask import KeyRange
from engine.compute.backend import AttentionSettings, PackedChunk
from engine.compute.kv_cache import LayerShape
from engine.compute.linear import StrictLinear, pack_model
from engine.compute.model_runner import PackedRunner
from engine.compute.torch_attention import padded_length
from engine.compute.torch_backend import TorchBackend
from engine.errors import LoadError
from engine.loading import selftest
from engine.loading.selftest import ON_CPU, ON_GPU, Extent, Reference, SelfTest, self_test, verdict
from engine.loading.trials.attention_trial import AttentionTrial
from engine.scheduling.schedule import Chunk, Schedule
from engine.scheduling.sequence import Sequence
from engine.types.sampling_params import SamplingParams

VOCAB, LENGTH = 448, 2048
TORCH = TorchBackend(torch.device("cpu"))


def _llama(family: str = "llama", **config: Any) -> nn.Module:
    prepare_environment(pull=False)
    given = {**tiny_models.COMMON, **tiny_models.FAMILIES.get(family, {}), **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1, generator=generator)
    pack_model(model, make=StrictLinear)  # torch's own layers keep the law on some processors only
    return model  # type: ignore[no-any-return]


def _try(model: nn.Module, *, reference: Reference | None = None, length: int = LENGTH) -> SelfTest:
    reference = reference or Reference.of(model, VOCAB, length)
    return self_test(model, TORCH, reference, VOCAB, torch.float32, length)


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = types.MethodType(forward, module)


# -- what changes in an architecture, and what must become of it ------------------------------------------------------


def _unknown_keyword(model: nn.Module) -> None:
    """An attention that takes something else, too (a sparse one: which keys)."""
    _wrap_attention(model, lambda interface: lambda *a, **k: interface(*a, **k, indices=torch.tensor([0])))


def _own_mask(model: nn.Module) -> None:
    """A mask that the model changes itself, by a bias for what is far."""

    def another(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask + 0.25 * torch.arange(mask.shape[-1])

    _wrap_attention(model, lambda interface: lambda m, q, k, v, mask, **kw: interface(m, q, k, v, another(mask), **kw))


def _window_without_a_mask(model: nn.Module) -> None:
    """A window in a keyword that the mask knows nothing of."""
    _wrap_attention(model, lambda interface: lambda *a, **k: interface(*a, **k, sliding_window=8))


def _twice(model: nn.Module) -> None:
    """Two attentions in one layer would share one place in the cache."""
    _wrap_attention(model, lambda interface: lambda *a, **k: (interface(*a, **k), interface(*a, **k))[1])


def _wrap_attention(model: nn.Module, wrap: Callable[[Any], Any]) -> None:
    """Let the first layer's attention call a changed attention interface."""
    attention = model.model.layers[0].self_attn  # type: ignore[union-attr,index]
    own = attention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        interfaces = modeling_llama.ALL_ATTENTION_FUNCTIONS
        found = interfaces.get_interface
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(interfaces), "get_interface", lambda s, *a: wrap(found(*a)))
            return own(*args, **kwargs)

    _replace_forward(attention, forward)


def _looks_at_the_longest(model: nn.Module) -> None:
    """Angles that depend on the longest sequence of a step."""
    rotary = model.model.rotary_emb  # type: ignore[union-attr]
    own = rotary.forward

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> Any:
        cos, sin = own(x, position_ids)
        return (cos * 1.5, sin * 1.5) if int(position_ids.max()) > 500 else (cos, sin)

    _replace_forward(rotary, forward)


def _looks_at_the_row_before(model: nn.Module) -> None:
    """A convolution over neighbouring tokens without a cache: right for a prompt, wrong for all that follow."""
    mlp = model.model.layers[1].mlp  # type: ignore[union-attr,index]
    own = mlp.forward
    _replace_forward(mlp, lambda self, x: own(x + F.pad(x, (0, 0, 1, 0))[:, :-1]))


TO_FALLBACK: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "unknown keyword": (_unknown_keyword, "its attention takes indices"),
    "own mask": (_own_mask, "mask is neither"),
    "a window without a mask": (_window_without_a_mask, "a window of 8, its mask shows all keys before"),
    "attends twice": (_twice, "layer 0 attends more than once"),
    "neighbours": (_looks_at_the_longest, "packed pass of several sequences differs"),
}


@pytest.mark.parametrize("name", TO_FALLBACK)
def test_what_cannot_be_packed_rightly_runs_alone(name: str) -> None:
    change, reason = TO_FALLBACK[name]
    model = _llama()
    change(model)
    test = _try(model)
    assert test.layers is None
    assert not test.report.holds
    assert reason in test.report.reason


def test_a_kind_of_layer_that_is_not_known_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.compute.discovery._KNOWN_LAYERS", frozenset({"sliding_attention"}))
    test = _try(_llama(layer_types=["full_attention"] * 2))
    assert test.layers is None
    assert "layers of type full_attention" in test.report.reason


def test_a_plain_model_is_packed_and_lawful() -> None:
    test = _try(_llama())
    assert test.layers is not None
    assert test.report.holds, test.report.reason


def _drops_its_cache(model: nn.Module) -> None:
    """What a renamed keyword did: it vanishes in `**kwargs`, and every token is computed without its past."""
    own = model.forward

    def forward(self: Any, input_ids: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        return own(input_ids, **kwargs)

    _replace_forward(model, forward)


def _raises_for_long_texts(model: nn.Module) -> None:
    """A model that takes fewer tokens than its configuration says."""
    own = model.forward

    def forward(self: Any, input_ids: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        if input_ids.shape[1] > 100 and kwargs.get("use_cache"):
            raise RuntimeError("the table of positions ends at 100")
        return own(input_ids, **kwargs)

    _replace_forward(model, forward)


def _takes_no_cache(model: nn.Module) -> None:
    own = model.forward
    _replace_forward(model, lambda self, input_ids=None, **kw: own(input_ids, **kw))


def _leaks(model: nn.Module) -> None:
    """One sequence's state reaches the next."""
    own, kept = model.forward, []

    name = "cache" if "cache" in inspect.signature(own).parameters else "past_key_values"

    def forward(self: Any, input_ids: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        output = own(input_ids, **{name: cache}, **kwargs)
        kept.append(output.logits.mean())
        output.logits = output.logits + (5.0 if len(kept) > 7 else 0.0) * torch.arange(VOCAB) / VOCAB
        return output

    _replace_forward(model, forward)


def _is_nan(model: nn.Module) -> None:
    model.lm_head.weight[3] = float("nan")  # type: ignore[union-attr,index,operator]


REFUSED: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "a cache that vanishes": (_drops_its_cache, r"differs from plain transformers by \S+ in \d+ of 15 places"),
    "no cache": (_takes_no_cache, "takes no cache"),
    "state that leaks": (_leaks, "differs from plain transformers"),
    "no recurrent state": (_looks_at_the_row_before, "differs from plain transformers"),
    "an error": (_raises_for_long_texts, "fails: the model failed on this request: the table of positions ends"),
    "not a number": (_is_nan, "differs from plain transformers by (nan|inf)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_runner_computes_rightly_is_refused_with_the_numbers(name: str) -> None:
    change, reason = REFUSED[name]
    model = _llama()
    change(model)
    _unknown_keyword(model)  # so that the fallback runner is asked
    with pytest.raises(LoadError, match=reason) as caught:
        _try(model)
    assert "cannot be served: not packed" in str(caught.value)


def test_a_part_that_was_replaced_wrongly_is_seen() -> None:
    """The reference is plain transformers, from before the model was prepared for serving."""
    model = _llama()
    reference = Reference.of(model, VOCAB, LENGTH)
    model.model.norm.weight.mul_(1.1)  # type: ignore[union-attr,operator]
    with pytest.raises(LoadError, match="differs from plain transformers"):
        _try(model, reference=reference)


class _Tail(nn.Module):
    """An activation whose last rows are computed in another way, as torch's sigmoid is."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.silu(x)
        rest = x.shape[-2] % 16
        out[..., -rest:, :] *= 1 + 2e-7 * bool(rest)
        return out


def test_bits_that_depend_on_the_number_of_rows_are_not_promised() -> None:
    """In one of two layers, 2e-7 off, for less than sixteen rows of hundreds."""
    model = _llama()
    model.model.layers[0].mlp.act_fn = _Tail()  # type: ignore[union-attr,index]
    test = _try(model)
    assert test.layers is not None
    assert not test.report.holds
    assert "bits differ" in test.report.reason


def _masked(reference: Reference, value: float) -> Reference:
    """The same logits, with a third of them masked out, as models do with tokens that are not to be said."""
    rows = [logits.clone() for logits in reference.logits]
    for logits in rows:
        logits[:, 100:250] = value
    return Reference(reference.texts, tuple(rows))


@pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min])
def test_logits_that_are_masked_out_hide_nothing(value: float) -> None:
    reference = _masked(Reference.of(_llama(), VOCAB, LENGTH), value)
    runs = [types.SimpleNamespace(logits=rows.clone()) for rows in reference.logits]
    assert reference.difference(runs, 1e-3) is None  # type: ignore[arg-type]
    runs[1].logits[:, :100] *= -3
    assert reference.difference(runs, 1e-3) is not None  # type: ignore[arg-type]
    runs[1].logits[:, :100] = reference.logits[1][:, :100]
    runs[2].logits[:, 100] = 0.0
    assert reference.difference(runs, 1e-3) is not None, "one says what the other masks out"  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["engine.loading.selftest.discover", "engine.loading.selftest._alone"])
def test_running_out_of_memory_is_no_reason_for_another_runner(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which runner a model has must not depend on what else used the memory that minute."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = _llama()
    if where.endswith("_alone"):
        _unknown_keyword(model)
    monkeypatch.setattr(where, fail)
    with pytest.raises(torch.OutOfMemoryError):
        _try(model)


def test_positions_that_a_layer_counts_by_its_cache_are_seen_however_far_they_matter() -> None:
    """Llama 4 scales queries beyond 8,191 tokens, by the number of tokens that its cache has seen."""
    text = {"num_local_experts": 2, "head_dim": 16, "layer_types": ["chunked_attention", "full_attention"]}
    shape = {**text, "intermediate_size_mlp": 96, "attention_chunk_size": 32, "no_rope_layers": [1, 0]}
    near = _try(_llama("llama4_text", **shape, max_position_embeddings=4096), length=4096)
    assert near.layers is not None, near.report.reason
    assert near.layers[0].seen == KeyRange(chunk=32)
    far = _try(_llama("llama4_text", **shape, max_position_embeddings=16384), length=16384)
    assert far.layers is None
    assert "counts positions by its cache" in far.report.reason


def test_a_tie_of_experts_is_no_reason_to_refuse() -> None:
    reference = Reference.of(_llama(), VOCAB, LENGTH)
    runs = [types.SimpleNamespace(logits=rows.clone()) for rows in reference.logits]
    scale = max(float(rows.abs().max()) for rows in reference.logits)
    runs[2].logits[1, 7] += 0.05 * scale
    assert reference.difference(runs, 1e-3) is None  # type: ignore[arg-type]
    runs[2].logits[2, 7] += 0.05 * scale
    assert "in 2 of 15 places" in str(reference.difference(runs, 1e-3))  # type: ignore[arg-type]
    runs[2].logits[2] = reference.logits[2][2]
    runs[2].logits[1, 7] += scale
    assert reference.difference(runs, 1e-3) is not None, "too much for a tie"  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [4, 20, 64, 2048])
def test_any_context_length_can_be_tried(length: int) -> None:
    test = _try(_llama(max_position_embeddings=length), length=length)
    assert test.report.holds, test.report.reason


# -- attention alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "seen", [KeyRange(), KeyRange(window=24), KeyRange(window=700), KeyRange(chunk=48), KeyRange(chunk=600)]
)
@pytest.mark.parametrize("settings", [AttentionSettings(4, 0.3), AttentionSettings(4, 0.3, 3.0, torch.arange(4.0))])
def test_attention_in_torch_is_right_at_every_border(
    dtype: torch.dtype, seen: KeyRange, settings: AttentionSettings
) -> None:
    """Sums in float32 whatever the dtype: in float16 they overflow or lose what is far."""
    trial = AttentionTrial(LayerShape(2, 16, 16, dtype, torch.device("cpu"), seen), settings, TORCH)
    assert trial.is_right()


def test_a_window_that_is_off_by_one_is_seen() -> None:
    trial = AttentionTrial(
        LayerShape(2, 16, 16, torch.float32, torch.device("cpu"), KeyRange(window=700)),
        AttentionSettings(4, 0.3),
        TORCH,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.compute.torch_attention._additive_mask", _off_by_one)
        assert not trial.is_right()
    assert trial.is_right()


def _off_by_one(chunk: Any, seen: KeyRange, rows: int, repeat: int, like: Tensor) -> Tensor:
    queries = torch.arange(chunk.start, chunk.start + chunk.count)[:, None]
    keys = torch.arange(padded_length(chunk))[None]
    window = (seen.window or 1_000_000) + 1
    mask = torch.where((keys > queries) | (keys <= queries - window), float("-inf"), 0.0).repeat(repeat, 1)
    return torch.cat([mask, mask[-1:].expand(rows - mask.shape[0], -1)])


def test_large_float16_keys_are_finite() -> None:
    """Their sum is not, in float16: 300 heads and dimensions of 300 each."""
    shape = LayerShape(8, 64, 64, torch.float16, torch.device("cpu"))
    plan = TORCH.plan(TORCH.allocate([shape], 1), [PackedChunk(0, 2, 0, (0,))])
    big = torch.full((8, 2, 64), 300.0, dtype=torch.float16)
    plan.attend(0, big * 0.001, big * 0.001, big, AttentionSettings(8, 0.1))
    assert plan.finite().all()


@pytest.mark.parametrize(
    ("checks", "device", "holds", "says"),
    [
        ({"packed": True, "threads": True}, "cpu", True, "the same bits"),
        ({"packed": True, "threads": False}, "cpu", False, "bits differ: threads (M, bfloat16, cpu)"),
        ({"packed": False, "threads": True}, "cuda:1", False, "bits differ: packed (M, bfloat16, cuda:1)"),
        ({"packed": True, "threads": True}, "cuda:0", False, "depend on the number of rows (M, bfloat16, cuda:0)"),
    ],
)
def test_what_no_trial_disproves_is_promised_only_where_it_is_known_why(
    checks: dict[str, bool], device: str, holds: bool, says: str
) -> None:
    """On a GPU small models pass every trial, and real ones with the same kernels' names do not."""
    backend = TorchBackend(torch.device(device))
    found, reason = verdict(checks, backend.breaks_law, f"(M, bfloat16, {device})")
    assert found is holds
    assert says in reason


# -- what a GPU needs -------------------------------------------------------------------------------------------------


class _ManyRows(nn.Module):
    """An activation that takes another kernel for hundreds of rows, as a library on a GPU does."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.silu(x)
        return out * (1 + 2e-7) if x.shape[-2] > 300 else out


def test_a_gpus_self_test_makes_larger_steps_and_asks_nothing_of_threads() -> None:
    """Its tiles and splits are larger than the prompts that show everything on a CPU."""
    found = {}
    for extent in (ON_CPU, ON_GPU):
        model = _llama()
        model.model.layers[0].mlp.act_fn = _ManyRows()  # type: ignore[union-attr,index]
        report = _try(model, reference=Reference.of(model, VOCAB, LENGTH, extent)).report
        found[extent] = dict(report.checks)
    assert all(found[ON_CPU].values()), "a processor's self-test makes no such steps"
    assert found[ON_GPU] == {"packed": False, "chunked": False, "key spans": True}


def test_a_plain_model_passes_what_a_gpu_needs() -> None:
    model = _llama()
    reference = Reference.of(model, VOCAB, LENGTH, ON_GPU)
    assert [len(text.prompt) for text in reference.texts] == [150, 9, 5, 3, 700]
    test = _try(model, reference=reference)
    assert (test.report.holds, test.report.reason) == (True, "the same bits alone, packed and chunked")


def test_what_is_tried_depends_on_the_kind_of_device() -> None:
    assert Extent.on(torch.device("cuda:1")) == ON_GPU
    assert Extent.on(torch.device("cpu")) == ON_CPU


def test_the_border_of_the_original_context_is_crossed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides of it rows stand beside the sequences that are compared."""
    seen: set[tuple[int, ...]] = set()
    own = PackedRunner.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.add(tuple(kwargs["bystanders"]))
        own(self, *args, **kwargs)

    monkeypatch.setattr(PackedRunner, "__init__", watched)
    scaling = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = _llama(rope_parameters={**scaling, "original_max_position_embeddings": 700})
    assert _try(model).report.holds
    assert seen == {(), (2047, 1023, 0, 699, 700)}


def test_products_that_may_be_rounded_to_tf32_promise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selftest._tf32(torch.device("cuda:0")) is None
    monkeypatch.setattr(selftest, "matmul_tf32", lambda: True)
    assert selftest._tf32(torch.device("cpu")) is None
    why = selftest._tf32(torch.device("cuda:0"))
    assert verdict({"packed": True}, why, "(M, float32, cuda:0)") == (
        False,
        "no trial found other bits, but torch is set to round float32 products to TF32 (torch.backends.cuda.matmul) "
        "(M, float32, cuda:0)",
    )


def test_numbers_beyond_float16_are_said_to_be_that() -> None:
    model = _llama().to(torch.float16)
    assert Reference.of(model, VOCAB, LENGTH)
    model.model.layers[0].mlp.down_proj.weight.mul_(6e4)  # type: ignore[union-attr,index,operator]
    with pytest.raises(LoadError, match=r"numbers beyond 65504, the largest of float16: give its entry dtype: float32"):
        Reference.of(model, VOCAB, LENGTH)


# -- masks ------------------------------------------------------------------------------------------------------------


def _pass(model: nn.Module, test: SelfTest, *, skips_masks: bool) -> tuple[Tensor, int]:
    """Run 40 tokens through the packed runner. Returns their logits, and how many masks transformers made."""
    made = []

    def make(**kwargs: Any) -> Any:
        made.append(kwargs)
        return make_mask(**kwargs)

    assert test.layers is not None
    cache = TORCH.allocate(test.layers, 3)
    runner = PackedRunner(model, TORCH, cache, VOCAB, row_safe=test.row_safe, skips_masks=skips_masks)
    sequence = Sequence("", 0, tuple(range(3, 43)), SamplingParams(), 0, block_table=[2, 0, 1])
    AttentionMaskInterface.register(IMPLEMENTATION, make)
    try:
        return runner.forward(Schedule([Chunk(sequence, 0, 40, True, num_rows=40)])).logits, len(made)
    finally:
        register_attention()


@pytest.mark.parametrize("family", sorted(set(tiny_models.FAMILIES) - {"bloom", "mamba"}))
def test_a_packed_model_makes_no_masks_in_a_step(family: str) -> None:
    """Making one asks a GPU something in every pass. What each layer sees is found before, and bits stay the same."""
    model = _llama(family)
    test = _try(model)
    assert test.layers is not None
    assert test.skips_masks
    window = tiny_models.FAMILIES[family].get("sliding_window")
    assert any(layer.seen == KeyRange(window=window) for layer in test.layers), "discovery sees them as before"
    plain, made = _pass(model, test, skips_masks=False)
    blank, none = _pass(model, test, skips_masks=True)
    assert torch.equal(plain, blank)
    assert made > none == 0


def _counts_its_mask(model: nn.Module) -> None:
    """A model that computes with its mask before the layers do."""
    own = model.forward

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        output = own(input_ids, attention_mask=attention_mask, **kwargs)
        output.logits = output.logits + (0.0 if attention_mask is None else 1.0)
        return output

    _replace_forward(model, forward)


def _takes_flat_masks(model: nn.Module) -> None:
    """A model that takes no other mask than one number a token."""
    own = model.forward

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            attention_mask[:, : input_ids.shape[1]].view(1, -1).cumsum(-1).view(input_ids.shape)
        return own(input_ids, attention_mask=attention_mask, **kwargs)

    _replace_forward(model, forward)


def _makes_masks_anyway(model: nn.Module) -> None:
    own = model.forward
    _replace_forward(model, lambda self, input_ids=None, attention_mask=None, **kwargs: own(input_ids, **kwargs))


def _turns_by_its_mask(model: nn.Module) -> None:
    """A mask that reaches a layer's queries."""
    attention = model.model.layers[1].self_attn  # type: ignore[union-attr,index]
    own = attention.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        blank = attention_mask is not None and attention_mask.shape[-1] == 1
        return own(hidden_states * (2.0 if blank else 1.0), *args, attention_mask=attention_mask, **kwargs)

    _replace_forward(attention, forward)


@pytest.mark.parametrize("change", [_counts_its_mask, _takes_flat_masks, _makes_masks_anyway, _turns_by_its_mask])
def test_a_model_that_needs_its_masks_keeps_them(change: Callable[[nn.Module], None]) -> None:
    model = _llama()
    change(model)
    test = _try(model)
    assert test.layers is not None, "it is packed all the same"
    assert not test.skips_masks
    assert test.report.holds, test.report.reason


def test_logits_on_another_device_than_the_samplers_are_refused() -> None:
    """Spread over devices, a model may leave them on its last one."""
    model = _llama()
    reference = Reference.of(model, VOCAB, LENGTH)
    own = model.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits.to("meta")
        return output

    _replace_forward(model, forward)
    with pytest.raises(LoadError, match="its logits arrive on meta, not on cpu"):
        _try(model, reference=reference)
