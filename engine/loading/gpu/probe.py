"""Try the GPU's kernels in a child process, which may crash or hang, and keep the verdict. Imports no torch or triton.

A verdict holds for one card, driver, torch, triton and set of kernels, and is kept under these in the cache folder.

    probe_gpu ──▶ kernel_probe, in a process and session of its own
        ▲               │
        └───────────────┘  lines of JSON: what begins, what was found; none for `SECONDS`: the whole session is ended
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final, get_args

from engine.cache_folder import cache_folder, make_private
from engine.errors import one_line
from engine.loading.gpu.card import card_of
from engine.loading.gpu.surroundings import SURROUNDINGS, triton_folder
from engine.types.gpu import DEVICE, GRAPH, LINEAR, CheckState, GpuCheck, GpuVerdict

__all__ = [
    "CAPABILITY",
    "CHECKS",
    "FIRST",
    "OPERATIONS",
    "REPORT",
    "Probed",
    "keep_verdict",
    "kept_verdict",
    "probe_gpu",
    "verdict_of",
]

SECONDS: Final = 120.0
"""How long one operation may take. A kernel that is compiled for the first time takes one to six."""
OPERATIONS: Final = "engine.compute.cuda.triton_operations:TritonOperations"

CAPABILITY: Final = "compute capability"
FIRST: Final = "first kernel"
TRIALS: Final = ("rms norm", "silu_mul", LINEAR["exact"], "store", "copy blocks", "attention")
CHECKS: Final = (
    *(DEVICE, CAPABILITY, "triton", *(name for name, _ in SURROUNDINGS), FIRST),
    *TRIALS,
    *(GRAPH, LINEAR["int8"], LINEAR["int4"]),
)
"""All checks, in their order: what a card does not need comes last, so that a crash there costs nothing else."""

_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from engine.loading.gpu.kernel_probe import main; main()"
)
_LAST_STEPS: Final = 10.0  # seconds in which torch gives the GPU back
_MOST_BYTES: Final = 1 << 20
_FIELDS: Final = ("gpu", "capability", "driver", "torch", "triton", "kernels")
REPORT: Final = (
    "write gpu: no-kernels into the model's entry, and report it with what `verbatim gpu-probe --json` prints"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Probed:
    """A verdict, and whether it will stay the same: memory that ran out, or a clock, may be another program's doing."""

    verdict: GpuVerdict
    lasting: bool


def verdict_of(device: str, progress: Callable[[str], None]) -> GpuVerdict:
    """Return the kept verdict about a card, or probe it and keep what was found. Starts CUDA in this process."""
    card = card_of(device)
    found = kept_verdict(card)
    if found is None:
        progress("trying the GPU's kernels, once for this card and driver")
        probed = probe_gpu(device, progress=progress)
        keep_verdict(probed)
        found = probed.verdict
    return found


def probe_gpu(
    device: str,
    *,
    operations: str = OPERATIONS,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda _: None,
) -> Probed:
    """Make all checks in a child process.

    Args:
        device: `cuda:0`; `cpu` for a rehearsal: checks of the card are left out, the trials of `operations` are made.
        operations: `module:Class` of what is tried (`engine.compute.cuda.operations.Operations`).
        seconds: how long the child may say nothing.
        progress: told which check begins.
    """
    arguments = json.dumps({"device": device, "operations": operations})
    environment, folder = dict(os.environ), triton_folder()
    if folder is not None:
        environment["TRITON_CACHE_DIR"] = str(folder)
    with tempfile.TemporaryFile() as complaints:
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, arguments, json.dumps([*map(str, sys.path)])],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints,
                env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Probed(_unfinished(_Heard(), f"the child process does not start: {error}"), lasting=False)
        heard = _Heard()
        try:
            late = _listen(child, heard, seconds, progress)
        finally:
            status = _end(child, patience=_LAST_STEPS if heard.ended else 1.0)
        return _judged(heard, status, late, seconds, complaints)


@dataclasses.dataclass(slots=True)
class _Heard:
    """What the child has said so far."""

    card: dict[str, str] = dataclasses.field(default_factory=dict)
    checks: list[GpuCheck] = dataclasses.field(default_factory=list)
    begun: str = ""
    passing: bool = False
    ended: bool = False

    def take(self, line: bytes, progress: Callable[[str], None]) -> None:
        said = json.loads(line)
        if "begin" in said:
            self.begun = said["begin"]
            progress(f"GPU check: {self.begun}")
        elif "card" in said:
            self.card = said["card"]
        elif "check" in said:
            self.checks.append(GpuCheck(said["check"], said["state"], said["detail"]))
            self.begun, self.passing = "", self.passing or said["passing"]
        elif "end" in said:
            self.ended = True


