"""The compiled kernels do what kernels.c says: one chain of operations a number, whatever is computed beside it."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import os
import random
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from engine.compute.cpu.attention_plan import AttentionPlan
from engine.compute.cpu.kernel_calls import ACTIVATIONS
from engine.compute.cpu.kernels import Kernels
from engine.scheduling.block_pool import BLOCK_SIZE


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _product(kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str = "exact") -> Tensor:
    return kernels.group([kernels.pack(weight, bias, kind)])(x)[0]


# -- linear ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (7, 3), (64, 40), (1023, 5), (1025, 17), (2100, 33)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_number_is_the_chain_that_the_file_states(kernels: Kernels, depth: int, columns: int, kind: str) -> None:
    """Fused multiply-adds from 0 over 1,024 numbers, the sums of these added up, then the bias: bit for bit."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    x, weight, bias = _random(2, depth), _random(columns, depth, seed=1), _random(columns)
    if kind == "bfloat16":
        weight = weight.bfloat16().float()
    packed = kernels.pack(weight, bias)
    assert packed.kind == kind
    out = kernels.group([packed])(x)[0]
    for row in range(2):
        for column in range(columns):
            total = None
            for start in range(0, depth, 1024):
                chain = 0.0
                for a, w in zip(
                    x[row, start : start + 1024].tolist(), weight[column, start : start + 1024].tolist(), strict=True
                ):
                    chain = fmaf(a, w, chain)
                total = chain if total is None else float(torch.tensor(total) + torch.tensor(chain))
            assert out[row, column] == torch.tensor(total) + bias[column], (row, column)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX2", reason="oneDNN has another chain elsewhere")
@pytest.mark.parametrize(("depth", "columns"), [(64, 40), (1024, 96), (1025, 33), (3072, 128)])
def test_the_bits_are_those_of_onednn(kernels: Kernels, depth: int, columns: int) -> None:
    """So a machine without a compiler may give the same replies. Also proof that the chain is a natural one."""
    x, weight, bias = _random(37, depth), _random(columns, depth, seed=1), _random(columns)
    theirs = torch.ops.mkldnn._linear_pointwise(
        x, torch.ops.mkldnn._reorder_linear_weight(weight, 16), bias, "none", [], ""
    )
    if torch.__version__ < "2.13":
        pytest.skip("older versions split long rows elsewhere")
    assert torch.equal(_product(kernels, x, weight, bias), theirs)


@settings(max_examples=60, deadline=None)
@given(
    depth=st.integers(1, 300),
    columns=st.integers(1, 90),
    rows=st.integers(1, 20),
    kind=st.sampled_from(["bfloat16", "float32", "int8"]),
    bias=st.booleans(),
    data=st.data(),
)
def test_a_row_depends_on_itself_alone(
    kernels: Kernels, depth: int, columns: int, rows: int, kind: str, bias: bool, data: st.DataObject
) -> None:
    """Not on the rows beside it, on the number of threads, or on what else is multiplied with the same input."""
    weight = _random(columns, depth)
    weight = weight.bfloat16().float() if kind == "bfloat16" else weight
    packed = kernels.pack(weight, _random(columns) if bias else None, "int8" if kind == "int8" else "exact")
    x = _random(rows, depth, seed=3)
    whole = kernels.group([packed])(x)[0]
    right = x @ weight.T + (packed.bias if packed.bias is not None else 0)
    tolerance = 0.05 if kind == "int8" else 1e-5
    assert (whole - right).abs().max() <= tolerance * max(1.0, float(right.abs().max()))
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    other = kernels.pack(_random(columns + 3, depth), None, "int8" if kind == "int8" else "exact")
    group = [other, packed] if other.kind == packed.kind else [packed, packed]
    assert torch.equal(kernels.group(group)(x[start:stop])[1], whole[start:stop])
    threads = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 5)))
    try:
        assert torch.equal(kernels.group([packed])(x)[0], whole)
    finally:
        torch.set_num_threads(threads)


