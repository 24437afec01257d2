"""How models load, as a person and as a log file see it."""

from __future__ import annotations

import dataclasses
import io
import logging
import threading
from typing import Any

import pytest
from fakes import INFO

from engine import LoadProgress, ModelStatus, ReproducibilityReport
from server import logs
from server.progress.display import Display
from server.progress.lines import ModelLine, line_of, ready_text
from server.terminal import Terminal


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(on_terminal: bool, width: int = 100) -> tuple[Display, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    console = Terminal(file=out, force_terminal=on_terminal, width=width, _environ={"TERM": "xterm"})
    return Display(console, clock=clock), out, clock


def status(state: Any, detail: str = "", info: Any = None, **more: Any) -> Any:
    return ModelStatus("m", state, detail, info, **more)


def test_a_log_file_gets_plain_lines() -> None:
    """No control character, a line for each step, few for many bytes, and what is promised when it is ready."""
    display, out, clock = shown(on_terminal=False)
    display.look([status("waiting", "waiting for its turn")])
    for done in range(0, 101):
        display.look(
            [
                status(
                    "loading",
                    "reading",
                    progress=LoadProgress(text="reading", bytes_read=done << 20, total_bytes=100 << 20),
                )
            ]
        )
    clock.now = 3.25
    display.look([status("ready", "ready", INFO)])
    display.look([status("ready", "ready", INFO)])
    display.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "m: reading · 0 B of 100.0 MiB, 0 %"
    assert lines[-1] == "m: ready · reproducible on this machine · fp_fake (3.2 s)"
    assert 4 <= len(lines) <= 7
    assert out.getvalue().replace("\n", "").isprintable()


def test_a_terminal_has_one_live_line_a_model_and_the_last_one_stays() -> None:
    display, out, clock = shown(on_terminal=True)
    display.tell("m", "reading", 1 << 30, 4 << 30)
    clock.now = 2.0
    display.show(ModelLine("m", "ready", ready_text(INFO)))
    last = out.getvalue().rpartition("\x1b[2K")[2]
    for words in ("✓", "m", "reproducible on this machine · fp_fake", "2.0 s"):
        assert words in last
    assert display._live is None, "nothing redraws any more"


@pytest.mark.parametrize("on_terminal", [False, True])
def test_a_failure_is_told_once_and_without_its_name_twice(on_terminal: bool) -> None:
    display, out, _ = shown(on_terminal)
    display.look([status("loading", "reading")])
    display.look([status("failed", "m: no config.json in /x.")])
    display.close()
    assert "m: m:" not in out.getvalue()
    assert "failed: no config.json in /x." in out.getvalue()


def test_names_and_texts_control_no_terminal() -> None:
    display, out, _ = shown(on_terminal=False)
    display.show(ModelLine("a\x1b]0;x\x07", "loading", "b\n[bold]c\x9b"))
    assert out.getvalue() == "a\\x1b]0;x\\x07: b\\x0a[bold]c\\x9b\n"


def test_the_log_is_written_above_the_live_lines() -> None:
    display, out, _ = shown(on_terminal=True)
    display.tell("m", "reading")
    before, root = logging.getLogger().handlers[:], logging.getLogger()
    try:
        handler = logging.StreamHandler(display.stream)
        handler.setFormatter(logs._TextFormatter())
        handler.emit(
            logging.makeLogRecord({"name": "x", "levelname": "WARNING", "msg": "look [bold]here " + "y" * 150})
        )
    finally:
        root.handlers[:] = before
    display.close()
    assert "look [bold]here " + "y" * 150 in out.getvalue(), "neither markup nor wrapped"


def test_why_a_model_is_not_reproducible_is_said() -> None:
    info = dataclasses.replace(INFO, law=ReproducibilityReport(False, "experts differ."))
    assert ready_text(info) == "not reproducible on this machine: experts differ · fp_fake"
    assert line_of(status("ready", info=info)).sentence == ready_text(info)


@pytest.mark.parametrize(
    ("done", "total", "words"),
    [
        (None, None, ""),
        (512, None, "512 B"),
        (512, 1024, "512 B of 1.0 KiB, 50 %"),
        (3 << 29, 3 << 30, "1.5 of 3.0 GiB, 50 %"),
        (2048, 1024, "1.0 of 1.0 KiB, 100 %"),
        (0, 0, "0 B"),
    ],
)
def test_amounts(done: int | None, total: int | None, words: str) -> None:
    assert ModelLine("m", "loading", "x", done, total).amount == words


def test_the_table_is_drawn_while_another_thread_shows_a_line() -> None:
    """rich's thread draws with a lock of its own, which a thread that shows a line waits for: none for ever."""
    display, _, _ = shown(on_terminal=True)
    display.tell("m", "reading")
    drawn = threading.Event()

    def draw() -> None:
        display._table()
        drawn.set()

    with display._lock:
        threading.Thread(target=draw, daemon=True).start()
        assert drawn.wait(20)
    display.close()