def _listen(child: subprocess.Popen[bytes], heard: _Heard, seconds: float, progress: Callable[[str], None]) -> bool:
    """Take the child's lines until it ends; return True if it said nothing for too long."""
    assert child.stdout is not None
    for line in _lines(child.stdout, seconds):
        if line is None:
            return True
        heard.take(line, progress)
    return False


def _lines(stream: IO[bytes], seconds: float) -> Iterator[bytes | None]:
    """Yield lines until the stream ends; None, and no more, if one takes longer than `seconds`."""
    poll, unread = select.poll(), bytearray()
    poll.register(stream, select.POLLIN)
    late = time.monotonic() + seconds
    while True:
        if not poll.poll(max(0.0, late - time.monotonic()) * 1000):
            yield None
            return
        data = os.read(stream.fileno(), 1 << 16)
        if not data:
            return
        unread += data
        *lines, rest = bytes(unread).split(b"\n")
        unread[:] = rest
        for line in lines:
            yield line
            late = time.monotonic() + seconds


def _end(child: subprocess.Popen[bytes], patience: float) -> int | None:
    """End the child and what it has started (compilers); None if even that does not end it, as in a driver's call."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(patience)  # one that has said everything, or crashed, ends by itself
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    assert child.stdout is not None
    child.stdout.close()
    try:
        return child.wait(5.0)
    except subprocess.TimeoutExpired:
        return None


def _judged(heard: _Heard, status: int | None, late: bool, seconds: float, complaints: IO[bytes]) -> Probed:
    """Complete what was heard by how the child ended."""
    if heard.ended:
        return Probed(_completed(heard), lasting=not heard.passing)
    said = _last_line(complaints)
    if late:
        fault = f"no end after {seconds:g} seconds; try once more, and if it hangs again {REPORT}."
    elif status is not None and status < 0:
        fault = f"it ended its process by {signal.Signals(-status).name}; {REPORT}."
    else:
        fault = f"its process ended with status {status}{f' ({said})' if said else ''}; {REPORT}."
    by_system = status == -signal.SIGKILL  # short of memory, or somebody's hand
    return Probed(_unfinished(heard, fault), lasting=not (late or by_system or heard.passing))


def _unfinished(heard: _Heard, fault: str) -> GpuVerdict:
    """Blame the check that was under way, or the one that was due."""
    done = {check.name for check in heard.checks}
    name = heard.begun or next((name for name in CHECKS if name not in done), CHECKS[-1])
    heard.checks.append(GpuCheck(name, "failed", f"{fault[:1].upper()}{fault[1:]}"))
    return _completed(heard)


def _completed(heard: _Heard) -> GpuVerdict:
    found = {check.name: check for check in heard.checks}
    checks = tuple(found.get(name, GpuCheck(name, "not tried")) for name in CHECKS)
    return GpuVerdict(**{name: str(heard.card.get(name, "")) for name in _FIELDS}, checks=checks)


def _last_line(complaints: IO[bytes]) -> str:
    complaints.seek(0, os.SEEK_END)
    complaints.seek(max(0, complaints.tell() - 4096))
    lines = [line for line in complaints.read().decode(errors="replace").splitlines() if line.strip()]
    return one_line(lines[-1], 200) if lines else ""


# -- the kept verdict -------------------------------------------------------------------------------------------------


def keep_verdict(probed: Probed) -> Path | None:
    """Keep a verdict for the next start, if it is about the kernels and lasts; return its file.

    What is missing on the machine (a compiler) is not kept: it may have been installed by the next start.
    """
    verdict = probed.verdict
    if not probed.lasting or not verdict.gpu or verdict.check(FIRST).state != "ok":
        return None
    path = _path(verdict)
    if path is None:
        return None
    try:
        make_private(path.parent)
        handle, partial = tempfile.mkstemp(prefix=".gpu-", dir=path.parent)
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(verdict), file, indent=1)
        Path(partial).replace(path)
    except OSError:  # the next start probes again
        return None
    return path


def kept_verdict(card: GpuVerdict) -> GpuVerdict | None:
    """Return the kept verdict about a card with this driver and these libraries and kernels; None if there is none."""
    path = _path(card)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            said = json.loads(file.read(_MOST_BYTES))
        found = GpuVerdict(**{**said, "checks": tuple(_check(check) for check in said["checks"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if tuple(check.name for check in found.checks) == CHECKS else None


def _check(said: Any) -> GpuCheck:
    if said["state"] not in get_args(CheckState):
        raise ValueError("no state of a check")
    return GpuCheck(str(said["name"]), said["state"], str(said["detail"]))


def _path(card: GpuVerdict) -> Path | None:
    folder = cache_folder()
    key = hashlib.sha256(json.dumps([getattr(card, name) for name in _FIELDS]).encode()).hexdigest()[:24]
    return None if folder is None else folder / f"gpu-{key}.json"
