"""A layer whose weight has its columns in another order than its inputs come in. Knows modules; no checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.compute.cpu.stored_linear import copied

__all__ = ["ReorderedLinear"]


class ReorderedLinear(nn.Module):
    """`inner` over the inputs in another order: act order sorts the columns of a GPTQ weight by their groups.

    Attributes:
        inner: the layer that has the sorted columns; a backend may replace it.
        order: `[in] int64`: which input comes first, second, …
        in_features, out_features: as in `nn.Linear`.
    """

    order: Tensor

    def __init__(self, inner: nn.Module, order: Tensor, in_features: int, out_features: int) -> None:
        super().__init__()
        self.inner = inner
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("order", order.to(torch.int64), persistent=False)

    @property
    def weight(self) -> Tensor:
        """A fresh float32 copy `[out, in]`, its columns in the order of the inputs.

        Raises:
            WeightChanged: when it is changed in place.
        """
        sorted_: Tensor = self.inner.weight  # type: ignore[assignment]
        return copied(sorted_.index_select(1, self.order.argsort()))

    @property
    def bias(self) -> Tensor | None:
        """`[out]` float32."""
        return self.inner.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.index_select(-1, self.order))
        return out
