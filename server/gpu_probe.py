"""The command `verbatim gpu-probe`: try a GPU's kernels in a child process, and print what was found and what to do."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.table import Table

from engine import keep_verdict, probe_gpu
from server.json_text import to_json
from server.terminal import Terminal, one_line

if TYPE_CHECKING:
    from engine import GpuVerdict

__all__ = ["FAILED", "NO_GPU", "WELL", "gpu_probe"]

out = Terminal()
err = Terminal(stderr=True)

WELL: Final = 0
FAILED: Final = 1
NO_GPU: Final = 2
"""Exit codes."""

_MARKS: Final = {"ok": "[green]ok[/]", "failed": "[bold red]failed[/]", "not tried": "[dim]not tried[/]"}
_ABOUT: Final = ("gpu", "capability", "driver", "torch", "triton", "kernels")


def _device(value: str) -> str:
    if not re.fullmatch(r"cuda(:\d{1,3})?", value):
        raise typer.BadParameter(f"{value} is no GPU; write cuda:0, cuda:1, …")
    return value if ":" in value else f"{value}:0"


def gpu_probe(
    device: Annotated[str, typer.Option(callback=_device, help="The GPU to try: cuda:0, cuda:1, …")] = "cuda:0",
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Try a GPU's kernels in a child process, and say what works, what does not, and what to do about it.

    Exits with 0 if all is well, 1 if something failed, 2 if there is no GPU. What was found is kept for the next start.
    """
    with err.status("starting a child process") as status:
        probed = probe_gpu(device, progress=lambda text: status.update(one_line(text)))
    keep_verdict(probed)
    verdict = probed.verdict
    if as_json:
        print(to_json(_plain(verdict)))
    else:
        out.print(_shown(verdict))
        out.print(_summary(verdict), highlight=False, soft_wrap=True)
    raise typer.Exit(WELL if verdict.is_well else FAILED if verdict.has_gpu else NO_GPU)


def _plain(verdict: GpuVerdict) -> dict[str, Any]:
    return {**dataclasses.asdict(verdict), "well": verdict.is_well}


def _shown(verdict: GpuVerdict) -> Table:
    table = Table.grid(padding=(0, 2))
    for name in _ABOUT:
        if getattr(verdict, name):
            table.add_row(name, "", one_line(getattr(verdict, name)))
    for check in verdict.checks:
        table.add_row(check.name, _MARKS[check.state], one_line(check.detail))
    return table


def _summary(verdict: GpuVerdict) -> str:
    if verdict.is_well:
        return "All is well: models are computed by the kernels, in CUDA graphs, if the self-test of each agrees."
    if not verdict.has_gpu:
        return "There is no GPU to try."
    fault = verdict.kernels_fault()
    if fault is None and verdict.graphs_fault() is None:
        return "Models in bfloat16 and float16 are computed by the kernels, in CUDA graphs; a kind of weight is not."
    if fault is None:
        return "Models are computed by the kernels, launched one by one: slower for small models, with the same bits."
    return "Models are computed by torch: slower, and without the promise that bits are the same."
