"""What is said of a model while it loads and once it is ready, as text. Pure: no clock, no terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from engine import ModelInfo, ModelStatus

__all__ = ["LOADING", "ModelLine", "ready_text", "without_name"]

LOADING: Final = frozenset({"loading", "waiting"})
"""States that end by themselves."""
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_STEPS: Final = 4  # lines in a log file for the bytes of one text


@dataclass(frozen=True, slots=True)
class ModelLine:
    """What is known of one model.

    Attributes:
        state: as in `/v1/models`: `loading`, `ready`, `failed`, …
        text: what is done, or the reason of a failure; never begins with the model's id.
        done: bytes that are read, if known; `total`: of how many.
    """

    model_id: str
    state: str
    text: str
    done: int | None = None
    total: int | None = None

    @property
    def amount(self) -> str:
        """`1.2 of 3.4 GiB, 35 %`, or empty if it is not known."""
        if self.done is None:
            return ""
        if not self.total:
            return _bytes(self.done)
        done = min(self.done, self.total)
        (count, unit), (most, same) = _scaled(done), _scaled(self.total)
        begun = count if unit == same else f"{count} {unit}"
        return f"{begun} of {most} {same}, {done * 100 // self.total} %"

    @property
    def sentence(self) -> str:
        """The model's state without its id, as one line."""
        if self.state == "failed":
            return f"failed: {self.text}"
        reading = not self.total or (self.done or 0) < self.total  # once all is read, nothing is left to say of it
        return " · ".join(filter(None, (self.text, self.amount if reading else "")))

    def differs(self, before: ModelLine | None) -> bool:
        """Whether a log file gets a line: for another state or text, and now and then as bytes come in."""
        if before is None:
            return True
        return (self.state, self.text, self._step()) != (before.state, before.text, before._step())

    def _step(self) -> int:
        return (self.done or 0) * _STEPS // self.total if self.total else 0


def ready_text(info: ModelInfo) -> str:
    """Return what a ready model promises here: `reproducible on this machine · vb-…`, or why it is not."""
    reason = info.law.reason.rstrip(".")
    told = "reproducible on this machine" if info.law.holds else f"not reproducible on this machine: {reason}"
    return f"{told} · {info.system_fingerprint}"


def without_name(model_id: str, text: str) -> str:
    """Return a message without the model's id before it: the line has that already."""
    return text.removeprefix(f"{model_id}: ")


def line_of(status: ModelStatus) -> ModelLine:
    """Return the line of a `ModelStatus`."""
    if status.state == "ready" and status.info is not None:
        return ModelLine(status.id, "ready", ready_text(status.info))
    text = without_name(status.id, status.detail or status.state)
    read = status.progress
    known = (read.bytes_read, read.total_bytes) if read is not None else (None, None)
    return ModelLine(status.id, status.state, text, *known)


def _scaled(count: float) -> tuple[str, str]:
    unit = 0
    while count >= 1024 and unit + 1 < len(_UNITS):
        count, unit = count / 1024, unit + 1
    return (f"{count:.0f}" if unit == 0 else f"{count:.1f}"), _UNITS[unit]


def _bytes(count: float) -> str:
    return " ".join(_scaled(count))