def _rounded(numbers: list[float]) -> tuple[list[int], float]:
    """Bytes and scale of up to 128 numbers, as kernels.c rounds them: in float32, ties to even."""
    largest = max(abs(v) for v in numbers)
    if not largest:
        return [0] * len(numbers), 0.0
    inverse = float(torch.tensor(127.0) / torch.tensor(largest))
    values = [round(Fraction(float(torch.tensor(v) * torch.tensor(inverse)))) for v in numbers]
    return values, float(torch.tensor(largest) / torch.tensor(127.0))


@pytest.mark.parametrize(("depth", "columns"), [(5, 2), (128, 17), (300, 9), (1026, 3)])
def test_int8_is_whole_numbers_and_scales(kernels: Kernels, depth: int, columns: int) -> None:
    """Products of bytes add up exactly; groups of 128 are scaled and added in order."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    x, weight, bias = _random(3, depth), _random(columns, depth, seed=1), _random(columns)
    x[1] *= 1e-20
    expected = torch.empty(3, columns)
    for row in range(3):
        for column in range(columns):
            total = 0.0
            for start in range(0, depth, 128):
                a, scale_a = _rounded(x[row, start : start + 128].tolist())
                b, scale_b = _rounded(weight[column, start : start + 128].tolist())
                exact = sum(p * q for p, q in zip(a, b, strict=True))
                total = fmaf(exact, float(torch.tensor(scale_a) * torch.tensor(scale_b)), total)
            expected[row, column] = torch.tensor(total) + bias[column]
    assert torch.equal(_product(kernels, x, weight, bias, "int8"), expected)


@pytest.mark.parametrize("kind", ["exact", "int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_and_spares_the_other_rows(kernels: Kernels, kind: str, bad: float) -> None:
    """A request whose numbers overflow must fail; the one beside it must not notice."""
    x, weight = _random(4, 200), _random(30, 200)
    clean = _product(kernels, x, weight, None, kind)
    x[2, 150] = bad
    out = _product(kernels, x, weight, None, kind)
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


def test_zeros_and_the_smallest_numbers(kernels: Kernels) -> None:
    weight = _random(9, 130)
    assert torch.equal(_product(kernels, torch.zeros(2, 130), weight, None, "int8"), torch.zeros(2, 9))
    tiny = torch.full((1, 130), 1e-45)
    assert _product(kernels, tiny, weight, None, "int8").isfinite().all()


@pytest.mark.parametrize("column", [0, 20, 39])
def test_a_weight_is_narrowed_only_if_nothing_is_lost(kernels: Kernels, column: int) -> None:
    weight = _random(40, 33).bfloat16().float()
    assert kernels.pack(weight, None).kind == "bfloat16"
    weight[column, 32] += 1e-4
    packed = kernels.pack(weight, None)
    assert packed.kind == "float32"
    identity = kernels.group([packed])(torch.eye(33))[0]
    assert torch.equal(identity.T, weight)


def test_weights_of_one_product_are_of_one_kind(kernels: Kernels) -> None:
    with pytest.raises(ValueError, match="one kind"):
        kernels.group([kernels.pack(_random(4, 8), None), kernels.pack(_random(4, 9), None)])


@pytest.mark.parametrize("x", [torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(2, 16), torch.ones(4, 4)])
def test_what_a_pointer_would_hide_is_an_error(kernels: Kernels, x: Tensor) -> None:
    with pytest.raises(TypeError, match=r"the kernels take float32 \[\.\.\., 8\] on a CPU, not torch\."):
        _product(kernels, x, _random(4, 8), None)
    with pytest.raises(TypeError, match="the kernels take float32"):
        kernels.norm(x, torch.ones(8), 1e-6)


# -- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 8, 16, 128, 1000, 2048])
def test_a_norm_is_one_and_its_rows_are_independent(kernels: Kernels, dim: int) -> None:
    x, weight = _random(70, dim) * 3, _random(dim)
    out = kernels.norm(x, weight, 1e-6)
    right = weight.double() * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(out.double(), right, rtol=1e-6, atol=1e-7)
    for rows in (slice(0, 1), slice(3, 20), slice(69, 70)):
        assert torch.equal(kernels.norm(x[rows], weight, 1e-6), out[rows])
    x[5, 0] = math.nan
    assert kernels.norm(x, weight, 1e-6)[5].isnan().all()


# -- attention -------------------------------------------------------------------------------------------------------


class _Sequences:
    """Keys and values of some sequences in a shuffled cache, and attention in float64 to compare with."""

    def __init__(
        self, kernels: Kernels, lengths: list[int], *, heads: int, kv_heads: int, dims: tuple[int, int]
    ) -> None:
        self.kernels, self.heads = kernels, heads
        self.tables, used = [], 1
        total = sum(-(-n // BLOCK_SIZE) for n in lengths) + 2
        order = torch.randperm(total, generator=torch.Generator().manual_seed(total)).tolist()
        for n in lengths:
            blocks = -(-n // BLOCK_SIZE)
            self.tables.append(order[used : used + blocks])
            used += blocks
        # What nobody wrote is finite and must not matter.
        self.keys = _random(kv_heads, total * BLOCK_SIZE, dims[0], seed=5) * 50
        self.values = _random(kv_heads, total * BLOCK_SIZE, dims[1], seed=6) * 50
        self.query = [_random(heads, n, dims[0], seed=i) * 2 for i, n in enumerate(lengths)]
        self.key = [_random(kv_heads, n, dims[0], seed=10 + i) for i, n in enumerate(lengths)]
        self.value = [_random(kv_heads, n, dims[1], seed=20 + i) for i, n in enumerate(lengths)]

    def step(
        self, chunks: list[tuple[int, int, int]], padding: int = 0, **options: object
    ) -> tuple[list[Tensor], Tensor]:
        """(sequence, start, count) each → its result `[count, heads, dim]`; and which rows were finite."""
        parts, slots, row = [], [], 0
        for index, start, count in chunks:
            parts.append((row, count, start, self.tables[index]))
            slots += [
                self.tables[index][t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE for t in range(start, start + count)
            ]
            row += count
        plan = AttentionPlan(parts, torch.tensor(slots))

        def packed(tensors: list[Tensor]) -> Tensor:
            rows = [tensors[i][:, start : start + count] for i, start, count in chunks]
            rows += [torch.full_like(rows[0][:, :1], math.nan)] * padding
            # As models hand it over: token by token in memory.
            return torch.cat(rows, 1).transpose(0, 1).contiguous().transpose(0, 1)

        out = self.kernels.attend(
            plan, packed(self.query), packed(self.key), packed(self.value), self.keys, self.values, scale=0.3, **options
        )
        assert not out[row:].any(), "rows of padding are zeros"
        return list(out[:row].split([count for _, _, count in chunks])), plan.finite

    def expected(
        self,
        index: int,
        window: int | None = None,
        chunk: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        query, key, value = (t[index].double() for t in (self.query, self.key, self.value))
        share = self.heads // key.shape[0]
        scores = query @ key.repeat_interleave(share, 0).transpose(1, 2) * 0.3
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        n = torch.arange(query.shape[1])
        hidden = n[None] > n[:, None]
        if window:
            hidden |= n[None] <= n[:, None] - window
        if chunk:
            hidden |= n[None] // chunk != n[:, None] // chunk
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            extra = sinks.double()[:, None, None].expand(-1, query.shape[1], 1)
            scores = torch.cat([scores, extra], -1)
        weights = scores.softmax(-1)[..., : query.shape[1]]
        return (weights @ value.repeat_interleave(share, 0)).transpose(0, 1)


_OPTIONS: list[dict[str, object]] = [
    {},
    {"window": 1},
    {"window": 20},
    {"window": 64},
    {"chunk": 1},
    {"chunk": 16},
    {"chunk": 23},
    {"softcap": 3.0},
    {"sinks": torch.tensor([0.5, -3.0, 40.0, 0.0, 1.0, 2.0])},
    {"window": 17, "softcap": 5.0, "sinks": torch.arange(6.0)},
    {"window": 9, "chunk": 40, "sinks": torch.arange(6.0)},
]


@pytest.mark.parametrize("options", _OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize(("kv_heads", "dims"), [(6, (64, 64)), (2, (16, 48)), (1, (80, 32)), (3, (7, 16))])
def test_it_is_attention(kernels: Kernels, options: dict[str, object], kv_heads: int, dims: tuple[int, int]) -> None:
    lengths = [1, 16, 137]
    sequences = _Sequences(kernels, lengths, heads=6, kv_heads=kv_heads, dims=dims)
    results, finite = sequences.step([(i, 0, n) for i, n in enumerate(lengths)], padding=1, **options)
    assert finite.all()
    for index, result in enumerate(results):
        torch.testing.assert_close(result.double(), sequences.expected(index, **options), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_row_of_attention_depends_on_its_own_past_alone(kernels: Kernels, data: st.DataObject) -> None:
    """However the prompt is cut, whoever is beside it, wherever its blocks lie, and on any number of threads."""
    options = data.draw(st.sampled_from(_OPTIONS))
    length = data.draw(st.integers(1, 300))
    alone = _Sequences(kernels, [length], heads=6, kv_heads=2, dims=(32, 32))
    (whole,), _ = alone.step([(0, 0, length)], **options)
    crowd = _Sequences(kernels, [length, 40, 90], heads=6, kv_heads=2, dims=(32, 32))
    done, pieces, others = 0, [], {1: 0, 2: 0}
    threads = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 4)))
    try:
        while done < length:
            count = data.draw(st.integers(1, length - done))
            chunks = [(0, done, count)]
            for index, at in others.items():
                if at < 40 and data.draw(st.booleans()):
                    chunks.insert(data.draw(st.integers(0, len(chunks))), (index, at, 7))
                    others[index] += 7 if at + 14 <= 40 else 40
            results, _ = crowd.step(chunks, padding=data.draw(st.integers(0, 2)), **options)
            pieces.append(results[[c[0] for c in chunks].index(0)])
            done += count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_what_is_not_finite_is_told_and_not_stored(kernels: Kernels, where: str, bad: float) -> None:
    """A sum over it would be NaN for whoever is given the block next, even where it is masked."""
    sequences = _Sequences(kernels, [20, 20], heads=4, kv_heads=2, dims=(16, 16))
    (_, clean), _ = sequences.step([(0, 0, 20), (1, 0, 20)])
    getattr(sequences, where)[0][1, 3, 5] = bad
    (_, spared), finite = sequences.step([(0, 0, 20), (1, 0, 20)])
    assert finite.tolist() == [row != 3 for row in range(40)]
    assert sequences.keys.isfinite().all()
    assert sequences.values.isfinite().all()
    assert torch.equal(spared, clean)


def test_a_query_that_is_not_finite_stays_so(kernels: Kernels) -> None:
    sequences = _Sequences(kernels, [20], heads=4, kv_heads=2, dims=(16, 16))
    sequences.query[0][1, 3, 5] = math.nan
    (result,), _ = sequences.step([(0, 0, 20)])
    assert result[3, 1].isnan().all()
    assert result[[0, 1, 2, *range(4, 20)]].isfinite().all()


# -- other processors ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_products_have_the_same_bits_with_every_instruction_set(
    kernels: Kernels, other_kernels: Kernels, kind: str
) -> None:
    """Tiles, panels and the rest behind the last whole vector differ from one to the other; the numbers must not."""
    draw = random.Random(kind)
    for depth in (1, 3, 64, 127, 130, 1024, 1027, 2100):
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 40, 70):
            columns = draw.randrange(1, 150)
            weight, bias = _random(columns, depth), draw.choice([None, _random(columns)])
            weight = weight.bfloat16().float() if kind == "bfloat16" else weight
            x = _random(rows, depth) * torch.tensor([1.0, 1e-3, 100.0, 0.0])[torch.arange(rows) % 4, None]
            stored = "int8" if kind == "int8" else "exact"
            mine, theirs = (_product(k, x, weight, bias, stored) for k in (kernels, other_kernels))
            assert torch.equal(mine, theirs), (depth, rows, columns)


@pytest.mark.slow
def test_norms_and_activations_have_the_same_bits_with_every_instruction_set(
    kernels: Kernels, other_kernels: Kernels
) -> None:
    for dim in (1, 7, 8, 15, 16, 17, 31, 64, 100, 1000, 2048):
        x, weight = _random(5, dim) * 4, _random(dim)
        assert torch.equal(kernels.norm(x, weight, 1e-6), other_kernels.norm(x, weight, 1e-6)), dim
        centred = [k.norm(x, weight, 1e-6, centred=True) for k in (kernels, other_kernels)]
        assert torch.equal(*centred), dim
        for name in ACTIVATIONS:
            assert torch.equal(kernels.activate(x, name), other_kernels.activate(x, name)), (dim, name)
    wide = torch.cat(
        [_random(4000) * 30, torch.tensor([0.0, 1e-45, -87.3, -88.8, -104.0, 88.0, 3e38, -3e38, math.inf])]
    )
    for name in ACTIVATIONS:
        pair = [k.activate(wide, name) for k in (kernels, other_kernels)]
        assert torch.equal(*(torch.nan_to_num(one, nan=7.0) for one in pair)), name


@pytest.mark.slow
@pytest.mark.parametrize("options", _OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_attention_has_the_same_bits_with_every_instruction_set(
    kernels: Kernels, other_kernels: Kernels, options: dict[str, object]
) -> None:
    for dims in ((64, 64), (7, 16), (80, 48), (128, 128), (256, 256)):
        lengths = [1, 16, 300]
        mine, theirs = (_Sequences(k, lengths, heads=6, kv_heads=2, dims=dims) for k in (kernels, other_kernels))
        for steps in ([(0, 0, 1), (1, 0, 16), (2, 0, 131)], [(2, 131, 168)], [(2, 299, 1)]):
            for one, other in zip(mine.step(steps, **options)[0], theirs.step(steps, **options)[0], strict=True):
                assert torch.equal(one, other), dims


@pytest.mark.slow
def test_torch_kept_to_avx2_keeps_the_kernels_to_it(kernels: Kernels) -> None:
    """One switch for everything: a newer machine then computes what an older one does."""
    code = "from engine.compute.cpu.kernels import Kernels; print(Kernels.load().target)"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("AVX2")


# -- compilers and threads -------------------------------------------------------------------------------------------


def test_clang_will_do(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clang = shutil.which("clang")
    if clang is None:
        pytest.skip("clang is not installed")
    monkeypatch.setenv("CC", clang)
    other = Kernels.load(tmp_path)
    x, weight = _random(5, 300), _random(50, 300)
    for kind in ("exact", "int8"):
        assert torch.equal(_product(other, x, weight, None, kind), _product(kernels, x, weight, None, kind))


def test_fewer_threads_than_asked_for_lose_no_work(kernels: Kernels) -> None:
    """OMP_THREAD_LIMIT, OMP_DYNAMIC or a container may grant less than torch believes to have."""
    code = (
        "import torch\n"
        "from engine.compute.cpu.attention_plan import AttentionPlan\n"
        "from engine.compute.cpu.kernels import Kernels\n"
        "torch.set_num_threads(4)\n"
        "k = Kernels.load()\n"
        "w, x = torch.randn(300, 64), torch.randn(9, 64)\n"
        "out = k.group([k.pack(w, None)])(x)[0]\n"
        "assert torch.allclose(out, x @ w.T, atol=1e-4)\n"
        "q, cache = torch.randn(2, 40, 16), torch.zeros(2, 64, 16)\n"
        "plan = AttentionPlan([(0, 40, 0, [0, 1, 2])], torch.arange(40))\n"
        "a = k.attend(plan, q, q, q, cache, cache.clone(), scale=0.3)\n"
        "b = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3)\n"
        "assert torch.allclose(a.transpose(0, 1), b, atol=1e-4)\n"
    )
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
