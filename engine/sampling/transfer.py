"""Moves numbers between the host and a device, many at a time. Knows neither logits nor requests.

Every copy to a GPU costs a call, and every number that is read back makes the host wait until the GPU has computed it.
So a step collects what it has to send in one `Upload`, and what it wants to read in one `Readback`. On a CPU device
both are views or plain conversions.

    Upload:    host lists ── ints, floats, words ──► one pinned buffer ── send ──► one device tensor, cut into parts
    Readback:  device tensors ── add ──► one float64 tensor ── fetch ──► plain lists, handed to whoever added them
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["HostCopy", "Part", "Readback", "Rows", "Upload"]

Rows = list[list[float]]
"""A tensor `[n, m]` on the host, as plain numbers."""

_WORD: Final = 8  # bytes of an int64


class Part:
    """A part of an `Upload`: a one-dimensional tensor on the device, once the upload was sent."""

    def __init__(self, upload: Upload, start: int, end: int, dtype: torch.dtype, count: int) -> None:
        self._upload = upload
        self._start, self._end, self._dtype, self._count = start, end, dtype, count

    def __len__(self) -> int:
        return self._count

    @property
    def tensor(self) -> Tensor:
        """The numbers, `[len(self)]`, int64, float64 or int32 on the device: a view of what was sent. Do not write."""
        words = self._upload.sent[self._start : self._end]
        return words if self._dtype == torch.int64 else words.view(self._dtype)[: self._count]


class Upload:
    """Collects numbers on the host and sends them to a device in one transfer."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._words = array("q")
        self._sent: Tensor | None = None

    def ints(self, values: Sequence[int]) -> Part:
        """Add whole numbers: int64 on the device."""
        start = len(self._words)
        self._words.extend(values)
        return Part(self, start, len(self._words), torch.int64, len(values))

    def floats(self, values: Sequence[float]) -> Part:
        """Add numbers of double precision: float64 on the device, bit for bit."""
        start = len(self._words)
        self._words.frombytes(array("d", values).tobytes())
        return Part(self, start, len(self._words), torch.float64, len(values))

    def words(self, data: bytes) -> Part:
        """Add words of 32 bits, given as bytes in the machine's order: int32 on the device."""
        start = len(self._words)
        self._words.frombytes(data + bytes(-len(data) % _WORD))
        return Part(self, start, len(self._words), torch.int32, len(data) // 4)

    def send(self) -> None:
        """Start the transfer. On a GPU it is queued on the current stream, and the host does not wait for it."""
        assert self._sent is None, "an upload is sent once"
        if not self._words:
            self._sent = torch.empty(0, dtype=torch.int64, device=self.device)
            return
        words = torch.frombuffer(self._words, dtype=torch.int64)
        if self.device.type != "cpu":
            # The allocator of pinned memory reuses a buffer only after the copies from it have ended.
            words = words.pin_memory().to(self.device, non_blocking=True)
        self._sent = words

    @property
    def sent(self) -> Tensor:
        """All numbers, as one int64 tensor on the device."""
        assert self._sent is not None, "send the upload first"
        return self._sent


class HostCopy:
    """A copy of a device tensor on the host. The transfer starts now, and `read` waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._ready: Any = None
        if tensor.device.type == "cpu":
            self._host = tensor
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._ready = torch.cuda.current_stream(tensor.device).record_event()

    def read(self) -> list[Any]:
        """Return the numbers as (nested) lists."""
        if self._ready is not None:
            self._ready.synchronize()
        found: list[Any] = self._host.tolist()
        return found


class Readback:
    """Collects device tensors whose numbers the host wants, and fetches all of them in one transfer.

    Numbers arrive as float64: whole numbers are exact below `2**53` and rounded above.
    """

    def __init__(self) -> None:
        self._wanted: list[tuple[Callable[..., None], tuple[Tensor, ...]]] = []
        self._sent: HostCopy | None = None

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def add(self, then: Callable[..., None], *tensors: Tensor) -> None:
        """Ask for some tensors `[n, m]`. `fetch` calls `then` with one list of `n` lists of `m` floats for each."""
        assert all(tensor.dim() == 2 for tensor in tensors)
        self._wanted.append((then, tensors))

    def send(self) -> None:
        """Start the transfer. What is queued on the device afterwards need not have ended when it is read."""
        assert self._sent is None, "a readback is sent once"
        if self._wanted:
            flat = [tensor.double().reshape(-1) for _, tensors in self._wanted for tensor in tensors]
            self._sent = HostCopy(torch.cat(flat))

    def fetch(self) -> None:
        """Read everything with one synchronisation, then call back in the order of `add`."""
        if self._sent is None:
            self.send()
        if self._sent is None:
            return
        values, wanted = self._sent.read(), self._wanted
        self._sent, self._wanted = None, []
        at = 0
        for then, tensors in wanted:
            tables: list[Rows] = []
            for tensor in tensors:
                count, width = tensor.shape
                end = at + count * width
                tables.append([values[i : i + width] for i in range(at, end, width)] if width else [[]] * count)
                at = end
            then(*tables)
