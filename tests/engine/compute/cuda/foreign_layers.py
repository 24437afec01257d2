"""Quantised layers in the formats of others, packed as their documentation says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words(numbers: Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> Tensor:
    """Pack numbers along `dim` into words of 32 bits, lowest first; `order`: which neighbour comes first, …"""
    each = 32 // bits
    lines = numbers.t().tolist() if dim == 0 else numbers.tolist()
    packed = []
    for line in lines:
        line = line + [0] * (-len(line) % each)
        places = order or range(each)
        found = [sum(line[at + p] << bits * i for i, p in enumerate(places)) for at in range(0, len(line), each)]
        packed.append([word - (1 << 32) if word >= 1 << 31 else word for word in found])
    result = torch.tensor(packed, dtype=torch.int32)
    return result.t().contiguous() if dim == 0 else result


class Layer:
    """A quantised layer as numbers: `(q - zero) * scale`, by group of columns.

    Attributes:
        q: `[out, in]`; zero, scale: `[out, groups]`.
    """

    def __init__(self, seed: int, rows: int, columns: int, size: int, bits: int = 4, symmetric: bool = False) -> None:
        top = 1 << bits
        self.size, self.bits = size, bits
        self.q = torch.randint(0, top, (rows, columns), generator=random(seed))
        self.zero = torch.randint(0, top, (rows, columns // size), generator=random(seed + 1))
        if symmetric:
            self.zero.fill_(top // 2)
        self.scale = torch.rand(rows, columns // size, generator=random(seed + 2)).half()
        self.bias = torch.randn(rows, generator=random(seed + 3)).half()

    def numbers(self) -> Tensor:
        """Dequantise, exactly: `[out, in] float64`."""
        zero, scale = (t.repeat_interleave(self.size, dim=1) for t in (self.zero, self.scale))
        return (self.q - zero).double() * scale.double()

    def gptq(self, version: int = 2) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """AutoGPTQ: words along `in`; zeros along `out`, in version 1 less 0x11111111 as one number (GPTQModel)."""
        zeros = words(self.zero.t(), self.bits, 1)
        if version == 1:
            one = sum(1 << i for i in range(0, 32, self.bits))
            zeros = torch.tensor([[wrap(z - one) for z in line] for line in zeros.tolist()], dtype=torch.int32)
        tensors = {
            "qweight": words(self.q.t(), self.bits, 0),
            "qzeros": zeros,
            "scales": self.scale.t().contiguous(),
            "g_idx": (torch.arange(self.q.shape[1]) // self.size).to(torch.int32),
            "bias": self.bias,
        }
        form = "gptq" if version == 1 else "gptq_v2"
        settings = {"bits": self.bits, "group_size": self.size, "desc_act": False, "checkpoint_format": form}
        return tensors, {"quant_method": "gptq", **settings}

    def awq(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """AutoAWQ's GEMM layout: words along `out`, in the order 0, 2, 4, 6, 1, 3, 5, 7."""
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {
            "qweight": words(self.q.t(), 4, 1, order),
            "qzeros": words(self.zero.t(), 4, 1, order),
            "scales": self.scale.t().contiguous(),
            "bias": self.bias,
        }
        settings = {"quant_method": "awq", "bits": 4, "group_size": self.size, "zero_point": True, "version": "gemm"}
        return tensors, settings

    def compressed(self, symmetric: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """compressed-tensors' pack-quantized: words along `in`, zeros along `out`."""
        strategy = "group" if self.scale.shape[1] > 1 else "channel"
        tensors = {
            "weight_packed": words(self.q, self.bits, 1),
            "weight_scale": self.scale,
            "weight_shape": torch.tensor(self.q.shape),
            "bias": self.bias,
        }
        if not symmetric:
            tensors["weight_zero_point"] = words(self.zero, self.bits, 0)
        given = {"num_bits": self.bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
        scheme = {"targets": ["Linear"], "weights": {**given, "group_size": self.size}, "input_activations": None}
        settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        return tensors, {**settings, "config_groups": {"group_0": scheme}}


def wrap(word: int) -> int:
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)
