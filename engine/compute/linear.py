"""Batch-invariant linear layers in torch. Replaces modules in place; knows no model by name.

On a CPU, `F.linear` in float32 rounds a row differently depending on how many rows are computed with it. Two ways out:

* `packed`: oneDNN with a prepacked weight, for two rows or more. The fastest float32 product torch has there.
* `strict`: `F.linear` under `MKL_CBWR=…,STRICT` with the rows padded to a multiple of four. Slower for few rows.

Compiled kernels (`engine.compute.cpu.linear`) are a third. Which of them keeps the law depends on the library
versions and the processor (oneDNN 3.12 does on AVX2, 3.10 does not), so they are tried on the model's own shapes.
Weights are packed one after the other and the originals freed, so that they are never held twice; a bfloat16 or float16
checkpoint widens to float32 exactly. Measured facts and their limits: docs/decisions/0002 and 0014.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.host_memory import give_back_memory

_PROBED_ROWS: Final = 512
_TRIM_EVERY: Final = 16
_TELL_EVERY: Final = 32
_PACK_HINT: Final = 16  # rows that the packed layout is tuned for: between one decode and a prompt
_ROUNDED: Final = 1e-4
"""Allowed difference to torch's product, as a fraction of its largest number: beyond it something is broken."""

Make = Callable[[Tensor, Tensor | None], nn.Module]
"""`weight [out, in]` and `bias [out]` → the layer that replaces them; neither is kept."""


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` in float32 with a oneDNN-packed weight.

    Attributes:
        in_features, out_features: as in `nn.Linear`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack `weight [out, in]`, of any float dtype; the original is not kept."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(torch.float32), _PACK_HINT)
        # Not buffers: an opaque oneDNN tensor cannot be moved, cast or saved as the others can.
        self._packed: Tensor = packed
        self._bias: Tensor | None = None if bias is None else bias.detach().to(torch.float32).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        single = rows.shape[0] == 1  # a single row may take another path in the library
        if single:
            rows = F.pad(rows, (0, 0, 0, 1))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return (out[:1] if single else out).reshape(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """A fresh float32 copy `[out, in]`, for the rare architecture that reads weights itself (Mamba)."""
        return self._packed.to_dense()

    @property
    def bias(self) -> Tensor | None:
        """`[out]` float32."""
        return self._bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, packed float32"


class StrictLinear(nn.Module):
    """`x @ weight.T + bias` in float32 by `F.linear`, never with one to three rows left over.

    Attributes:
        weight: `[out, in]`; bias: `[out]` or None. Both float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach().to(torch.float32).contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        count = rows.shape[0]
        missing = -count % 4
        if missing:
            rows = F.pad(rows, (0, 0, 0, missing))
        return F.linear(rows, self.weight, self.bias)[:count].reshape(*x.shape[:-1], self.out_features)


TORCH_LINEARS: Final[Mapping[str, Make]] = {"packed": PackedLinear, "strict": StrictLinear}
"""The kinds of this file, fastest first."""


def choose_linear(model: nn.Module) -> tuple[str, Make]:
    """Return the first kind whose rows are independent here, on all shapes of the model; `packed` if none is.

    Each kind is tried, because it depends on libraries and processor. The self-test then tries the whole model.
    """
    sound = (name for name, make in TORCH_LINEARS.items() if is_sound_for(model, make))
    name = next(sound, "packed")
    return name, TORCH_LINEARS[name]


def is_sound_for(model: nn.Module, make: Make) -> bool:
    """Test a kind of linear layer on all shapes that the model has: see `is_sound`."""
    shapes = {(linear.in_features, min(linear.out_features, 2048)) for linear in _linears(model)}
    return all(is_sound(make, *shape) for shape in shapes)


@torch.inference_mode()
def is_sound(make: Make, in_features: int, out_features: int, tolerance: float = _ROUNDED) -> bool:
    """Check that a layer's rows do not depend on how many rows there are, and that it computes the product."""
    weight = quasi_random(out_features, in_features)
    return computes(make(weight, None), weight, tolerance)


@torch.inference_mode()
def computes(layer: nn.Module, weight: Tensor, tolerance: float) -> bool:
    """Check the same of a layer without a bias, whose weight is `[out, in] float32`."""
    # Quasi-random numbers of every size and sign: a sum of equal terms would hide another order of summation.
    x = quasi_random(_PROBED_ROWS, weight.shape[1])
    whole = layer(x)
    for count in (1, 2, 3, 5, 8, 17, 34, 129):
        if not torch.equal(layer(x[-count:]), whole[-count:]) or not torch.equal(layer(x[:count]), whole[:count]):
            return False
    right = F.linear(x[:32], weight)
    return bool((whole[:32] - right).abs().max() <= tolerance * right.abs().max())


def quasi_random(rows: int, columns: int) -> Tensor:
    """Return `[rows, columns]` float32 between -0.5 and 0.5, the same on every machine, to try layers with."""
    index = torch.arange(rows * columns, dtype=torch.int64)
    return ((index * 2654435761) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24).sub_(0.5).view(rows, columns)


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear]


class WideningEmbedding(nn.Module):
    """An embedding kept in the checkpoint's dtype; only the looked-up rows are widened to float32.

    The wrapped module's own forward is used, over the small table of looked-up rows, so that a subclass that scales
    its output (Gemma) keeps doing so, in float32.
    """

    def __init__(self, inner: nn.Embedding) -> None:
        super().__init__()
        inner.padding_idx = None  # has no meaning without training, and would be checked against the small table
        self.inner = inner

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = F.embedding(input_ids.flatten(), self.inner.weight).to(torch.float32)
        if type(self.inner) is nn.Embedding:
            return rows.view(*input_ids.shape, -1)
        index = torch.arange(rows.shape[0], device=rows.device).view_as(input_ids)
        out: Tensor = torch.func.functional_call(self.inner, {"weight": rows}, (index,))
        return out


def pack_model(
    model: nn.Module,
    embedding_dtype: torch.dtype = torch.float32,
    make: Make = PackedLinear,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Replace the linear layers of a float32 model on a CPU, in place, and free the originals. Returns how many.

    Every `nn.Linear` and transformers `Conv1D` is replaced. If the input embedding came from a checkpoint in
    `embedding_dtype` and goes back into it without loss, it is kept so, behind a `WideningEmbedding`.
    """
    targets = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear or type(child).__name__ == "Conv1D"
    ]
    for number, (parent, name) in enumerate(targets):
        child = getattr(parent, name)
        weight = child.weight.T if type(child).__name__ == "Conv1D" else child.weight
        # The original is freed here, before the next one is packed, unless it is tied to the embedding.
        setattr(parent, name, make(weight, child.bias))
        del child, weight
        if number % _TRIM_EVERY == 0:
            give_back_memory()
        done = number + 1
        if progress and (done == len(targets) or done % _TELL_EVERY == 0):
            progress(f"packing layers {done}/{len(targets)}")
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if isinstance(embedding, nn.Embedding) and embedding_dtype != torch.float32:
        narrow = embedding.weight.detach().to(embedding_dtype)
        if _is_lossless(narrow, embedding.weight):
            embedding.weight = nn.Parameter(narrow, requires_grad=False)
            model.set_input_embeddings(WideningEmbedding(embedding))  # type: ignore[operator]
    return len(targets)


def _is_lossless(narrow: Tensor, wide: Tensor, rows: int = 4096) -> bool:
    for start in range(0, wide.shape[0], rows):
        if not torch.equal(narrow[start : start + rows].to(wide.dtype), wide[start : start + rows]):
            return False
    return True
