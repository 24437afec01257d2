"""The command `verbatim bench`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.configuration import ConfigOption, ModelOption, PullOption, read_configuration

if TYPE_CHECKING:
    from rich.table import Table

    from server.commands.bench.machine import Machine
    from server.commands.bench.measure import Measured

__all__ = ["bench"]


def bench(
    model: ModelOption = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
    pull: PullOption = False,
) -> None:
    """Measure a model on this machine, in about a minute, and say what to expect of larger ones.

    Without --model the first of the configuration is measured. Figures of a busy machine say little.
    """
    import dataclasses
    import json
    import time

    from engine import format_bytes
    from server.commands import opening
    from server.commands.bench.machine import SIZES, estimate, measure_machine
    from server.commands.bench.measure import measure
    from server.terminal import Terminal, one_line

    entries, _ = read_configuration(config, model, None)
    began = time.perf_counter()
    llm = opening.open_model(entries[0], pull)
    loaded = time.perf_counter() - began
    with Terminal(stderr=True).status("measuring") as status:
        measured = measure(llm, loaded, lambda text: status.update(one_line(text)))
        info = llm.info
        llm.close()
        status.update("memory bandwidth")
        machine = measure_machine()
    expected = [estimate(machine, billions) for billions in SIZES]
    if as_json:
        document: dict[str, Any] = {"model": info.id, "fingerprint": info.system_fingerprint, "device": info.device}
        document |= {"measured": dataclasses.asdict(measured), "machine": dataclasses.asdict(machine)}
        print(json.dumps({**document, "expected": [dataclasses.asdict(one) for one in expected]}))
        return
    out = Terminal()
    told = f"{info.id} · {info.device}, {info.dtype}, {info.linear} · {format_bytes(info.weight_bytes)} of weights"
    out.print(one_line(f"{told} · {info.system_fingerprint}"), highlight=False, soft_wrap=True)
    out.print(_measured(measured))
    out.print("What to expect here of models in bfloat16, on the CPU (estimates):", highlight=False)
    out.print(_expected(machine))


def _measured(found: Measured) -> Table:
    from rich.table import Table

    from engine import format_bytes

    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("load, libraries and self-test included", f"{found.load_seconds:.1f} s"),
        ("time to first token, short prompt", f"{found.first_token_seconds * 1000:.0f} ms"),
        (f"prompt of {found.prompt_tokens} tokens", f"{found.prompt_rate:,.0f} tokens/s"),
        ("decode, 1 stream", f"{found.decode_rate:,.1f} tokens/s"),
        ("decode, 8 streams together", f"{found.decode_rate_8:,.1f} tokens/s"),
        ("memory of the process", format_bytes(found.memory_bytes)),
    ):
        table.add_row(name, value)
    return table


def _expected(machine: Machine) -> Table:
    from rich import box
    from rich.table import Table

    from engine import format_bytes, free_memory
    from server.commands.bench.machine import SIZES, estimate

    free = free_memory()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("parameters", "decode, tokens/s", "prompt, tokens/s", "memory", ""):
        table.add_column(name, justify="right" if name else "left")
    for one in (estimate(machine, billions) for billions in SIZES):
        fits = "" if one.memory_bytes < free else "[yellow]more than is free[/]"
        size = f"{one.billions * 1000:.0f} M" if one.billions < 1 else f"{one.billions:g} B"
        table.add_row(size, f"{one.decode_rate:.1f}", f"{one.prompt_rate:.0f}", format_bytes(one.memory_bytes), fits)
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    table.caption = (
        f"From {machine.bandwidth / 1e9:.0f} GB/s of memory and {machine.speed / 1e9:.0f} Gflop/s, measured just now"
        f"{f' while the machine was busy (load {busy:.1f})' if busy > (os.cpu_count() or 1) else ''}."
    )
    return table
