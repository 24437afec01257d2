"""`verbatim` with a meter on its forward pass: the same command line, and the pass's CPU time in a shared file.

    python -m benchmarks.metered FILE serve --config …

What a server costs beside its model is a small difference between large numbers, so the model's share is taken in the
server itself, while it serves, and not from another run. A pass costs a microsecond more for it.
"""

from __future__ import annotations

import mmap
import struct
import sys
import time
from pathlib import Path
from typing import Any

_LAYOUT = struct.Struct("dd")


def create(path: Path) -> None:
    """An empty meter file."""
    path.write_bytes(_LAYOUT.pack(0.0, 0.0))


def read(path: Path) -> tuple[float, int]:
    """CPU seconds of all forward passes so far, and how many there were."""
    seconds, passes = _LAYOUT.unpack(path.read_bytes())
    return seconds, int(passes)


def install(path: Path) -> None:
    """Measure every forward pass of this process. One engine thread, one kernel thread: else the time is too small."""
    from engine.compute.model_runner import FallbackRunner, PackedRunner

    with path.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), _LAYOUT.size)
    total, passes = 0.0, 0
    for runner in (PackedRunner, FallbackRunner):
        original = runner.forward

        def forward(self: Any, schedule: Any, original: Any = original) -> Any:
            nonlocal total, passes
            start = time.thread_time()
            try:
                return original(self, schedule)
            finally:
                total += time.thread_time() - start
                passes += 1
                _LAYOUT.pack_into(shared, 0, total, passes)

        runner.forward = forward  # type: ignore[method-assign]


def main() -> None:
    path = Path(sys.argv.pop(1))
    from server.cli import main as verbatim

    install(path)
    verbatim()


if __name__ == "__main__":
    main()
